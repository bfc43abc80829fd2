"""Self-supervised pre-training of the target network, and the frozen result."""

from typing import TYPE_CHECKING

from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.targets.augment import (
        augment_pair,
    )
    from krrst_fast.targets.config import (
        SSLAugmentConfig,
        TargetConfig,
    )
    from krrst_fast.targets.encode import (
        encoder_target,
    )
    from krrst_fast.targets.frozen import (
        FrozenTarget,
        load_target,
    )
    from krrst_fast.targets.train import (
        train_target,
    )

__all__ = [
    "FrozenTarget",
    "SSLAugmentConfig",
    "TargetConfig",
    "augment_pair",
    "encoder_target",
    "load_target",
    "train_target",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.targets.augment": ("augment_pair",),
        "krrst_fast.targets.config": (
            "SSLAugmentConfig",
            "TargetConfig",
        ),
        "krrst_fast.targets.encode": ("encoder_target",),
        "krrst_fast.targets.frozen": (
            "FrozenTarget",
            "load_target",
        ),
        "krrst_fast.targets.train": ("train_target",),
    },
)
