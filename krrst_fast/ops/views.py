"""Augmented views of a batch from packed uint8 pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from krrst_fast.backends import tuned


def views(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    *,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Crop after zero padding, flip and normalise a batch of images, in one pass.

    Equivalent to padding the images `index` with `padding` zero pixels on every side, cropping each
    at its offset, mirroring it horizontally where `flip` is set, and `(pixel / 255 - mean) / std`,
    computed in float32.

    Args:
        images: uint8 [N, C, H, W].
        index: int64 [B], rows of `images`; a row may occur several times.
        offset: int64 [B, 2], the upper left corner (dy, dx) of each crop, from 0 to 2 * padding;
            (padding, padding) is the image itself.
        flip: Bool [B].
        padding: Zero pixels on each side.
        mean: C numbers, in units where a pixel is in [0, 1].
        std: C numbers above zero, in the same units.
        dtype: Dtype of the result.

    Returns:
        [B, C, H, W] of `dtype`, on the device of `images`.

    Raises:
        TypeError: A tensor has another dtype.
        ValueError: A shape, a device, an index or an offset is not as above.
    """
    _check_types(images, index, offset, flip, dtype)
    _check_shapes(images, index, offset, flip)
    _check_numbers(images, padding, mean, std)
    if images.device.type == "cpu":
        _check_ranges(len(images), index, offset, padding)
    out = tuned.views(
        images, index, offset, flip, padding, list(map(float, mean)), list(map(float, std))
    )
    return out.to(dtype)


def _check_types(
    images: Tensor, index: Tensor, offset: Tensor, flip: Tensor, dtype: torch.dtype
) -> None:
    got = images.dtype, index.dtype, offset.dtype, flip.dtype
    if got != (torch.uint8, torch.int64, torch.int64, torch.bool):
        raise TypeError(
            "views: images, index, offset and flip must be uint8, int64, int64 and bool, "
            f"got {', '.join(str(dtype).removeprefix('torch.') for dtype in got)}"
        )
    if not dtype.is_floating_point:
        raise TypeError(f"views: dtype must be floating point, got {dtype}")


def _check_shapes(images: Tensor, index: Tensor, offset: Tensor, flip: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (images, index, offset, flip)]
    batch = index.numel()
    if images.ndim != 4 or shapes[1:] != [(batch,), (batch, 2), (batch,)]:
        raise ValueError(
            "views: images, index, offset and flip must be [N, C, H, W], [B], [B, 2] and [B], "
            f"got {', '.join(map(str, shapes))}"
        )
    devices = {str(tensor.device) for tensor in (images, index, offset, flip)}
    if len(devices) > 1:
        raise ValueError(f"views: all tensors must be on one device, got {sorted(devices)}")


def _check_numbers(
    images: Tensor, padding: int, mean: Sequence[float], std: Sequence[float]
) -> None:
    if padding < 0:
        raise ValueError(f"views: padding must not be negative, got {padding}")
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"views: mean and std must have one number for each of {channels} channels, "
            f"got {len(mean)} and {len(std)}"
        )
    if not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
        raise ValueError(
            f"views: mean must be finite and std above zero, got {list(mean)} and {list(std)}"
        )


def _check_ranges(count: int, index: Tensor, offset: Tensor, padding: int) -> None:
    """Check values; not on a GPU, where it would wait: bad indices assert or give NaN."""
    if index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"views: index must be from 0 to {count - 1}, got {low} to {high}")
    low, high = (int(value) for value in offset.aminmax())
    if low < 0 or high > 2 * padding:
        raise ValueError(f"views: offset must be from 0 to {2 * padding}, got {low} to {high}")
