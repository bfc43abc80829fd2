"""Runs of learnt baselines: their folder, exact resume, what they refuse, and the command."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krrst_fast.baselines.dm import DM
from krrst_fast.baselines.gradient_matching import GradientMatching
from krrst_fast.baselines.learn import learn
from krrst_fast.baselines.matching_config import DMConfig, DSAConfig
from krrst_fast.baselines.registry import METHODS
from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.files import read_json, read_jsonl
from krrst_fast.runs.interrupt import Interrupted

pytest.importorskip("docstring_parser")

MODEL = ModelConfig(widths=(4, 8), norm="instance")


@pytest.fixture
def config(tiny_store: Path, tmp_path: Path) -> DMConfig:
    return DMConfig(
        store=tiny_store,
        out=tmp_path / "run",
        images_per_class=2,
        init_images="noise",
        steps=7,
        batch_size=8,
        model=MODEL,
        checkpoint_every=2,
        log_every=3,
    )


class Stop(BaseException):
    """Ends a run at a chosen place, as a kill would."""


def _before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    real = DM.advance

    def advance(self: DM) -> dict[str, float]:
        if self.step + 1 == step:
            act()
        return real(self)

    monkeypatch.setattr(DM, "advance", advance)


def _stop() -> None:
    raise Stop


def test_a_run_leaves_its_files_and_returns_its_result(config: DMConfig) -> None:
    made = learn(config, DM, progress=False)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "distilled.safetensors",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
    ]
    saved = load_distilled(config.out)
    assert torch.equal(saved.images, made.images) and torch.equal(saved.targets, made.targets)
    assert saved.meta == made.meta
    assert saved.meta["method"] == "dm" and saved.meta["step"] == "7"
    assert saved.meta["label_kind"] == "class" and "out" not in json.loads(saved.meta["config"])
    assert read_json(config.out / "config.json")["method"] == "dm"
    assert [row["step"] for row in read_jsonl(config.out / "metrics.jsonl")] == [3, 6, 7]
    summary = read_json(config.out / "summary.json")
    assert summary["steps"] == 7 and summary["steps_per_second"] > 0


@pytest.mark.parametrize("step", [1, 2, 6])
def test_a_killed_run_goes_on_to_the_same_bits(
    config: DMConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole = learn(replace(config, out=tmp_path / "whole"), DM, progress=False)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _before_step(patch, step, _stop)
        learn(config, DM, progress=False)
    assert not (config.out / "distilled.safetensors").exists()
    resumed = learn(config, DM, resume=True, progress=False)
    assert torch.equal(resumed.images, whole.images) and resumed.meta == whole.meta
    steps = [row["step"] for row in read_jsonl(config.out / "metrics.jsonl")]
    assert steps == [3, 6, 7]


def test_a_signal_is_answered_by_a_checkpoint(
    config: DMConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, default_signals: None
) -> None:
    config = replace(config, checkpoint_every=100)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 4 of 7, which is"):
        _before_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        learn(config, DM, progress=False)
    with monkeypatch.context() as patch:
        # The first three steps are not taken again.
        _before_step(patch, 3, _stop)
        resumed = learn(config, DM, resume=True, progress=False)
    whole = learn(replace(config, out=tmp_path / "whole"), DM, progress=False)
    assert torch.equal(resumed.images, whole.images)


def test_a_finished_run_gives_its_result_and_makes_no_learner(config: DMConfig) -> None:
    made = learn(config, DM, progress=False)

    def make(config: DMConfig) -> DM:
        raise AssertionError

    again = learn(replace(config, log_every=1), make, resume=True, progress=False)
    assert torch.equal(again.images, made.images)


def test_another_run_is_not_gone_on_with(
    config: DMConfig, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _before_step(patch, 4, _stop)
        learn(config, DM, progress=False)
    before = (config.out / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match="lr was 1.0 and is 0.2"):
        learn(replace(config, lr=0.2), DM, resume=True, progress=False)
    other = DSAConfig(store=tiny_store, out=config.out, images_per_class=2, model=MODEL)
    with pytest.raises(CheckpointError, match="other settings"):
        learn(other, GradientMatching, resume=True, progress=False)
    with pytest.raises(ConfigError, match="not empty; --resume goes on"):
        learn(config, DM, progress=False)
    assert (config.out / "checkpoint.pt").read_bytes() == before


def test_the_command_names_the_method_of_the_run_in_the_folder(
    config: DMConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _before_step(patch, 2, _stop)
        learn(config, DM, progress=False)
    words = f"--store {config.store} --out {config.out} --images_per_class 2 --resume"
    assert main(["baseline", "dsa", *words.split()]) == 2
    assert "of a run of dm; resume it by that method" in capsys.readouterr().err
    assert main(["baseline", "dm", *words.split()]) == 2
    assert "other settings: steps was 7 and is 20000" in capsys.readouterr().err


def test_a_store_without_labels_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "plain.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    prepare(PrepareConfig(source=str(tmp_path / "plain.npz"), out=tmp_path / "plain", size=8))
    for method in METHODS:
        if method != "mkdt":  # looks at no labels
            words = f"--store {tmp_path / 'plain'} --out {tmp_path / 'run'} --images_per_class 1"
            assert main(["baseline", method, *words.split()]) == 2
            said = capsys.readouterr().err
            assert "labels" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_made_leaves_no_folder(config: DMConfig) -> None:
    with pytest.raises(DataError, match="100 images of each class"):
        wrong = replace(config, images_per_class=100, init_images="real")
        learn(wrong, DM, progress=False)
    assert not config.out.exists()


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before_it(
    config: DMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DM.advance

    def advance(self: DM) -> dict[str, float]:
        row = real(self)
        return {**row, "loss": float("nan")} if self.step == 5 else row

    monkeypatch.setattr(DM, "advance", advance)
    with pytest.raises(NonFiniteError, match="dm: the loss is nan at step 5"):
        learn(config, DM, progress=False)
    monkeypatch.undo()
    assert torch.isfinite(learn(config, DM, resume=True, progress=False).images).all()


_SMALL: dict[str, str] = {
    **dict.fromkeys(("kip", "frepo", "dm", "dc", "dsa"), "--images_per_class 1 --batch_size 8"),
    "mtt": "--images_per_class 1 --student_steps 2 --experts.count 1 --expert_epochs 1 "
    "--max_start_epoch 1 --lr_images 1 --lr_rate 0",
    "mkdt": "--num_images 4 --student_steps 2 --experts.count 1 --expert_epochs 1 "
    "--max_start_epoch 1 --lr_images 1 --lr_rate 0 --target {target}",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_the_command_and_goes_on_to_the_same_bits(
    method: str,
    tiny_store: Path,
    tiny_target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def words(out: str) -> list[str]:
        small = _SMALL[method].format(target=tiny_target)
        network = "" if method == "kip" else " --model.widths 4,8"
        every = f"--store {tiny_store} --out {tmp_path / out} --steps 4 --checkpoint_every 2"
        return ["baseline", method, *f"{every} {small}{network} --log_every 2 --quiet".split()]

    assert main(words("whole")) == 0
    said = capsys.readouterr().out
    assert "images with" in said and f"--rivals {method}=" in said and "loss at the end" in said
    module, name = METHODS[method].learner.split(":")
    learner: Any = getattr(import_module(module), name)
    real = learner.advance

    def advance(self: Any) -> dict[str, float]:
        if self.step == 3:
            raise Stop
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(learner, "advance", advance)
        main(words("killed"))
    assert main(words("killed")) == 2
    assert "--resume goes on with the run in it" in capsys.readouterr().err
    assert main([*words("killed"), "--resume"]) == 0
    one, other = (load_distilled(tmp_path / out) for out in ("whole", "killed"))
    assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
    assert one.meta["method"] == method and one.meta["step"] == "4"
    capsys.readouterr()
    assert main(["info", str(tmp_path / "whole")]) == 0
    about = " ".join(capsys.readouterr().out.split())
    assert f"kind learnt baseline method {method} saved the result, after 4 steps" in about
