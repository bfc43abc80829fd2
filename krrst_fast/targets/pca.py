"""Principal components of features, as the linear head of an encoder."""

import torch
from torch import Tensor, nn

from krrst_fast.errors import ConfigError, DataError

_CHUNK = 4096


def check_components(count: int, width: int, num_outputs: int) -> None:
    """Raise ConfigError if `count` images of `width` features have not so many components."""
    if num_outputs > min(width, count - 1):
        raise ConfigError(
            f"target: num_outputs must be at most the {width} features of the encoder and fewer "
            f"than the {count} images, got {num_outputs}"
        )


def pca_head(features: Tensor, num_outputs: int) -> tuple[nn.Linear, float]:
    """Fit a head whose outputs on `features` are principal components, of one overall scale.

    Their mean is 0, and their variances, with the ratios that the components have, average 1: a
    network that learns them spends its effort as the features spend theirs. (Scaled one by one
    they transferred worse, see docs/encoders.md.) Computed in float64 from sums over rows.

    Args:
        features: [N, D], which may be memory-mapped.
        num_outputs: P, the components with the largest variances; 0 keeps all D features, as they
            are up to shift and scale.

    Returns:
        The head, float32 [P, D], and the part of the variance of the features that it keeps.

    Raises:
        ConfigError: P is more than D, or than N - 1.
        DataError: All features are constant.
    """
    (count, width), kept = features.shape, num_outputs
    check_components(count, width, kept)
    mean = sum(part.double().sum(0) for part in features.split(_CHUNK)) / count
    assert isinstance(mean, Tensor)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for part in features.split(_CHUNK):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / count)
    total = float(covariance.trace())
    if total <= 1e-12 * float(mean.square().sum()) or total == 0:
        raise DataError("target: the features of all images are the same")
    if kept:
        variances, vectors = torch.linalg.eigh(covariance)
        components = vectors[:, -kept:].flip(1).T  # [P, D], largest first
        # An eigenvector has either sign: the largest entry is made positive.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        components = components * largest.sign()
        explained = float(variances[-kept:].clamp(min=0).sum())
    else:
        components, explained = torch.eye(width, dtype=torch.float64), total
    weight = components / (explained / len(components)) ** 0.5
    head = nn.Linear(width, len(components))
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(-(weight @ mean))
    return head.requires_grad_(False), explained / total
