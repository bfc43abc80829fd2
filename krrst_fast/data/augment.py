"""The views of a real batch: random crop after zero padding, and horizontal flip."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.config import require
from krrst_fast.ops.views import views


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """Which views an image has: (2 padding + 1)^2 crops, twice that with flips."""

    padding: int = 4
    """Zero pixels round the image that a crop may reach into."""
    flip: bool = True

    def __post_init__(self) -> None:
        require(self.padding >= 0, self, "padding", "at least 0")


def draw_views(batch: int, config: ViewConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one view for each image of a batch.

    Args:
        batch: number of images B.
        config: which views there are.
        generator: a CPU generator; the draw is the same for every device.

    Returns:
        offset int64 [B, 2] (dy, dx in 0..2 * padding) and flip bool [B], on the CPU.
    """
    offset = torch.randint(2 * config.padding + 1, (batch, 2), generator=generator)
    flip = torch.randint(2, (batch,), generator=generator).bool()
    return offset, flip if config.flip else torch.zeros_like(flip)


def plain_views(
    images: Tensor,
    index: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The images `index` [B] of uint8 [N, C, H, W], normalised and not augmented: [B, C, H, W]."""
    offset = index.new_zeros(len(index), 2)
    flip = torch.zeros_like(index, dtype=torch.bool)
    return views(images, index, offset, flip, padding=0, mean=mean, std=std, dtype=dtype)
