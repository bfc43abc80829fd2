"""Real batches: shuffled epochs, random views, and the outputs of the target on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig, draw_among, draw_views, render, sent
from krrst_fast.runs.epochs import Epochs

Represent = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(index [B], offset [B, 2], flip [B], batch [B, C, H, W]) -> the target's outputs [B, P].

The first three are a `View`, by which kept outputs can be looked up; the batch is its rendering.
"""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The real images, as bytes on the device, and how a batch is made of them."""

    images: Tensor
    """[N, C, H, W] uint8."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    view: ViewConfig
    represent: Represent
    epochs: Epochs
    batch_size: int
    dtype: torch.dtype = torch.float32
    kept: Tensor | None = None
    """The views that are drawn, [K, 3] on the CPU; None for all of `view`."""

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the batch of an outer step, each image in a random view.

        Returns:
            The normalised views [B, C, H, W] and the target's outputs on them [B, P].
        """
        index = self.epochs.take(step * self.batch_size, self.batch_size)
        index = sent(index, self.images.device)
        if self.kept is None:
            view = draw_views(index, self.view, generator)
        else:
            view = draw_among(index, self.kept, generator)
        batch = render(
            self.images,
            view,
            padding=self.view.padding,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )
        return batch, self.represent(*view, batch).to(self.dtype)
