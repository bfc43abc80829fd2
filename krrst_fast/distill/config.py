"""Every setting of a distillation. The defaults are the paper's for CIFAR-100."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from krrst_fast.config import require
from krrst_fast.data.augment import ViewConfig
from krrst_fast.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The networks whose features the outer loss sees, and how they are trained between visits."""

    size: int = 10
    """How many networks are alive at once."""
    online_steps: int = 1000
    """SGD steps a network gets before a fresh one takes its slot (the paper's T)."""
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    reset: Literal["paper", "released"] = "paper"
    """"paper": a fresh network is trained like the one before it. "released": once a slot has been
    renewed it is renewed at every visit, so nearly all outer steps see an untrained network."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        require(self.size >= 1, self, "size", "at least 1")
        require(self.online_steps >= 2, self, "online_steps", "at least 2")
        require(self.lr > 0, self, "lr", "positive")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        require(self.weight_decay >= 0, self, "weight_decay", "0 or more")
        require(self.reset in ("paper", "released"), self, "reset", "paper or released")


_CHOICES = {
    "ridge_of": ("trace", "mean_diagonal", "absolute"),
    "image_space": ("normalized", "raw"),
    "init_images": ("real", "noise"),
    "init_targets": ("target", "random"),
    "dtype": ("float32", "float64"),
    "target_cache": ("auto", "on", "off"),
}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One distillation: from a store and a target to a run folder."""

    store: Path
    """A folder made by `krrst prepare`; its train split is distilled, labels are not looked at."""
    target: Path
    """A folder made by `krrst target`, or the file in it."""
    out: Path
    """The run folder."""
    num_images: int
    """How many synthetic images (M)."""
    steps: int = 160_000
    batch_size: int = 1024
    """Real images in an outer step (B). May be larger than the store: batches run through the
    shuffled store again and again, so such a batch holds an image more than once."""
    lr: float = 1e-4
    """The rate of AdamW on the images and the targets; it decays linearly."""
    final_lr_fraction: float = 1e-3
    """What is left of `lr` at the end."""
    ridge: float = 1e-6
    ridge_of: Literal["trace", "mean_diagonal", "absolute"] = "trace"
    """What `ridge` is a multiple of."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """The augmentation of the real batch."""
    target_cache: Literal["auto", "on", "off"] = "auto"
    """Whether the target runs once on every view of every image, beforehand, and not at every step.
    "auto": if its outputs take at most 1 GiB and the steps would run it on more images."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    image_space: Literal["normalized", "raw"] = "normalized"
    """"raw": the images start as pixels in [0, 1], which the networks then see as they are, while
    the real batch is normalised; so does the released code."""
    init_images: Literal["real", "noise"] = "real"
    """"noise": normal, with the mean and standard deviation of the real pixels."""
    init_targets: Literal["target", "random"] = "target"
    """"target": the target's outputs on the first images. "random": normal, with the mean and
    standard deviation of its outputs on real ones."""
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int = 2000
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "batch_size", "checkpoint_every", "log_every"):
            require(getattr(self, name) >= 1, self, name, "at least 1")
        require(self.lr > 0, self, "lr", "positive")
        require(0 < self.final_lr_fraction <= 1, self, "final_lr_fraction", "in (0, 1]")
        require(self.ridge > 0, self, "ridge", "positive")
        for name, choices in _CHOICES.items():
            require(getattr(self, name) in choices, self, name, " or ".join(choices))
