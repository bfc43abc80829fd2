"""The views of real images: random crop after zero padding, and horizontal flip."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.data.config import ViewConfig
from krrst_fast.errors import ConfigError
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
    return View(index, sent(offset, index.device), sent(flip, index.device))


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to a device, and do not wait for what the device has still to do."""
    return x.to(device, non_blocking=device.type == "cuda")


def kept_views(config: ViewConfig, count: int) -> Tensor:
    """Choose `count` of the possible views: int64 [count, 3], rows (dy, dx, flip).

    The first is the image itself; the others are always the same.

    Raises:
        ConfigError: There are not more views than that.
    """
    total = (2 * config.padding + 1) ** 2 * (2 if config.flip else 1)
    if not 1 <= count < total:
        raise ConfigError(
            f"views: padding {config.padding} and flip {config.flip} make {total} views, of which "
            f"1 to {total - 1} can be chosen, got {count}"
        )
    every = all_views(config)
    plain = (every == torch.tensor([config.padding, config.padding, 0])).all(1)
    order = torch.randperm(total - 1, generator=torch.Generator().manual_seed(0))
    return torch.cat((every[plain], every[~plain][order[: count - 1]]))


def all_views(config: ViewConfig) -> Tensor:
    """Return every possible view: int64 [V, 3], rows (dy, dx, flip), the last changing fastest."""
    side = torch.arange(2 * config.padding + 1)
    return torch.cartesian_prod(side, side, torch.arange(2 if config.flip else 1))


def draw_among(index: Tensor, kept: Tensor, generator: torch.Generator) -> View:
    """Draw one of the views `kept` [K, 3], on the CPU, for each image `index` [B]."""
    drawn = kept[torch.randint(len(kept), (len(index),), generator=generator)]
    drawn = sent(drawn, index.device)
    return View(index, drawn[:, :2].contiguous(), drawn[:, 2].bool())


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
