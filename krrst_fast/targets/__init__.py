"""Self-supervised pre-training of the target network, and the frozen result."""

from krrst_fast.targets.augment import SSLAugmentConfig, augment_pair
from krrst_fast.targets.config import TargetConfig
from krrst_fast.targets.encode import encoder_target
from krrst_fast.targets.frozen import FrozenTarget, load_target
from krrst_fast.targets.train import train_target

__all__ = [
    "FrozenTarget",
    "SSLAugmentConfig",
    "TargetConfig",
    "augment_pair",
    "encoder_target",
    "load_target",
    "train_target",
]
