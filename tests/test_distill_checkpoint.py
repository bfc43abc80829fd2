"""Runs that are killed with SIGKILL, anywhere, go on to the bits of one that was not.

One program imports everything once and forks a child for each life of a run, before it computes
anything itself; so thirty lives cost little more than their own steps.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from krrst_fast.data import open_store
from krrst_fast.distill import DistillConfig, PoolConfig, outer_step
from krrst_fast.distill.start import initial_set, make_source, make_state
from krrst_fast.distill.step import LinearDecay
from krrst_fast.errors import CheckpointError
from krrst_fast.runs.checkpoint import cut_metrics, load_checkpoint, require_same_run
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.files import append_jsonl, read_jsonl
from krrst_fast.runs.tensors import load_state, save_state
from krrst_fast.targets import load_target

PROGRAM = """
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
import torch._dynamo  # what the first optimiser would import, in every child
import safetensors.torch
from krrst_fast.runs import files, log, tensors
from krrst_fast.data import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill, loop
from krrst_fast.models import ModelConfig

torch.set_num_threads(1)
store, target, folder = map(Path, sys.argv[1:])


def config(out):
    pool = PoolConfig(size=2, online_steps=5, model=ModelConfig(widths=(4, 8)))
    return DistillConfig(
        store=store, target=target, out=out, num_images=6, steps=24, batch_size=16, lr=0.01,
        views=ViewConfig(padding=2), pool=pool, checkpoint_every=4, log_every=1,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(module, name, at, half=None):
    '''The process dies in call number `at` of the function `name`, perhaps half way through.'''
    real, calls = getattr(module, name), iter(range(at))

    def call(*args, **options):
        if next(calls, None) is None:
            if half:
                half(*args)
            die()
        return real(*args, **options)

    setattr(module, name, call)


def half_a_row(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row)[:25])


def half_a_file(state, sink):
    sink.write(b"half a checkpoint")


def live(out, prepare_death=None, after=None):
    '''One life: True if it ended by itself.'''
    child = os.fork()
    if child == 0:
        try:
            if prepare_death:
                prepare_death()
            distill(config(out), resume=True, progress=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0, f"{out}: a life ended with an error"
    return True


def readable(out):
    path = out / "checkpoint.pt"
    return tensors.load_state(path)["state"]["step"] if path.exists() else -1


began = time.perf_counter()
assert live(folder / "whole")
whole_seconds = time.perf_counter() - began

PLACES = {
    # Between the temporary file and its name: of the first files, of checkpoints, of the result.
    **{f"rename-{n}": (lambda n=n: dying(os, "replace", n)) for n in (0, 3, 4, 6, 12)},
    # In the middle of writing a checkpoint.
    **{f"write-{n}": (lambda n=n: dying(torch, "save", n, half_a_file)) for n in (0, 3)},
    # In the middle of a row of the log, and between a row and the checkpoint after it.
    **{f"row-{n}": (lambda n=n: dying(log, "append_jsonl", n, half_a_row)) for n in (0, 9)},
    "before-checkpoint": lambda: dying(loop, "save_checkpoint", 3),
    "after-summary": lambda: dying(loop, "as_distilled", 0),
}
steps = {}
for name, place in PLACES.items():
    assert not live(folder / name, place), f"{name}: was not killed"
    steps[name] = readable(folder / name)
    assert live(folder / name)

# By the clock, again and again, until the run is through. Lives grow longer, lest on a machine that
# became slower none of them reaches the next checkpoint.
draw = random.Random(0)
for number in range(2):
    out = folder / f"clock-{number}"
    lives = 1
    while not live(out, after=draw.uniform(0.1, 0.8) * whole_seconds * 1.2**lives):
        readable(out)
        lives += 1
        assert lives < 40
    assert live(out)
print(json.dumps(steps))
"""


def _content(path: Path) -> list[dict]:
    """The rows without what the clock and the machine say."""
    measured = ("seconds", "images_per_second", "peak_memory_mb")
    return [{k: v for k, v in row.items() if k not in measured} for row in read_jsonl(path)]


@pytest.fixture(scope="module")
def killed(tiny_store, tiny_target, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", PROGRAM, str(tiny_store), str(tiny_target), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_every_killed_run_ends_in_the_same_bits(killed):
    folder, _ = killed
    runs = sorted(path for path in folder.iterdir() if path.name != "whole")
    assert len(runs) == 13
    for name in ("distilled.safetensors", "initial.safetensors"):
        expected = (folder / "whole" / name).read_bytes()
        for run in runs:
            assert (run / name).read_bytes() == expected, run.name


def test_every_killed_run_has_each_row_of_the_log_once(killed):
    folder, _ = killed
    expected = _content(folder / "whole" / "metrics.jsonl")
    assert [row["step"] for row in expected] == list(range(1, 25))
    for run in folder.iterdir():
        assert _content(run / "metrics.jsonl") == expected, run.name


def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(killed):
    """Where each run stood after its death: -1 is before its first checkpoint."""
    _, steps = killed
    assert steps == {
        "rename-0": -1,
        "rename-3": -1,
        "rename-4": 0,
        "rename-6": 4,
        "rename-12": 24,
        "write-0": -1,
        "write-3": 8,
        "row-0": 0,
        "row-9": 8,
        "before-checkpoint": 8,
        "after-summary": 24,
    }


def test_killed_runs_leave_no_litter(killed):
    folder, _ = killed
    expected = sorted(path.name for path in (folder / "whole").iterdir())
    for run in folder.iterdir():
        assert sorted(path.name for path in run.iterdir()) == expected, run.name


def test_rows_after_the_checkpoint_and_half_rows_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 0)
    assert path.read_text() == ""
    for step in (2, 4, 6):
        append_jsonl(path, {"step": step, "loss": 0.1 + step})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    with pytest.warns(UserWarning, match="the last line, 15 bytes, was cut short.*; 3 rows are"):
        cut_metrics(path, 4)
    assert path.read_text().count("\n") == 2
    assert read_jsonl(path) == [{"step": 2, "loss": 2.1}, {"step": 4, "loss": 4.1}]


def test_what_is_no_checkpoint_of_this_version_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    here = Path()
    config = DistillConfig(store=here, target=here, out=here, num_images=1, pool=PoolConfig())
    for content, message in (
        ({"format_version": 99}, "format version 99, this version of krrst_fast reads 1"),
        ({"weights": torch.zeros(2)}, "format version None"),
        ([1, 2], "holds a list, not a checkpoint"),
    ):
        save_state(path, content) if isinstance(content, dict) else torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path, config, ())
    path.unlink()
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        load_checkpoint(path, config, ())
    with pytest.raises(CheckpointError, match="does not hold the settings of a run"):
        require_same_run(path, ["not", "settings"], config, ())
    with pytest.raises(CheckpointError, match="pool.size was None and is 10"):
        require_same_run(path, {}, config, ("store", "target", "out"))


def test_a_checkpoint_names_the_run_it_is_of(killed):
    folder, _ = killed
    saved = load_state(folder / "whole" / "checkpoint.pt")
    assert saved["config"] == json.loads((folder / "whole" / "config.json").read_text())
    assert len(saved["config_hash"]) == 16
    assert saved["totals"]["seconds"] > 0 and saved["state"]["step"] == 24


def test_going_on_from_a_state_leaves_it_as_it_was(killed):
    folder, _ = killed
    path = folder / "whole" / "checkpoint.pt"
    values = load_state(path)
    config = from_dict(DistillConfig, values["config"])
    store, target = open_store(config.store), load_target(config.target)
    cpu = torch.device("cpu")
    state = make_state(config, initial_set(config, store, target), cpu)
    saved = values["state"]
    state.load_state_dict(saved)
    source, rate = make_source(config, store, target, cpu), LinearDecay(start=1, final=1, steps=1)
    for _ in range(4):
        outer_step(state, source, rate, ridge=1e-3, ridge_of="trace")
    before = load_state(path)["state"]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for number, kept in before["optimizer"]["state"].items():
            assert torch.equal(saved["optimizer"]["state"][number][name], kept[name])
    for slot, kept in zip(saved["pool"], before["pool"], strict=True):
        for number, tensors in kept["optimizer"]["state"].items():
            momentum = slot["optimizer"]["state"][number]["momentum_buffer"]
            assert torch.equal(momentum, tensors["momentum_buffer"])
