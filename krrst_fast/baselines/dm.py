"""DM: dataset condensation with distribution matching (Zhao and Bilen 2023, arXiv 2110.04181)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from krrst_fast.baselines.image_learner import (
    ImageLearner,
    MatchingConfig,
    published_network,
    require_families,
)
from krrst_fast.baselines.siamese import FAMILIES, Family
from krrst_fast.models import ModelConfig, Network


@dataclass(frozen=True, kw_only=True)
class DMConfig(MatchingConfig):
    """Distribution matching. The defaults are those of the released code."""

    steps: int = 20_000
    """Each is of a new network."""
    lr: float = 1.0
    """The rate of SGD on the images; published for up to 50 images per class, and 10 for 100 and
    more on CIFAR-10."""
    init_images: Literal["real", "noise"] = "real"
    augment: tuple[Family, ...] = FAMILIES
    """Families of the differentiable siamese augmentation; none for no augmentation."""
    model: ModelConfig = field(default_factory=published_network)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_families(self, least=0)


class DM(ImageLearner):
    """Images whose mean features in random untrained networks are those of the real images.

    A step is: a new network; for each class the squared distance between the mean features of its
    synthetic images and of a batch of its real ones, both augmented alike; the sum over classes
    goes down by SGD on the images.

    Args:
        config: The settings.
    """

    def __init__(self, config: DMConfig) -> None:
        super().__init__(config, method="dm", augment=config.augment)

    def distance(self, network: Network, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """Return the squared distance between mean features; the label plays no part."""
        return mean_distance(network, synthetic, real)


def mean_distance(network: Network, synthetic: Tensor, real: Tensor) -> Tensor:
    """Return the squared distance between mean features, with a graph to the synthetic images.

    Args:
        network: Gives the features.
        synthetic: [M, C, H, W].
        real: [B, C, H, W].
    """
    with torch.no_grad():
        wanted = network.embed(real).mean(0)  # [D]
    return (network.embed(synthetic).mean(0) - wanted).square().sum()
