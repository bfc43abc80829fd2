"""Real batches: shuffled epochs, random views, and the outputs of the target on them."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from krrst_fast.data.augment import View, ViewConfig, draw_among, draw_views, render, sent
from krrst_fast.runs.epochs import Epochs


class Represent(Protocol):
    """Gives the outputs of a target on views, in two parts: what needs the CPU, and the rest."""

    def find(self, view: View) -> Tensor:
        """Return what the views alone tell of their outputs, [B, ...] on the CPU.

        Its shape and dtype depend on the shape of the batch only.
        """

    def __call__(self, found: Tensor, batch: Tensor) -> Tensor:
        """Return the outputs [B, P] on rendered views [B, C, H, W]; `found` is on their device."""


class Choice(NamedTuple):
    """The views of a batch and what `Represent.find` says of them, on one device."""

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    """As of `View`, like the next two."""
    offset: Tensor
    flip: Tensor
    found: Tensor

    def to(self, device: torch.device) -> "Choice":
        """Return it on a device, sent from pinned memory where that is a GPU: nothing waits."""
        if device.type == "cuda":
            return Choice(*(sent(part.pin_memory(), device) for part in self))
        return Choice(*(part.to(device) for part in self))


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
        return self.batch(self.choose(step, generator).to(self.images.device))

    def choose(self, step: int, generator: torch.Generator) -> Choice:
        """Draw the views of an outer step, on the CPU."""
        index = self.epochs.take(step * self.batch_size, self.batch_size)
        if self.kept is None:
            view = draw_views(index, self.view, generator)
        else:
            view = draw_among(index, self.kept, generator)
        return Choice(*view, self.represent.find(view))

    def batch(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return the views [B, C, H, W] and the outputs [B, P] of a choice, on the device."""
        batch = render(
            self.images,
            View(*choice[:3]),
            padding=self.view.padding,
            mean=self.mean,
            std=self.std,
            dtype=self.dtype,
        )
        return batch, self.represent(choice.found, batch).to(self.dtype)
