"""bench/gpu.sh on the CPU: a dry run that is killed twice, its files, its refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
clock = import_module("bench.gpu.clock")
images = import_module("bench.gpu.images")
machine = import_module("bench.gpu.machine")
released = import_module("bench.gpu.released")
report = import_module("bench.gpu.report")
results = import_module("bench.gpu.results")
step = import_module("bench.gpu.step")

KILLED = ("krr", "parts")
SCRIPT = ROOT / "bench" / "gpu.sh"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def command(*arguments: object) -> list[str]:
    return [str(SCRIPT), "--python", sys.executable, *map(str, arguments)]


def script(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env={**ENVIRONMENT, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def stages(out: Path) -> dict:
    """The stages in the file of results; none while it is not there."""
    try:
        return json.loads((out / "gpu.json").read_text())["stages"]
    except FileNotFoundError:
        return {}


def killed_after(stage: str, folder: Path, *arguments: object) -> None:
    """Run the script from a folder, and kill it with all it started once a stage has ended."""
    with subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as child:
        end = time.monotonic() + 240
        while not stages(folder / "out").get(stage, {}).get("why") is not None:
            assert time.monotonic() < end and child.poll() is None, f"{stage} has not ended"
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory):
    """A dry run that was killed after two of its stages and then went to its end.

    From a folder in which a `bench` and a `tests` are something else.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("bench", "tests"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the wrong {name}')")
    options = ("--dry-run", "--out", "out", "--work", "work")
    seen, rows = {}, {}
    for stage in KILLED:
        killed_after(stage, folder, *options)
        found = results.Results(folder / "out")
        seen[stage] = set(found.stages)
        rows[stage] = {
            name: row["date"] for name, row in found.rows(stage).items() if stage != "build"
        }
        page = (folder / "out" / "gpu.md").read_text()
        assert page.startswith("# Dry run on the CPU")
    return folder, seen, rows, script(*options, cwd=folder)


@pytest.fixture
def built(dry, tmp_path: Path) -> Path:
    """A copy of what was built and measured: the folder that is kept between calls."""
    return shutil.copytree(dry[0] / "work", tmp_path / "work")


def test_after_each_stage_both_files_are_there(dry) -> None:
    """A limit that cuts the command then loses nothing that was measured."""
    _, seen, _, _ = dry
    names = list(results.STAGES)
    for name in KILLED:
        assert seen[name] >= set(names[: names.index(name) + 1]), f"killed after {name}"


def test_a_killed_run_goes_on_and_measures_nothing_twice(dry) -> None:
    folder, _, rows, _ = dry
    found = results.Results(folder / "out")
    for stage, dates in rows.items():
        kept = {name: row["date"] for name, row in found.rows(stage).items()}
        assert {name: kept[name] for name in dates} == dates, stage


def test_a_dry_run_makes_every_stage_and_a_short_table_last(dry) -> None:
    folder, _, _, done = dry
    assert done.returncode == 0, done.stdout + done.stderr
    found = results.Results(folder / "out")
    assert list(found.stages) == list(results.STAGES)
    for name, one in found.stages.items():
        assert one["finished"] and one["rows"] and not list(found.complaints(name)), name
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["gpu.json", "gpu.md"]
    short = report.short(found)
    assert done.stdout.endswith(short) and len(short) <= 3000
    assert done.stdout.splitlines()[-1].startswith("files: ")


def test_a_dry_run_measures_what_is_here_and_says_why_not_the_rest(dry) -> None:
    rows = {name: one["rows"] for name, one in stages(dry[0] / "out").items()}
    assert rows["tests"]["tests"]["outcomes"]["skipped"] > 50
    for name, row in rows["krr"].items():
        if name.endswith("triton, fast"):
            assert "CUDA" in row["refused"]
        if name.endswith("torch, float32"):
            assert row["released_ms"] > 0 < row["ms"] and max(row["error"].values()) < 1e-3
    for name, row in rows["parts"].items():
        if name.endswith(": torch"):
            assert 0 <= row["error"] < 1e-3 and row["ms"] > 0 and row["no_graph"]
        elif "cuda" in name or name.endswith("triton"):
            assert row["refused"]
    parts = [rows["step"][name]["parts"] for name in ("krrst_fast", "released")]
    assert list(parts[0]) == list(parts[1])
    assert rows["step"]["kernels"]["largest"] and rows["step"]["whole steps"]["times_released"] > 0
    for row in rows["steps"].values():
        assert row["loss_at_the_end"] < row["loss_at_the_start"]
    assert rows["build"]["kernels"]["last line"].startswith("1 compiled, 0 failed")


def test_a_run_leaves_the_checkout_alone(dry) -> None:
    """The package that is measured is a copy with the kernels in it."""
    site = dry[0] / "work" / "site" / "krrst_fast"
    assert (site / "kernels" / "gram.py").read_bytes() == (ROOT / "kernels/gram.py").read_bytes()
    assert "cpu" not in json.loads((ROOT / "krrst_fast" / "backends" / "tuned.json").read_text())


def test_an_empty_out_is_filled_from_what_was_kept(dry, tmp_path: Path) -> None:
    """The next call may be given a folder that is empty again; nothing is done anew for that."""
    folder = dry[0]
    before = json.loads((folder / "out" / "gpu.json").read_text())
    if before["machine"]["sources"] != machine.sources():
        pytest.skip("the code was changed while it was tested")
    done = script("--dry-run", "--out", tmp_path / "new", "--work", folder / "work")
    assert done.returncode == 0 and stages(tmp_path / "new") == before["stages"]
    assert len(done.stdout) <= 3000 + 1, "nothing was run"


def test_a_dry_run_is_not_published(dry) -> None:
    readme = (ROOT / "README.md").read_bytes()
    done = script("--publish", "--out", dry[0] / "out")
    assert done.returncode == 2 and "a dry run on the CPU is not published" in done.stderr
    assert (ROOT / "README.md").read_bytes() == readme


def test_when_the_time_is_over_nothing_more_begins(built: Path) -> None:
    done = script(*("--dry-run", "--work", built, "--limit", 3, "--again", "step"))
    assert "step: not begun, the 3 seconds are over; call again to go on" in done.stdout
    assert not stages(built)["step"]["finished"] and stages(built)["krr"]["finished"]
    assert done.returncode == 1 and "\nstep      NOT FINISHED" in done.stdout


def test_what_runs_is_ended_with_the_script(built: Path) -> None:
    """Else it would go on to write into the files of the next call."""
    every = len(stages(built)["krr"]["rows"])
    with subprocess.Popen(
        command("--dry-run", "--work", built, "--again", "krr"),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
    ) as child:
        end = time.monotonic() + 120
        while len(stages(built).get("krr", {}).get("rows", range(every))) not in range(1, every):
            assert time.monotonic() < end and child.poll() is None
            time.sleep(0.05)
        child.terminate()
        assert child.wait(timeout=30) == 143
    end = time.monotonic() + 10
    while left := running(str(built)):
        assert time.monotonic() < end, left
        time.sleep(0.05)


def running(word: str) -> list[str]:
    """The command lines of the processes that have a word in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def test_races_come_first_and_every_tensor_has_an_allocation_of_its_own(
    built: Path, tmp_path: Path
) -> None:
    """memcheck sees nothing between tensors that torch cuts from one piece of memory."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@" >> "$0.calls"\n'
        'echo "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    options = ("--dry-run", "--work", built, "--again", "sanitizer")
    done = script(*options, COMPUTE_SANITIZER=str(tool))
    assert done.returncode == 0, done.stdout
    calls = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    assert [line.split()[:3] for line in calls] == [
        ["1", "--tool", "racecheck"],
        ["1", "--tool", "memcheck"],
    ]
    rows = stages(built)["sanitizer"]["rows"]
    assert [row["last line"][-9:] for row in rows.values()] == [" 0 errors"] * 2
    assert "cholesky" in calls[0] and "--report-api-errors no" in calls[1] and "all" in calls[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--fast"], "no option --fast"),
        (["parts", "sideways"], "no stage 'sideways'"),
        (["--limit", "soon"], "--limit takes seconds, got soon"),
        (["--out"], "--out needs a value"),
        (["--out", __file__], "cannot be made"),
        (["--images", "/nowhere"], "--images /nowhere: not a store of krrst prepare"),
        (["--publish", "--out", "OUT"], "holds no results"),
        (["--python", "/nowhere"], "/nowhere is no Python that has torch"),
    ],
)
def test_bad_options_give_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = [str(tmp_path) if x == "OUT" else x for x in arguments]
    done = script(*given, "--work", tmp_path) if given != ["--out"] else script("--out")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done


def test_without_a_gpu_nothing_begins(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "gpu", lambda: None)
    assert machine.main(["--out", str(tmp_path / "out"), "--kept", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_to_do_depends_on_the_code_and_on_the_machine(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    gpu = {"name": "NVIDIA H900", "target": "9.0a"}
    monkeypatch.setattr(machine, "gpu", lambda: gpu)
    monkeypatch.setattr(machine, "sources", lambda: "old")

    def todo(*arguments: str) -> list[str]:
        where = ["--out", str(tmp_path), "--kept", str(tmp_path), *arguments]
        assert machine.main(where) == 0
        names, target = capsys.readouterr().out.splitlines()
        assert target == "9.0a"
        return names.split()

    assert todo() == list(results.STAGES) and todo("krr") == ["build", "krr"]
    for name in results.STAGES:
        kept = results.Results(tmp_path)
        kept.add(name, "row", {"ms": 1.0})
        kept.end(name, finished=name != "parts")
    assert todo("krr") == [] and todo() == ["build", "parts"], "what was built is not there"
    (tmp_path / "site" / "krrst_fast").mkdir(parents=True)
    assert todo() == ["parts"]
    assert todo("--again", "krr") == ["krr"] == todo("krr")
    monkeypatch.setattr(machine, "sources", lambda: "new")
    assert todo("step", "tests") == ["build", "tests"], "tests of other code say nothing"
    kept = results.Results(tmp_path)
    kept.add("build", "build", {"wrong": ["no nvcc"]})
    kept.end("build", finished=True)
    assert todo("build") == ["build"], "what did not build is built again, with the same code too"
    monkeypatch.setattr(machine, "gpu", lambda: {**gpu, "name": "NVIDIA A100"})
    assert todo() == list(results.STAGES) and (tmp_path / "gpu-before.json").exists()


def test_a_store_gives_its_train_split(tiny_store: Path) -> None:
    found = images.read(tiny_store, 32)
    assert found.name == tiny_store.name and found.pixels.shape == (40, 3, 8, 8)


def test_the_released_loss_is_that_of_the_reference() -> None:
    from tests.helpers import formula, loss_and_gradients, problem

    tensors = problem(17, 31, 13, 5)
    got = loss_and_gradients(released.released_mse, tensors)
    kept = loss_and_gradients(
        lambda *x: released.released_mse(*x, eye=torch.eye(17).double()), tensors
    )
    for a, b, exact in zip(got, kept, loss_and_gradients(formula, tensors)):
        assert torch.allclose(a, exact, rtol=1e-10, atol=1e-12) and torch.equal(a, b)


def test_both_steps_go_the_same_way() -> None:
    ours, other = (
        images.make(images.TOY, images.noise(8, 20), "cpu", slots=1, online_steps=9)
        for _ in range(2)
    )
    theirs = released.ReleasedStep(
        *(other.state.pool.slots[0].network, other.target.model),
        *(other.state.x_syn, other.state.y_syn, ours.state.optimizer.param_groups[0]["lr"]),
        step.SGD,
    )
    before = [x.detach().clone() for x in (ours.state.x_syn, ours.state.y_syn)]
    step.our_step(ours, step.drawer(ours, 8))(step.Marks("cpu"))
    step.released_step(theirs, step.drawer(other, 8))(step.Marks("cpu"))
    state = ours.state

    def error(got: torch.Tensor, exact: torch.Tensor) -> float:
        return float((got - exact).detach().norm() / exact.detach().norm())

    for mine, their in ((state.x_syn, theirs.x_syn), (state.y_syn, theirs.y_syn)):
        assert error(mine.grad, their.grad) < 1e-3 > error(mine, their)
        assert error(mine, before.pop(0)) > 1e-4, "it was a step"
    networks = (ours.state.pool.slots[0].network, theirs.network)
    for mine, their in zip(*(network.parameters() for network in networks)):
        assert torch.allclose(mine, their, rtol=1e-3, atol=1e-5)
