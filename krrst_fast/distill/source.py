"""Where the real batches come from: shuffled epochs, random views, the target's outputs on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig, draw_views
from krrst_fast.ops.views import views
from krrst_fast.seeding import generator as seeded

Represent = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(index [B], offset [B, 2], flip [B], batch [B, C, H, W]) -> the target's outputs [B, P].

The first three name the views, so that outputs which were kept can be looked up; the batch holds
the views themselves.
"""


class Epochs:
    """An endless stream of image numbers in which each block of `count` holds every image once.

    It is a pure function of the seed and the position: there is no state to save. A batch may
    straddle two epochs, and one larger than the store holds every image about equally often.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, start: int, length: int) -> Tensor:
        """The image numbers at positions start .. start + length of the stream, [length] int64."""
        parts = []
        stop = start + length
        while start < stop:
            epoch, first = divmod(start, self.count)
            part = self._shuffled(epoch)[first : first + stop - start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            draw = seeded(self._seed, "epoch", epoch)
            self._order = torch.randperm(self.count, generator=draw)
        return self._order


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

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The batch of an outer step, each image in a random view.

        Returns:
            The normalised views [B, C, H, W] and the target's outputs on them [B, P].
        """
        device = self.images.device
        index = self.epochs.take(step * self.batch_size, self.batch_size).to(device)
        offset, flip = draw_views(self.batch_size, self.view, generator)
        offset, flip = offset.to(device), flip.to(device)
        batch = views(
            self.images,
            index,
            offset,
            flip,
            padding=self.view.padding,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )
        return batch, self.represent(index, offset, flip, batch).to(self.dtype)
