"""The views of real images: random crop after zero padding, and horizontal flip."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.data.config import ViewConfig
from krrst_fast.ops.views import views


class View(NamedTuple):
    """One view of each image of a batch; all three on one device."""

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """The images, int64 [B]."""
    offset: Tensor
    """The upper left corner (dy, dx) of each crop, from 0 to 2 * padding: int64 [B, 2]."""
    flip: Tensor
    """bool [B]."""


def draw_views(index: Tensor, config: ViewConfig, generator: torch.Generator) -> View:
    """Draw a random view of each image of a batch.

    Args:
        index: The images, int64 [B].
        config: The possible views.
        generator: A CPU generator; the draw is the same for every device.
    """
    offset = torch.randint(2 * config.padding + 1, (len(index), 2), generator=generator)
    flip = torch.randint(2, (len(index),), generator=generator).bool()
    flip = flip if config.flip else torch.zeros_like(flip)
    return View(index, offset.to(index.device), flip.to(index.device))


def render(
    images: Tensor,
    view: View,
    *,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the normalised views [B, C, H, W] of uint8 `images` [N, C, H, W]."""
    return views(images, *view, padding=padding, mean=mean, std=std, dtype=dtype)


def plain_views(
    images: Tensor, index: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return the images `index` [B] of uint8 [N, C, H, W] without augmentation, normalised."""
    plain = View(index, index.new_zeros(len(index), 2), torch.zeros_like(index, dtype=torch.bool))
    return render(images, plain, padding=0, mean=mean, std=std)
