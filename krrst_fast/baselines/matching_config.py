"""Settings of DM, DC and DSA. Without torch: the command line reads them at once."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from krrst_fast.baselines.learner_config import LearnerConfig
from krrst_fast.models.config import ModelConfig
from krrst_fast.runs.config import require, require_at_least, require_positive

Family = Literal["color", "crop", "cutout", "flip", "scale", "rotate"]
"""A family of transformations of the siamese augmentation."""
FAMILIES: tuple[Family, ...] = get_args(Family)


def _published_network() -> ModelConfig:
    """Return the network of the publications: three blocks of 128 channels with instance norm."""
    return ModelConfig(widths=(128, 128, 128), norm="instance")


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(LearnerConfig):
    """Settings that distribution matching and gradient matching share."""

    images_per_class: int
    batch_size: int = 256
    """Real images of each class in a step; all of a class that has fewer."""
    lr: float
    """The rate of SGD on the images."""
    momentum: float = 0.5
    """Of SGD on the images."""
    init_images: Literal["real", "noise"]
    """What the images start as: random real ones of each class, or normal noise with the mean and
    the standard deviation of the real pixels."""
    model: ModelConfig = field(default_factory=_published_network)
    """The networks, without batch norm: batches are of one class each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "images_per_class", "batch_size")
        require_positive(self, "lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DMConfig(MatchingConfig):
    """Distribution matching (Zhao and Bilen 2023, arXiv 2110.04181).

    The defaults are those of the released code (VICO-UoE/DatasetCondensation, main_DM.py).
    """

    steps: int = 20_000
    """Each has a fresh network."""
    lr: float = 1.0
    """The rate of SGD on the images; 10 is published for 100 and more images per class."""
    init_images: Literal["real", "noise"] = "real"
    augment: tuple[Family, ...] = FAMILIES
    """Families of the differentiable siamese augmentation; [] for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_families(self, least=0)


@dataclass(frozen=True, kw_only=True)
class DCConfig(MatchingConfig):
    """Gradient matching (Zhao, Mopuri and Bilen 2021, arXiv 2006.05929).

    The defaults are those of the released code (VICO-UoE/DatasetCondensation, main.py).
    """

    steps: int = 10_000
    """Updates of the images. Published are 1,000 networks with `updates` each: 1,000 steps for 1
    image per class, 10,000 for 10, 50,000 for 50."""
    lr: float = 0.1
    init_images: Literal["real", "noise"] = "noise"
    updates: int | None = None
    """Updates of the images with a network before a fresh one takes its place. null for as many as
    images per class, 50 at most, as published."""
    epochs: int | None = None
    """Epochs that the network is trained on the images between two updates. null for the published
    1, 50, 25, 20, 15, 10 for 1, 10, 20, 30, 40, 50 images per class, and linear between."""
    network_lr: float = 0.01
    """The rate of SGD on a network, which has no momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("updates", "epochs"):
            if getattr(self, name) is not None:
                require_at_least(1, self, name)
        require_positive(self, "network_lr")


@dataclass(frozen=True, kw_only=True)
class DSAConfig(DCConfig):
    """Gradient matching with siamese augmentation (Zhao and Bilen 2021, arXiv 2102.08259).

    The defaults are those of the released code, as those of DC.
    """

    init_images: Literal["real", "noise"] = "real"
    augment: tuple[Family, ...] = FAMILIES
    """Families of the differentiable siamese augmentation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_families(self, least=1)


def _require_families(config: DMConfig | DSAConfig, *, least: int) -> None:
    """Raise ConfigError unless `augment` has different families, and at least `least`."""
    families = config.augment
    require(len(set(families)) == len(families), config, "augment", "given once each")
    require(len(families) >= least, config, "augment", f"at least {least} family")
