"""TensorBoard and Weights & Biases get the rows of metrics.jsonl, each once, and end no run.

The packages are the real ones, which `make install` brings.
"""

import dataclasses
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.checkpoint import cut_metrics
from krrst_fast.runs.files import append_jsonl, read_jsonl
from krrst_fast.runs.sinks import Sinks, require_sinks
from krrst_fast.targets import TargetConfig, train_target

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"lr": 0.1, "store": "images"}


@pytest.fixture(autouse=True)
def _own_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    yield
    if (wandb := sys.modules.get("wandb")) is not None:
        wandb.teardown()


def _row(step: int, loss: float | None = None) -> dict[str, float]:
    return {"step": step, "loss": 1 / step if loss is None else loss, "seconds": step / 8}


def _tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard itself finds in a run folder: (step, value) of each tag."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
    }


def _wandb(out: Path) -> list[dict[str, float]]:
    """Return the rows in the one file that `wandb sync` would send."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes a little longer than `finish`, and a program waits for it
    (path,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    rows = []
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append({"step": values["_step"], **values})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """Read wandb's file: a magic number, then records in blocks as LevelDB's log has them."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := -place % 32768) and left < 7:  # a header never straddles two blocks
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def _losses(rows: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize("killed_after, taken_up_at", [(0, 0), (7, 4), (4, 4), (3, 0)])
def test_after_a_kill_each_step_is_there_once(
    tmp_path: Path, killed_after: int, taken_up_at: int
) -> None:
    """The first process is never told to close, and what it sent after the checkpoint is cut."""
    metrics = tmp_path / "metrics.jsonl"
    first = Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=[])
    for step in range(1, killed_after + 1):
        append_jsonl(metrics, _row(step))
        first.write(_row(step))
    cut_metrics(metrics, taken_up_at)
    with Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=read_jsonl(metrics)) as sinks:
        for step in range(taken_up_at + 1, 10):
            append_jsonl(metrics, _row(step))
            sinks.write(_row(step))
    found = _tensorboard(tmp_path)
    expected = _losses(read_jsonl(metrics))
    assert [step for step, _ in found["loss"]] == list(range(1, 10))
    assert dict(found["loss"]) == pytest.approx(dict(expected))
    assert set(found) == {"loss", "seconds"}
    with first:
        pass


def test_rows_lie_in_the_file_at_once(tmp_path: Path) -> None:
    sinks = Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=[])
    for step in (1, 2):
        sinks.write(_row(step, math.nan if step == 2 else None))
        assert [s for s, _ in _tensorboard(tmp_path)["loss"]] == list(range(1, step + 1))
    with sinks:
        pass


def test_a_tensorboard_that_is_running_forgets_steps_that_were_cut(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=[])
    for step in (1, 2, 3):
        first.write(_row(step))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    assert [e.step for e in read.Reload().Scalars("loss")] == [1, 2, 3]
    (tmp_path / "tensorboard" / "mine.txt").touch()
    with Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=[_row(1, 5.0)]) as second:
        second.write(_row(2, 6.0))
    assert [(e.step, e.value) for e in read.Reload().Scalars("loss")] == [(1, 5.0), (2, 6.0)]
    # Nor does one that begins now see more; and a user's file is left.
    assert _tensorboard(tmp_path)["loss"] == [(1, 5.0), (2, 6.0)]
    assert (tmp_path / "tensorboard" / "mine.txt").exists()
    with first:
        pass


def test_wandb_is_offline_and_one_run_over_interruptions(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    rows = [_row(step) for step in range(1, 6)]
    with (
        pytest.raises(KeyboardInterrupt),
        Sinks(["wandb"], tmp_path, settings=SETTINGS, rows=[]) as sinks,
    ):
        for row in [*rows[:4], _row(5, 7.0)]:  # the last one is cut
            sinks.write(row)
        raise KeyboardInterrupt
    (before,) = (tmp_path / "wandb").glob("offline-run-*")
    with Sinks(["wandb"], tmp_path, settings=SETTINGS, rows=rows[:4]) as sinks:
        sinks.write(rows[4])
    (after,) = (tmp_path / "wandb").glob("offline-run-*")
    assert before.name.split("-")[-1] == after.name.split("-")[-1]
    assert _losses(_wandb(tmp_path)) == _losses(rows)
    assert capfd.readouterr() == ("", "")


def test_a_run_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    (tmp_path / "run").mkdir()
    mine = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    with Sinks(["wandb"], tmp_path / "run", settings=SETTINGS, rows=[]) as sinks:
        sinks.write(_row(1))
        mine.log({"own": 1.0})
    assert wandb.run is mine
    mine.log({"own": 2.0})
    mine.finish()
    assert _losses(_wandb(tmp_path / "run")) == [(1, 1.0)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_sink_that_cannot_begin_warns_once_and_the_other_goes_on(
    tmp_path: Path, name: str
) -> None:
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    (tmp_path / name).write_text("a file where the folder is to be")
    with pytest.warns(UserWarning, match=f"{name} gets no more rows.*metrics.jsonl") as found:
        sinks = Sinks([name], tmp_path, settings=SETTINGS, rows=[])
    with sinks:
        for step in (1, 2):
            sinks.write(_row(step))
    assert len(found) == 1


def test_a_sink_that_fails_later_warns_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    sinks = Sinks(["tensorboard"], tmp_path, settings=SETTINGS, rows=[])
    # A disk that is full from here on: the descriptor now leads to one.
    descriptor = sinks._open["tensorboard"]._writer._writer.fileno()  # type: ignore[attr-defined]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    os.close(full)
    with pytest.warns(UserWarning, match="No space left on device") as found, sinks:
        for step in (1, 2, 3):
            sinks.write(_row(step))
    assert len(found) == 1


def test_a_package_that_is_not_there_is_refused_before_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require_sinks([])
    (tmp_path / "krrst_nothing").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="krrst_nothing needs the package"):
        require_sinks(["krrst_nothing"])
    monkeypatch.setattr("krrst_fast.runs.sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"sinks: wandb .*pip install 'krrst-fast\[wandb\]'"):
        require_sinks(["wandb"])
    for name in ("store", "target"):
        (tmp_path / name).mkdir()
    words = ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    distill = ["--target", str(tmp_path / "target"), "--num_images", "3"]
    for command in (["target"], ["distill", *distill]):
        assert main([*command, *words, "--sinks", "tensorboard"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "pip install 'krrst-fast[tensorboard]'" in line
    assert not (tmp_path / "out").exists()


def test_sinks_of_a_target_that_is_not_trained_are_refused(tmp_path: Path) -> None:
    for other in ({"encoder": "net.pt"}, {"weights": tmp_path}):
        with pytest.raises(ConfigError, match="sinks must be left out where nothing is trained"):
            TargetConfig(store=tmp_path, out=tmp_path, sinks=("wandb",), **other)


KILLED = """
import os, signal, sys
from krrst_fast.cli.main import main
from krrst_fast.runs import log

real, rows = log.append_jsonl, []


def die(path, row):
    rows.append(real(path, row))
    if len(rows) == 7:
        os.kill(os.getpid(), signal.SIGKILL)


log.append_jsonl = die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_target_killed_and_resumed_with_both(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    prepare(PrepareConfig(source="digits", out=tmp_path / "store", size=8, limit=40))
    config = TargetConfig(
        store=tmp_path / "store",
        out=tmp_path / "plain",
        model=ModelConfig(widths=(4, 8)),
        num_outputs=6,
        steps=12,
        batch_size=16,
        projector=(12,),
        device="cpu",
        checkpoint_every=5,
        log_every=1,
    )
    train_target(config, progress=False)
    # The very settings of the run, and the file of them that it leaves.
    killed = dataclasses.replace(config, out=tmp_path / "run", sinks=("tensorboard", "wandb"))
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    values |= {"out": str(killed.out), "sinks": list(killed.sinks)}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    words = ["target", "--config", str(tmp_path / "run.yaml")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    train_target(killed, resume=True, progress=False)
    for name in ("plain", "run"):
        assert [row["step"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] == [
            *range(1, 13)
        ]
    rows = _losses(read_jsonl(killed.out / "metrics.jsonl"))
    found = _tensorboard(killed.out)["loss"]
    assert [step for step, _ in found] == list(range(1, 13))
    assert dict(found) == pytest.approx(dict(rows))
    assert _losses(_wandb(killed.out)) == rows
    made = [(tmp_path / name / "target.safetensors").read_bytes() for name in ("plain", "run")]
    assert made[0] == made[1]
