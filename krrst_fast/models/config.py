"""Settings of a network."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from krrst_fast.runs.config import require, settle

Norm = Literal["batch", "instance", "none"]
Stem = Literal["small", "imagenet"]
ResNetKind = Literal["resnet10", "resnet18", "resnet50"]
StackedKind = Literal["vgg11", "alexnet"]
Kind = Literal["convnet", "mobilenet"] | ResNetKind | StackedKind
KINDS: tuple[str, ...] = ("convnet", *get_args(ResNetKind), *get_args(StackedKind), "mobilenet")

SPEC = re.compile(r"(?P<place>[^:]+(?::[^:]+)*):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
"""A network of the user's code: `module:Name` or `file.py:Name`."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a network."""

    kind: str = "convnet"
    """convnet, resnet10, resnet18, resnet50, vgg11, alexnet or mobilenet; or a network of your own,
    module:Class or file.py:Class, with embed(x) and forward(x) (see docs/networks.md)."""
    features: str | None = None
    """Layer of your own network whose input is the feature, such as fc; null takes embed(x)."""
    widths: tuple[int, ...] = (128, 256, 512)
    """Channels of each block of a convnet; the others have theirs fixed."""
    norm: Norm = "batch"
    """Normalisation of a convnet; the others use batch norm."""
    stem: Stem = "small"
    """First layer of a resnet: 3x3 with stride 1 for small images, or 7x7 with a max-pool."""

    def __post_init__(self) -> None:
        settle(self)
        known = self.kind in KINDS or SPEC.fullmatch(self.kind) is not None
        need = f"one of {', '.join(KINDS)}, or your own as module:Class or file.py:Class"
        require(known, self, "kind", need)
        layer = self.features is None or (self.is_own and self.features != "")
        require(layer, self, "features", "a layer of a network of your own, else null")
        require(len(self.widths) > 0, self, "widths", "at least one number of channels")
        require(min(self.widths) > 0, self, "widths", "positive")

    @property
    def is_own(self) -> bool:
        """Return whether the network is of the user's code, which building it runs."""
        return self.kind not in KINDS

    def identity(self) -> dict[str, str]:
        """Return what tells the user's code from other versions of it; nothing if built in.

        Raises:
            ConfigError: The code cannot be loaded, or its file was edited since it was.
        """
        if not self.is_own:
            return {}
        # Here, as it imports torch, which the settings do without.
        from krrst_fast.models.source import find

        return {"network": find(self.kind).identity()}
