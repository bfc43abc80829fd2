"""DM: dataset condensation with distribution matching (Zhao and Bilen 2023, arXiv 2110.04181)."""

import torch
from torch import Tensor

from krrst_fast.baselines.image_learner import ImageLearner
from krrst_fast.baselines.matching_config import DMConfig
from krrst_fast.models import Network


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
