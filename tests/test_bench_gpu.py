"""bench/gpu.sh on the CPU: a dry run from end to end, resumed, killed, and what stages survive."""

import json
import os
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
cifar = import_module("bench.gpu.cifar")
clock = import_module("bench.gpu.clock")
commands = import_module("bench.gpu.commands")
main = import_module("bench.gpu.__main__")
notes = import_module("bench.gpu.notes")
process = import_module("bench.gpu.process")
released = import_module("bench.gpu.released")
run = import_module("bench.gpu.run")
step = import_module("bench.gpu.step")

SCRIPT = ROOT / "bench" / "gpu.sh"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
KEY = {"commit": "c"}


def command(*arguments: object) -> list[str]:
    return [str(SCRIPT), "--python", sys.executable, *map(str, arguments)]


def script(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    told = command(*arguments)
    return subprocess.run(
        told, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """A whole dry run, from a folder in which a `bench` is something else."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "bench.py").write_text("raise SystemExit('the wrong bench')")
    return elsewhere / "out", script("--dry-run", "--out", "out", cwd=elsewhere)


def test_a_dry_run_makes_every_stage_and_the_report(dry) -> None:
    out, done = dry
    assert done.returncode == 0, done.stdout + done.stderr
    for name in run.NAMES:
        stage = json.loads((out / f"{name}.json").read_text())
        assert stage["finished"] and stage["wrong"] == [] and stage["rows"], name
        assert stage["key"]["sizes"] == "toy" and stage["gpu"] is None
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert (out / "gpu.md").read_text().startswith("# Dry run on the CPU")
    assert set(json.loads((out / "gpu.json").read_text())["stages"]) == set(run.NAMES)


def test_a_dry_run_measures_what_is_here_and_says_why_not_the_rest(dry) -> None:
    rows = {
        name: json.loads((dry[0] / f"{name}.json").read_text())["rows"]
        for name in ("parts", "krr", "step", "steps", "tests")
    }
    assert rows["tests"]["tests"]["collected"] > 100
    for row in rows["krr"].values():
        ours = row["ours"]
        assert "CUDA" in ours["triton, fast, raise"]["refused"]
        for way in ("torch, float32, raise", "torch, float32, flag", "torch, float64, raise"):
            one = ours[way]
            assert 0 < one["p10"] <= one["ms"] <= one["p90"] and one["calls"] >= 2
            assert one["times_released"] == row["released"]["released"]["ms"] / one["ms"]
        assert max(ours["torch, float64, raise"]["error"].values()) < 1e-6
        assert max(ours["torch, float32, raise"]["error"].values()) < 1e-3
        rounded = ours["torch, fast, raise"]
        assert max(rounded["error_rounded"].values()) < max(rounded["error"].values())
    for row in rows["parts"].values():
        assert 0 <= row["told"]["torch"]["error"] < 1e-3
        assert all(
            "refused" in row["told"][who] for who in row["told"] if who in ("cuda", "triton")
        )
    assert list(rows["step"]["krrst_fast"]["parts"]) == list(rows["step"]["released"]["parts"])
    for row in rows["steps"].values():
        assert row["loss_at_the_end"] < row["loss_at_the_start"]


def test_a_run_leaves_the_checkout_alone(dry) -> None:
    """The package that is measured is a copy with the kernels in it, and its own table."""
    site = dry[0] / "site" / "krrst_fast"
    assert (site / "kernels" / "gram.py").read_bytes() == (ROOT / "kernels/gram.py").read_bytes()
    table = json.loads((site / "measured.json").read_text())
    assert {row["part"] for row in table["cpu"]["rows"]} >= {"gram", "solve", "views"}
    assert "cpu" not in json.loads((ROOT / "krrst_fast" / "measured.json").read_text())


def test_only_what_is_missing_is_made_and_a_killed_stage_goes_on(dry) -> None:
    out, rows = dry[0], dry[0] / ".parts.rows.json"
    (out / "parts.json").unlink()
    before = {
        name: (out / f"{name}.json").stat().st_mtime_ns for name in run.NAMES if name != "parts"
    }
    with subprocess.Popen(
        command("--dry-run", "--out", out, "parts"), env=ENVIRONMENT, stdout=subprocess.PIPE
    ) as child:
        end = time.monotonic() + 60
        while not (rows.exists() and len(json.loads(rows.read_text())["rows"]) >= 1):
            assert time.monotonic() < end and child.poll() is None
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=30)
    assert child.returncode == 143 and not (out / "parts.json").exists()
    kept = json.loads(rows.read_text())["rows"]
    assert kept

    if json.loads((out / "krr.json").read_text())["key"]["sources"] != run.machine.sources():
        pytest.skip("the code was changed while it was tested")
    assert script("--dry-run", "--out", out).returncode == 0
    for name, written in before.items():
        assert (out / f"{name}.json").stat().st_mtime_ns == written, name
    made = json.loads((out / "parts.json").read_text())["rows"]
    assert len(made) > len(kept) and not rows.exists()
    assert {name: made[name] for name in kept} == kept, "rows that were there are not made again"


def test_a_dry_run_is_not_published(dry, capsys: pytest.CaptureFixture) -> None:
    readme = (ROOT / "README.md").read_bytes()
    assert main.main(["report", "--publish", "--out", str(dry[0])]) == 2
    assert "a dry run on the CPU is not published" in capsys.readouterr().err
    assert (ROOT / "README.md").read_bytes() == readme


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["parts", "sideways"], "no stage 'sideways'"),
        (["--publish"], "--publish goes with report alone"),
        (["--out", __file__], "a file of that name exists"),
        (["--dry-run", "--images", "/nowhere"], "/nowhere: not an image store"),
        (["report", "--out", "/nowhere"], "/nowhere holds no results"),
    ],
)
def test_bad_options_give_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        code = main.main(arguments)
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and told in said and said.count("\n") == 1, said


@pytest.mark.parametrize("arguments", [["--python"], ["--python", "/nowhere"]])
def test_a_bad_interpreter_gives_one_line(arguments: list[str]) -> None:
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "--python" in done.stderr and done.stderr.count("\n") == 1


def test_without_a_gpu_nothing_begins(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run.machine, "other_gpu", lambda: None)
    assert main.main(["--out", str(tmp_path / "out")]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def _commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **codes: str) -> None:
    """Stages that are commands: some Python code each."""

    def made(code: str):
        def make(setting):
            arguments = [sys.executable, "-c", code]
            return commands.Command(arguments, os.environ, tmp_path, lambda c, w: {"row": {}})

        return make

    monkeypatch.setattr(run.machine, "sources", lambda: "the same")
    monkeypatch.setattr(run, "COMMANDS", {name: made(code) for name, code in codes.items()})
    monkeypatch.setattr(run, "STAGES", [run.Stage(name, 2.0, "") for name in codes])


def test_a_stage_that_fails_is_recorded_and_the_next_goes_on(tmp_path: Path, monkeypatch) -> None:
    codes = {
        "broken": "print('first', flush=True); raise RuntimeError('it broke')",
        "slow": "import time; time.sleep(60)",
        "good": "open('ran', 'a').write('x')",
    }
    _commands(monkeypatch, tmp_path, **codes)
    monkeypatch.setattr(
        run, "STAGES", [run.Stage(name, 0.3 if name == "slow" else 20, "") for name in codes]
    )
    request = run.Request(out=tmp_path, dry_run=True, stages=tuple(codes))
    assert run.run(request) == 1
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in codes}
    assert found["broken"]["wrong"] == ["exit code 1"]
    assert "RuntimeError: it broke" in found["broken"]["words"][-1]
    assert found["slow"]["wrong"] == ["took longer than 0.3 s"] and not found["slow"]["finished"]
    assert found["good"]["wrong"] == [] and (tmp_path / "ran").read_text() == "x"
    # What had not ended is tried again, what had is not, and it is still wrong.
    assert run.run(request) == 1 and (tmp_path / "ran").read_text() == "x"
    assert run.run(run.Request(out=tmp_path, dry_run=True, stages=("good",))) == 0
    again = run.Request(out=tmp_path, dry_run=True, stages=("good",), again=True)
    assert run.run(again) == 0 and (tmp_path / "ran").read_text() == "xx"


def test_when_the_time_is_over_nothing_more_begins(tmp_path: Path, monkeypatch, capsys) -> None:
    _commands(monkeypatch, tmp_path, first="", second="")
    monkeypatch.setattr(run, "TOTAL", 0.0)
    request = run.Request(out=tmp_path, dry_run=True, stages=("first", "second"))
    assert run.run(request) == 1 and not list(tmp_path.glob("*.json"))
    assert capsys.readouterr().out.count("call again to go on") == 2
    monkeypatch.setattr(run, "TOTAL", 60.0)
    assert run.run(request) == 0 and len(list(tmp_path.glob("*.json"))) == 2


def test_what_takes_the_process_with_it_is_left_out(tmp_path: Path, monkeypatch) -> None:
    """A stage of three rows, the second of which ends its process: the third is made."""
    calls = []

    def spawn(arguments, **_):
        calls.append(json.loads(arguments[-1]))
        stage = notes.Notes(run.notes_path(tmp_path, "parts"), calls[-1]["key"])
        stage.trying = []
        stage.row("first", lambda: {"ms": len(calls)})
        if "second: cuda" not in stage.broken:
            stage.trying = ["second", "second: cuda"]
            stage.save()
            return process.Ended(-11, "ended by SIGSEGV", 0.1)
        stage.row("second", lambda: {"left out": stage.broken["second: cuda"]})
        stage.row("third", lambda: {})
        return process.Ended(0, "", 0.1)

    monkeypatch.setattr(run, "spawn", spawn)
    request = run.Request(out=tmp_path, dry_run=True, stages=("parts",))
    assert run.run(request) == 0 and len(calls) == 2
    rows = json.loads((tmp_path / "parts.json").read_text())["rows"]
    assert rows == {
        "first": {"ms": 1},
        "second": {"left out": "left out: ended by SIGSEGV"},
        "third": {},
    }


def test_a_stage_that_always_dies_is_not_started_for_ever(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def spawn(arguments, **_):
        calls.append(arguments)
        stage = notes.Notes(run.notes_path(tmp_path, "krr"), json.loads(arguments[-1])["key"])
        stage.trying = [f"row {len(calls)}"]
        stage.save()
        return process.Ended(None, "silent for 60 s", 0.1)

    monkeypatch.setattr(run, "spawn", spawn)
    assert run.run(run.Request(out=tmp_path, dry_run=True, stages=("krr",))) == 1
    assert len(calls) == run.RESTARTS
    assert json.loads((tmp_path / "krr.json").read_text())["wrong"] == ["silent for 60 s"]


def test_a_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    ended = process.spawn(
        [sys.executable, "-c", code], log=log, cwd=tmp_path, env=os.environ, seconds=1.5
    )
    assert ended.code is None and ended.why == "took longer than 1.5 s" and ended.seconds < 20
    state = Path(f"/proc/{int(log.read_text())}/stat")
    end = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the grandchild lives"
        time.sleep(0.01)


def test_rows_of_other_code_are_thrown_away_and_no_row_begins_late(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    first = notes.Notes(path, KEY)
    first.row("a", lambda: {"ms": 1})
    assert notes.Notes(path, KEY).rows == {"a": {"ms": 1}}
    assert notes.Notes(path, {"commit": "d"}).rows == {}
    late = notes.Notes(path, KEY, deadline=time.monotonic() - 1)
    late.row("a", lambda: pytest.fail("it is there"))
    with pytest.raises(notes.OutOfTime, match="after 1 rows, before b"):
        late.row("b", dict)


def test_what_pytest_says_is_counted() -> None:
    words = """collected 12 items / 7 deselected / 5 selected

tests/test_a.py::test_one[gpu] PASSED                    [ 20%]
tests/test_a.py::test_two[3-a b] FAILED                  [ 40%]
tests/test_b.py::test_three SKIPPED (no triton)          [ 60%]
FAILED tests/test_a.py::test_two[3-a b] - assert 1 == 2
ERROR tests/test_c.py - ModuleNotFoundError: No module named 'x'
collected 2 items
tests/test_d.py::test_four PASSED                        [100%]
"""
    row = commands.outcomes(1, words)
    assert row["outcomes"] == {"passed": 2, "failed": 1, "skipped": 1} and row["collected"] == 7
    assert row["wrong"] == ["tests/test_a.py::test_two[3-a b]", "tests/test_c.py"]
    assert commands.outcomes(None, "")["wrong"] == []
    assert commands.outcomes(3, "")["wrong"] == ["pytest ended with exit code 3"]


def test_a_build_for_a_gpu_is_for_that_gpu_alone(tmp_path: Path) -> None:
    gpu = {"target": "9.0a"}
    made = commands.build(commands.Setting(tmp_path, {}, gpu))
    assert made.env["TORCH_CUDA_ARCH_LIST"] == "9.0a" and made.env["KRRST_FAST_CUDA"] == "1"
    assert made.rows(1, "")["build"]["wrong"] == ["it does not build"]
    assert {path.name for path in commands.gpu_test_files()} >= {
        "test_gpu_cholesky.py",
        "test_kernels_gram.py",
    }


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
    ours = cifar.make(cifar.TOY, cifar.noise(8, 20), "cpu", slots=1, online_steps=9)
    other = cifar.make(cifar.TOY, cifar.noise(8, 20), "cpu", slots=1, online_steps=9)
    theirs = released.ReleasedStep(
        *(other.state.pool.slots[0].network, other.target.model),
        *(other.state.x_syn, other.state.y_syn, ours.state.optimizer.param_groups[0]["lr"]),
        step.SGD,
    )
    before = [x.detach().clone() for x in (ours.state.x_syn, ours.state.y_syn)]
    step.our_step(ours, step.drawer(ours, 8), step.Marks("cpu"))
    step.released_step(theirs, step.drawer(other, 8), step.Marks("cpu"))
    state = ours.state
    for mine, their in ((state.x_syn, theirs.x_syn), (state.y_syn, theirs.y_syn)):
        assert clock.error_of(mine.grad, their.grad) < 1e-3 > clock.error_of(mine, their)
        assert clock.error_of(mine, before.pop(0)) > 1e-4, "it was a step"
    networks = (ours.state.pool.slots[0].network, theirs.network)
    for mine, their in zip(*(network.parameters() for network in networks)):
        assert torch.allclose(mine, their, rtol=1e-3, atol=1e-5)
