"""Named runs: they are whole, they are the paper's, and their networks have the paper's sizes."""

from pathlib import Path

import pytest

from krrst_fast.cli.presets import PRESETS
from krrst_fast.distill.cache_plan import LARGEST, is_cached
from krrst_fast.models import build
from krrst_fast.runs.config import from_dict, to_dict

PATHS = {"store": Path("store"), "target": Path("target"), "out": Path("out")}

# source: image, images, pool widths, D, outer rate, pre-training steps, fine-tuning steps
PAPER = {
    "cifar100": (32, 1000, (128, 256, 512), 8192, 1e-4, 4000, 10_000),
    "tinyimagenet": (64, 2000, (64, 128, 256, 512), 8192, 1e-5, 8000, 10_000),
    "imagenet64": (64, 1000, (64, 128, 256, 512), 8192, 1e-5, 4000, 5000),
    "imagenette224": (224, 10, (32, 64, 128, 256, 512), 25_088, 1e-5, 1000, 5000),
}


# limit, P, M, pool widths, B, steps, T, pre-training steps
ENCODER = {
    "cifar100-encoder": (10_000, 64, 100, (16, 32, 64), 128, 2500, 100, 1000),
    "cifar100-encoder-1000": (None, 256, 1000, (128, 256, 512), 1024, 20_000, 1000, 4000),
}


def test_names() -> None:
    assert set(PRESETS) == {*PAPER, *ENCODER, "digits"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_stage_is_whole_and_survives_its_file(name: str) -> None:
    preset = PRESETS[name]
    configs = (
        preset.prepare(source="x", out=Path("out")),
        preset.target(store=Path("store"), out=Path("out")),
        preset.distill(**PATHS),
        preset.evaluate(run=Path("out"), store=Path("store")),
    )
    for config in configs:
        assert from_dict(type(config), to_dict(config)) == config
    for stage, config in zip(("prepare", "target", "distill", "evaluate"), configs):
        for field, value in preset.settings(stage).items():
            assert getattr(config, field) == value


@pytest.mark.parametrize("name", PAPER)
def test_paper_settings(name: str) -> None:
    size, num_images, widths, features, lr, pretrain_steps, finetune_steps = PAPER[name]
    preset = PRESETS[name]
    assert preset.prepare(source="x", out=Path("out")).size == size
    distill = preset.distill(**PATHS)
    assert (distill.num_images, distill.steps, distill.batch_size) == (num_images, 160_000, 1024)
    assert (distill.lr, distill.final_lr_fraction) == (lr, 1e-3)
    assert (distill.ridge, distill.ridge_of) == (1e-6, "trace")
    assert (distill.views.padding, distill.views.flip) == (4, True)
    pool = distill.pool
    assert (pool.size, pool.online_steps, pool.reset) == (10, 1000, "paper")
    assert (pool.lr, pool.momentum, pool.weight_decay) == (0.1, 0.9, 1e-3)
    assert pool.model.widths == widths and pool.model.norm == "batch"
    assert build(pool.model, image_size=size, num_outputs=0, seed=0).feature_dim == features

    evaluate = preset.evaluate(run=Path("out"), store=Path("store"))
    assert evaluate.seeds == 3 and evaluate.model == pool.model
    pretrain, probe, finetune = evaluate.pretrain, evaluate.probe, evaluate.finetune
    # 1000 epochs: batches of 256, the last one as small as it comes.
    assert pretrain.steps == pretrain_steps == 1000 * -(-num_images // pretrain.batch_size)
    assert (pretrain.lr, pretrain.momentum, pretrain.weight_decay) == (0.1, 0.9, 1e-3)
    assert (probe.solver, probe.steps, probe.batch_size, probe.lr) == ("sgd", 5000, 512, 0.2)
    assert (finetune.steps, finetune.batch_size) == (finetune_steps, 256)
    assert (finetune.lr, finetune.weight_decay) == (0.01, 5e-4)


@pytest.mark.parametrize("name, outputs", [("cifar100", 512), ("imagenette224", 2048)])
def test_target_has_the_papers_outputs(name: str, outputs: int) -> None:
    config = PRESETS[name].target(store=Path("store"), out=Path("out"))
    size = PRESETS[name].prepare(source="x", out=Path("out")).size
    network = build(config.model, image_size=size, num_outputs=config.num_outputs, seed=0)
    assert (config.num_outputs or network.feature_dim) == outputs
    assert config.loss == "barlow_twins"


@pytest.mark.parametrize("name", ENCODER)
def test_encoder_settings(name: str) -> None:
    limit, outputs, num_images, widths, batch_size, steps, online_steps, pretrain = ENCODER[name]
    preset = PRESETS[name]
    prepare = preset.prepare(source="x", out=Path("out"))
    assert (prepare.size, prepare.limit) == (32, limit)
    target = preset.target(store=Path("store"), out=Path("out"))
    assert (target.encoder, target.input_size) == ("efficientnet_lite0", 112)
    assert target.num_outputs == outputs and not target.standardize
    distill = preset.distill(**PATHS)
    assert (distill.num_images, distill.batch_size, distill.steps) == (
        num_images,
        batch_size,
        steps,
    )
    assert (distill.lr, distill.lr_targets) == (1e-2, None)
    assert (distill.views.padding, distill.views.flip) == (0, True)
    assert (distill.pool.size, distill.pool.online_steps) == (20, online_steps)
    # The outputs of the encoder are kept without a flag that says so.
    assert is_cached(distill, prepare.limit or 50_000, outputs)
    assert outputs * 2 * (prepare.limit or 50_000) * 4 < LARGEST
    evaluate = preset.evaluate(run=Path("out"), store=Path("store"))
    assert evaluate.model == distill.pool.model and distill.pool.model.widths == widths
    assert evaluate.pretrain.steps == pretrain and evaluate.seeds == 4
    assert {"none", "random_target", "random_early", "kmeans", "distilled"} == {*evaluate.methods}
    assert evaluate.probe.solver == "ridge" and evaluate.finetune.steps == 0


def test_digits_are_never_mirrored() -> None:
    digits = PRESETS["digits"]
    assert digits.target(store=Path("s"), out=Path("o")).augment.flip == 0
    assert digits.distill(**PATHS).views.flip is False
