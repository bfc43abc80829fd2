"""What normalises the images that networks are pre-trained on, and those they are tested on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from krrst_fast.baselines import random_subset
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.evaluate import EvaluateConfig
from krrst_fast.evaluate.config import METHODS
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.models import ModelConfig, build
from krrst_fast.targets import FrozenTarget

NETWORK = ModelConfig(widths=(4, 8))


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """A set of 20 real digits and its target, evaluated on the images it was drawn from."""
    store = prepare(PrepareConfig(source="digits", out=tmp_path / "digits", size=8, limit=60))
    target = FrozenTarget(
        model=build(NETWORK, image_size=8, num_outputs=6, seed=5),
        config=NETWORK,
        num_outputs=6,
        mean=store.mean,
        std=store.std,
        image_size=8,
    )
    target.save(tmp_path / "target.safetensors")
    (tmp_path / "run").mkdir()
    random_subset(store, target, 20, seed=0).save(tmp_path / "run" / "distilled.safetensors")
    return EvaluateConfig(
        run=tmp_path / "run",
        store=store.path,
        source=store.path,
        target=tmp_path / "target.safetensors",
        model=NETWORK,
        device="cpu",
    )


def test_raw_images_are_used_as_they_are_and_real_ones_normalised(config: EvaluateConfig) -> None:
    chosen = load_distilled(config.run)
    raw = replace(chosen, mean=(0.0,) * 3, std=(1.0,) * 3)
    raw.save(config.run / "distilled.safetensors")
    materials = open_materials(config)
    assert (materials.mean, materials.std) == (chosen.mean, chosen.std)
    assert materials.mean_std("distilled") == (materials.store.mean, materials.store.std)


def test_each_transfer_set_is_normalised_by_itself(config: EvaluateConfig, tmp_path: Path) -> None:
    pixels = open_store(config.store).images("train").permute(0, 2, 3, 1).numpy()
    (tmp_path / "darker").mkdir()
    for split in ("train", "test"):
        labels = np.arange(len(pixels)) % 3
        np.savez(tmp_path / "darker" / f"{split}.npz", images=pixels // 4, labels=labels)
    other = prepare(PrepareConfig(source=str(tmp_path / "darker"), out=tmp_path / "other", size=8))
    own, moved = open_materials(config), open_materials(replace(config, store=other.path))
    for method in METHODS:
        assert own.mean_std(method) == (own.store.mean, own.store.std)
        assert moved.mean_std(method) == (other.mean, other.std) != (moved.mean, moved.std)


def test_sets_of_other_projects_keep_their_normalisation(config: EvaluateConfig) -> None:
    theirs = replace(load_distilled(config.run), mean=(0.5,) * 3, std=(0.25,) * 3)
    theirs.meta["method"] = "imported from dc"
    theirs.save(config.run / "distilled.safetensors")
    materials = open_materials(config)
    assert materials.mean_std("distilled") == (theirs.mean, theirs.std)
