"""What a run is taken up with: the same images and target, in whatever folder they lie now."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import krrst_fast.distill.loop as loop
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.errors import CheckpointError, ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.tensors import load_state, save_state
from krrst_fast.targets import load_target


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=12,
        batch_size=16,
        lr=0.01,
        views=ViewConfig(padding=2),
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=5,
        log_every=3,
    )


class Stop(BaseException):
    """Ends a run at a chosen place, as a signal would."""


def _stop_at(monkeypatch, step: int, name: str = "outer_step") -> None:
    real, calls = getattr(loop, name), iter(range(step))

    def counted(*args, **options):
        if next(calls, None) is None:
            raise Stop
        return real(*args, **options)

    monkeypatch.setattr(loop, name, counted)


def _other_store(config: DistillConfig, folder: Path) -> Path:
    """One whose images differ from those of the run in the last pixel of the last image."""
    images = open_store(config.store).images().permute(0, 2, 3, 1).numpy().copy()
    images[-1, -1, -1, -1] ^= 1
    np.savez(folder / "other.npz", images=images)
    prepare(PrepareConfig(source=str(folder / "other.npz"), out=folder / "other", size=8))
    return folder / "other"


def _other_target(config: DistillConfig, folder: Path) -> Path:
    """One that differs from that of the run in the last bits of one weight."""
    target = load_target(config.target)
    next(target.model.parameters()).view(-1)[0].mul_(1 + 1e-6)
    target.save(folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize("name, make", [("store", _other_store), ("target", _other_target)])
@pytest.mark.parametrize("stopped", ["fit", "outer_step", "never"])
def test_another_input_under_a_run_is_noticed(config, tmp_path, monkeypatch, name, make, stopped):
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        if stopped == "fit":
            slot = "krrst_fast.distill.pool.Slot.fit"
            patch.setattr(slot, lambda self, x, y: (_ for _ in ()).throw(Stop()))
        if stopped == "outer_step":
            _stop_at(patch, 7)
        distill(config, progress=False)
    before = {path: path.read_bytes() for path in config.out.iterdir()}
    other = dataclasses.replace(config, **{name: make(config, tmp_path)})
    message = rf"\w+: the {name} has changed since this run began: it was [^;]+ and is [^;]+$"
    with pytest.raises(CheckpointError, match=message):
        distill(other, resume=True, progress=False)
    assert {path: path.read_bytes() for path in config.out.iterdir()} == before
    if stopped == "outer_step":
        (config.out / "initial.safetensors").unlink()
        with pytest.raises(CheckpointError, match="checkpoint.pt: the " + name):
            distill(other, resume=True, progress=False)


@pytest.mark.parametrize("step", [7, 99])
def test_a_run_goes_on_with_moved_inputs(config, tmp_path, monkeypatch, step):
    whole = distill(dataclasses.replace(config, out=tmp_path / "whole"), progress=False)
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        _stop_at(patch, step)
        distill(config, progress=False)
    shutil.copytree(config.store, tmp_path / "moved")
    shutil.copy(config.target, tmp_path / "moved.safetensors")
    moved = dataclasses.replace(
        config, store=tmp_path / "moved", target=tmp_path / "moved.safetensors"
    )
    result = distill(moved, resume=True, progress=False)
    assert torch.equal(result.images, whole.images) and result.meta == whole.meta


def test_a_run_of_relative_paths_is_one_of_every_directory(config, tmp_path, monkeypatch):
    shutil.copytree(config.store, tmp_path / "store")
    shutil.copy(config.target, tmp_path / "target.safetensors")
    here = dataclasses.replace(
        config, store=Path("store"), target=Path("target.safetensors"), out=Path("run")
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _stop_at(patch, 7)
        distill(here, progress=False)
    monkeypatch.chdir("elsewhere")
    found = from_dict(DistillConfig, json.loads(Path("../run/config.json").read_text()))
    assert distill(found, resume=True, progress=False).meta["step"] == "12"
    assert not Path("run").exists()
    monkeypatch.chdir(tmp_path)
    assert distill(here, resume=True, progress=False).meta["step"] == "12"


def test_a_target_of_another_image_size_is_refused(config, tmp_path):
    store = open_store(config.store)
    images = store.images().permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "images.npz", images=images)
    large = tmp_path / "large"
    prepare(PrepareConfig(source=str(tmp_path / "images.npz"), out=large, size=16))
    with pytest.raises(ConfigError, match=r"takes 3x8x8 images, the store .*large holds 3x16x16"):
        distill(dataclasses.replace(config, store=large), progress=False)


def test_a_checkpoint_without_identities_is_refused(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _stop_at(patch, 7)
        distill(config, progress=False)
    saved = load_state(config.out / "checkpoint.pt")
    del saved["inputs"]
    save_state(config.out / "checkpoint.pt", saved)
    with pytest.raises(CheckpointError, match="the store has changed since this run began: it was"):
        distill(config, resume=True, progress=False)
