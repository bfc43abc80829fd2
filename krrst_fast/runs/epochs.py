"""The order in which a run reads its images."""

import torch
from torch import Tensor

from krrst_fast.runs.seeding import generator


class Epochs:
    """An endless stream of image numbers in which each block of `count` holds every image once.

    It is a pure function of seed, name and position, so a resumed run needs no state of it.

    Args:
        count: Number of images.
        seed: Seed of the shuffling.
        name: Name of the random stream; streams of other names are independent.
    """

    def __init__(self, count: int, seed: int, name: str = "epoch") -> None:
        self.count = count
        self._seed, self._name = seed, name
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def take(self, start: int, length: int) -> Tensor:
        """Return the image numbers at positions start .. start + length, [length] int64.

        A batch may straddle epochs, and one larger than the store holds every image about equally
        often.
        """
        parts = []
        stop = start + length
        while start < stop:
            epoch, first = divmod(start, self.count)
            part = self._shuffled(epoch)[first : first + stop - start]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole_batch(self, step: int, length: int) -> Tensor:
        """Return batch number `step` where each epoch leaves out its last, partial batch."""
        epoch, place = divmod(step, self.count // length)
        return self.take(epoch * self.count + place * length, length)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            draw = generator(self._seed, self._name, epoch)
            self._order = torch.randperm(self.count, generator=draw)
        return self._order
