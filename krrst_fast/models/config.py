"""Settings of a network."""

from dataclasses import dataclass
from typing import Literal

from krrst_fast.runs.config import require, require_choices

Norm = Literal["batch", "instance", "none"]
Stem = Literal["small", "imagenet"]
ResNetKind = Literal["resnet10", "resnet18", "resnet50"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a network."""

    kind: Literal["convnet", "resnet10", "resnet18", "resnet50"] = "convnet"
    widths: tuple[int, ...] = (128, 256, 512)
    """Channels of each block of a convnet; the others have theirs fixed."""
    norm: Norm = "batch"
    """Normalisation of a convnet; the others use batch norm."""
    stem: Stem = "small"
    """First layer of a resnet: 3x3 with stride 1 for small images, or 7x7 with a max-pool."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(len(self.widths) > 0, self, "widths", "at least one number of channels")
        require(min(self.widths) > 0, self, "widths", "positive")
