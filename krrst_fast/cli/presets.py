"""Named runs: the settings of the paper, of a small run on digits, and of runs with an encoder.

A stage of a preset is a function that still needs the paths: `PRESETS["digits"].target(store=...,
out=...)` returns a TargetConfig. Settings that a preset does not name have the default of the
class, which is the paper's value for CIFAR-100.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from krrst_fast.data import PrepareConfig, ViewConfig
from krrst_fast.distill.config import DistillConfig, PoolConfig
from krrst_fast.evaluate import EvaluateConfig, FinetuneConfig, PretrainConfig, ProbeConfig
from krrst_fast.models import ModelConfig
from krrst_fast.targets import SSLAugmentConfig, TargetConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The four stages of a run."""

    prepare: partial[PrepareConfig]
    target: partial[TargetConfig]
    distill: partial[DistillConfig]
    evaluate: partial[EvaluateConfig]

    def settings(self, stage: str) -> Mapping[str, Any]:
        """Return the settings of one stage, by field."""
        return getattr(self, stage).keywords


def _paper(
    *,
    size: int,
    num_images: int,
    network: ModelConfig,
    lr: float,
    pretrain_steps: int,
    target: partial[TargetConfig],
    finetune_steps: int,
) -> Preset:
    """Return a run of the paper from the settings that differ between its runs.

    Args:
        network: Network of the pool, also pre-trained and transferred.
        pretrain_steps: 1000 epochs of the distilled set in batches of at most 256.
        finetune_steps: 10,000 where CIFAR or TinyImageNet is transferred to, else 5,000.
    """
    return Preset(
        prepare=partial(PrepareConfig, size=size),
        target=target,
        distill=partial(
            DistillConfig,
            num_images=num_images,
            lr=lr,
            pool=PoolConfig(model=network),
        ),
        evaluate=partial(
            EvaluateConfig,
            seeds=3,
            model=network,
            pretrain=PretrainConfig(steps=pretrain_steps),
            finetune=FinetuneConfig(steps=finetune_steps),
        ),
    )


def _barlow_resnet18(steps: int) -> partial[TargetConfig]:
    """Return the paper's target; steps and rate, which were not published, are ours."""
    return partial(
        TargetConfig,
        model=ModelConfig(kind="resnet18"),
        steps=steps,
        warmup_steps=steps // 100,
    )


_CIFAR100 = _paper(
    size=32,
    num_images=1000,
    network=ModelConfig(widths=(128, 256, 512)),
    lr=1e-4,
    pretrain_steps=4000,
    # 1000 epochs of 50,000 images.
    target=_barlow_resnet18(195_000),
    finetune_steps=10_000,
)

_TINYIMAGENET = _paper(
    size=64,
    num_images=2000,
    network=ModelConfig(widths=(64, 128, 256, 512)),
    lr=1e-5,
    pretrain_steps=8000,
    # 500 epochs of 100,000 images.
    target=_barlow_resnet18(195_000),
    finetune_steps=10_000,
)

_IMAGENET64 = _paper(
    size=64,
    num_images=1000,
    network=ModelConfig(widths=(64, 128, 256, 512)),
    lr=1e-5,
    pretrain_steps=4000,
    # 100 epochs of 1,281,167 images.
    target=_barlow_resnet18(500_000),
    finetune_steps=5000,
)

_IMAGENETTE224 = _paper(
    size=224,
    num_images=10,
    network=ModelConfig(widths=(32, 64, 128, 256, 512)),
    # Not published for this source: that of the other large images.
    lr=1e-5,
    pretrain_steps=1000,
    # The public weights of Barlow Twins on ImageNet, given by --weights, with their normalisation.
    target=partial(
        TargetConfig,
        model=ModelConfig(kind="resnet50", stem="imagenet"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    finetune_steps=5000,
)

# Minutes on two cores. Digits are never mirrored, and are told apart with a few labels a class.
_DIGITS = Preset(
    prepare=partial(PrepareConfig, size=16),
    target=partial(
        TargetConfig,
        model=ModelConfig(widths=(64, 128, 256)),
        num_outputs=64,
        steps=500,
        warmup_steps=20,
        # Nothing between the 64 outputs and the loss: what is distilled is what was trained.
        projector=(),
        # Else their variance is 0.08, too little to move the features that are pre-trained on them.
        standardize=True,
        augment=SSLAugmentConfig(
            scale=(0.5, 1.2),
            ratio=(0.8, 1.25),
            rotation=15.0,
            fill="zeros",
            flip=0.0,
            jitter=1.0,
            brightness=0.0,
            contrast=0.5,
            saturation=0.0,
            hue=0.0,
            greyscale=0.0,
            noise=0.05,
        ),
    ),
    distill=partial(
        DistillConfig,
        num_images=30,
        steps=1000,
        batch_size=256,
        lr=1e-2,
        views=ViewConfig(padding=1, flip=False),
        # Many networks: few steps and a small pool would fit the images to the networks in it.
        pool=PoolConfig(size=20, online_steps=100, model=ModelConfig(widths=(32, 64, 128))),
        checkpoint_every=100,
        log_every=5,
    ),
    evaluate=partial(
        EvaluateConfig,
        seeds=5,
        model=ModelConfig(widths=(32, 64, 128)),
        pretrain=PretrainConfig(steps=300),
        # The luck of two labels a class is most of the spread: average it within a seed.
        probe=ProbeConfig(solver="ridge", labels=(2,), label_draws=20),
        finetune=FinetuneConfig(
            steps=50, labels_per_class=2, views=ViewConfig(padding=1, flip=False)
        ),
    ),
)


def _encoder(
    *,
    limit: int | None,
    num_outputs: int,
    num_images: int,
    steps: int,
    batch_size: int,
    pool: PoolConfig,
    pretrain_steps: int,
) -> Preset:
    """Return a run on CIFAR-100 with a frozen encoder of ImageNet as the target.

    Only flips are drawn, for which the encoder runs twice on an image. The evaluation, by a ridge
    probe on CIFAR-10, has the rivals that a distilled set must beat; nothing is fine-tuned.
    """
    return Preset(
        prepare=partial(PrepareConfig, size=32, limit=limit),
        target=partial(
            TargetConfig, encoder="efficientnet_lite0", num_outputs=num_outputs, input_size=112
        ),
        distill=partial(
            DistillConfig,
            num_images=num_images,
            steps=steps,
            batch_size=batch_size,
            lr=1e-2,
            views=ViewConfig(padding=0),
            pool=pool,
        ),
        evaluate=partial(
            EvaluateConfig,
            seeds=4,
            methods=("none", "random_target", "random_early", "kmeans", "distilled"),
            model=pool.model,
            pretrain=PretrainConfig(steps=pretrain_steps),
            probe=ProbeConfig(solver="ridge", labels=(5, 50), label_draws=5),
            finetune=FinetuneConfig(steps=0),
        ),
    )


# Minutes on two cores: +3 points over real images (docs/results.md).
_CIFAR100_ENCODER = _encoder(
    limit=10_000,
    num_outputs=64,
    num_images=100,
    steps=2500,
    batch_size=128,
    pool=PoolConfig(size=20, online_steps=100, model=ModelConfig(widths=(16, 32, 64))),
    pretrain_steps=1000,
)

# The same on all images with the network, the size and the pre-training of the paper, for a GPU. It
# has not been run.
_CIFAR100_ENCODER_1000 = _encoder(
    limit=None,
    num_outputs=256,
    num_images=1000,
    steps=20_000,
    batch_size=1024,
    pool=PoolConfig(size=20, online_steps=1000, model=ModelConfig(widths=(128, 256, 512))),
    pretrain_steps=4000,
)

PRESETS: Mapping[str, Preset] = {
    "cifar100": _CIFAR100,
    "tinyimagenet": _TINYIMAGENET,
    "imagenet64": _IMAGENET64,
    "imagenette224": _IMAGENETTE224,
    "digits": _DIGITS,
    "cifar100-encoder": _CIFAR100_ENCODER,
    "cifar100-encoder-1000": _CIFAR100_ENCODER_1000,
}
