"""A signal ends an evaluation at once; the trials that are finished are kept, and said to be."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from krrst_fast.baselines import random_subset
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.verify import Verification
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    run,
    trial,
    tuning,
)
from krrst_fast.models import ModelConfig
from krrst_fast.runs.files import read_jsonl
from krrst_fast.runs.interrupt import SIGNALS, Interrupted
from krrst_fast.targets import load_target

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of random images with labels in both splits."""
    folder, draw = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    for split in ("train", "test"):
        images, labels = draw.integers(0, 256, (24, 8, 8, 3), np.uint8), np.arange(24) % 3
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
    return prepare(PrepareConfig(source=str(folder), out=folder / "store", size=8)).path


@pytest.fixture
def config(store: Path, tiny_target: Path, tmp_path: Path) -> EvaluateConfig:
    """Four trials of a run whose distilled set is a random subset."""
    folder = tmp_path / "run"
    folder.mkdir()
    made = random_subset(open_store(store), load_target(tiny_target), 6, seed=0)
    made.save(folder / "distilled.safetensors")
    paths = {"store": str(store), "target": str(tiny_target)}
    (folder / "config.json").write_text(json.dumps(paths))
    return EvaluateConfig(
        run=folder,
        store=store,
        name="x",
        methods=("none", "distilled"),
        seeds=2,
        model=ModelConfig(widths=(4, 8)),
        pretrain=PretrainConfig(steps=2),
        probe=ProbeConfig(solver="ridge"),
        finetune=FinetuneConfig(steps=2, batch_size=8),
        device="cpu",
    )


def _send_in_call(monkeypatch, owner, name: str, number: int, call: int) -> None:
    """Send this process a signal at the start of a call."""
    real, calls = getattr(owner, name), iter(range(call))

    def sending(*args, **options):
        if next(calls, None) is None:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, sending)


def _figures(rows: list[dict]) -> list[tuple]:
    return [tuple(value for key, value in row.items() if key != "seconds") for row in rows]


def _rows(config: EvaluateConfig) -> list[tuple]:
    return _figures(json.loads((config.run / "evaluation" / "x.json").read_text())["rows"])


# what gets the signal, in which of its calls, and how many trials are kept
PLACES: dict[str, tuple[object, str, int, int]] = {
    "the first trial": (trial, "settle_norms", 0, 0),
    "a pre-training": (trial, "pretrain", 0, 1),
    "a probe": (trial, "probe_accuracy", 3, 2),
    "a fine-tuning": (tuning, "finetune", 3, 3),
    "the check of the store": (Verification, "finish", 4, 2),
    "the writing of a row": (run, "append_jsonl", 2, 3),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", SIGNALS[:2])
def test_a_signal_keeps_the_trials_that_are_finished(config, monkeypatch, number, place):
    owner, name, call, kept = PLACES[place]
    evaluate(config, progress=False)
    whole = _rows(config)
    (config.run / "evaluation" / "x.json").unlink()
    where = f", kept in {config.run / 'evaluation'}" if kept else ""
    with monkeypatch.context() as patch:
        _send_in_call(patch, owner, name, number, call)
        message = f"{number.name} with {kept} of 4 trials finished{where}$"
        with pytest.raises(Interrupted, match=message):
            evaluate(config, progress=False)
    partial = config.run / "evaluation" / "x.partial.jsonl"
    assert _figures(read_jsonl(partial)) == whole[:kept]
    assert partial.exists() == bool(kept)
    ran: list[object] = []
    with monkeypatch.context() as patch:
        real: Callable[..., object] = trial.Trials.run
        patch.setattr(trial.Trials, "run", lambda *args: (ran.append(args), real(*args))[1])
        evaluate(config, progress=False)
    assert len(ran) == 4 - kept and _rows(config) == whole


def test_the_command_says_what_is_kept_and_how_to_go_on(config):
    """Once the first row is written, the command is sent SIGTERM; the same command then ends."""
    words = ["evaluate", config.run, "--store", config.store]
    words += ["--name", "x", "--methods", "[none,distilled]", "--seeds", 1, "--device", "cpu"]
    words += ["--model.widths", "[4,8]", "--probe.solver", "ridge", "--finetune.steps", 0]
    command = [sys.executable, "-m", "krrst_fast", *map(str, words), "--pretrain.steps"]
    partial = config.run / "evaluation" / "x.partial.jsonl"
    with subprocess.Popen([*command, "100000"], stderr=subprocess.PIPE, text=True) as process:
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    last = told.strip().splitlines()[-1]
    assert last == (
        "krrst: error: interrupted by SIGTERM with 1 of 2 trials finished, kept in "
        f"{config.run / 'evaluation'}; the same command goes on"
    )
    assert len(read_jsonl(partial)) == 1
