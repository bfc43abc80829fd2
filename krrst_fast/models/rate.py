"""The rate above which gradient descent on a network's head diverges."""

import copy

import torch
from torch import Tensor

from krrst_fast.models.network import Network
from krrst_fast.runs.seeding import seeded

SAFETY = 0.5
"""Share of the largest rate that the head alone could bear: the layers below need some of it."""
_IMAGES = 256


def stable_rate(
    network: Network, images: Tensor, *, num_outputs: int, rate: float, momentum: float
) -> float:
    """Return `rate`, or a lower one if the head of this untrained network could not bear it.

    In the weights of the head, the loss mean((W f + b - y)^2) over M images and P outputs has the
    curvature 2 / (M P) F F^T, with a column of ones in F [M, D]. Descent with momentum beta
    diverges above 2 (1 + beta) over its largest eigenvalue (Polyak, 1964), which grows as D / P:
    the published rate of 0.1, of 512 outputs, is too high for 64 outputs of 8,192 features. The
    loss then explodes within ten steps and may come back, with features that are worth nothing.

    Args:
        network: The network, untrained; it is not changed.
        images: Images it is to be trained on [M, C, H, W]; the first 256 are looked at.
        num_outputs: P.
        rate: The rate that is wanted.
        momentum: Momentum beta of the descent.

    Returns:
        At most `rate`; a lower one has two significant digits.
    """
    trial = copy.deepcopy(
        network
    ).train()  # as in training, batch norm takes the images' statistics
    with torch.no_grad(), seeded(0, images.device):
        features = trial.embed(images[:_IMAGES]).cpu().double()  # MPS has no float64
    gram = features @ features.mT + 1
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    curvature = 2 * largest / (len(features) * num_outputs)
    most = SAFETY * 2 * (1 + momentum) / curvature
    # NaN compares as false: features that are not finite are found by the training.
    return float(f"{most:.1e}") if most < rate else rate
