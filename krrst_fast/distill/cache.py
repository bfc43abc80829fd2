"""The target's outputs on every view of every image, computed once instead of at every step.

Random crops and flips make finitely many views of an image, so the outputs of a frozen target on
them are a finite table, and looking them up is exact.
"""

import torch
from torch import Tensor

from krrst_fast.data.augment import View, ViewConfig, render
from krrst_fast.distill.config import DistillConfig
from krrst_fast.runs.progress import progress_bar
from krrst_fast.targets import FrozenTarget

LARGEST = 2**30
"""Bytes that a cache may take with the setting "auto"."""
CHUNK = 256


def is_cached(config: DistillConfig, count: int, dim: int) -> bool:
    """Return whether a run keeps a table of the target's outputs.

    Args:
        config: Settings of the run; "auto" keeps a small cache that costs less than it saves.
        count: N, the real images.
        dim: P, the outputs of the target.
    """
    if config.target_cache != "auto":
        return config.target_cache == "on"
    rows = count * views_per_image(config.views)
    return 4 * rows * dim <= LARGEST and rows < config.steps * config.batch_size


def views_per_image(view: ViewConfig) -> int:
    """Return how many views an image has."""
    return (2 * view.padding + 1) ** 2 * (2 if view.flip else 1)


class TargetCache:
    """Look up the outputs of the target (a `Represent` function).

    The table is filled in chunks that do not depend on where the run is, so a resumed run finds the
    same bits. They differ in the last bits from outputs computed on a batch, whose shape may make
    the target sum in another order.

    Args:
        target: Target network, on the device of `images`.
        images: [N, C, H, W] uint8.
        view: The possible views.
        dtype: Dtype of the views; the target takes them in float32.
        progress: Show a bar, where there is a terminal.
    """

    def __init__(
        self,
        target: FrozenTarget,
        images: Tensor,
        view: ViewConfig,
        dtype: torch.dtype = torch.float32,
        *,
        progress: bool = False,
    ) -> None:
        self._side = 2 * view.padding + 1
        self._flips = 2 if view.flip else 1
        rows = len(images) * views_per_image(view)
        self.outputs = torch.empty(rows, target.dim, device=images.device)
        """[N * views, P], the views of an image one after another."""
        with progress_bar(progress, total=rows, desc="target outputs", unit="view") as bar:
            for chunk in torch.arange(rows, device=images.device).split(CHUNK):
                batch = render(
                    images,
                    self._view(chunk),
                    padding=view.padding,
                    mean=target.mean,
                    std=target.std,
                    dtype=dtype,
                )
                self.outputs[chunk] = target(batch.float())
                bar.update(len(chunk))

    def __call__(self, index: Tensor, offset: Tensor, flip: Tensor, batch: Tensor) -> Tensor:
        """Return the target's outputs [B, P] on the views (index [B], offset [B, 2], flip [B])."""
        return self.outputs[self._row(index, offset, flip)]

    def _row(self, index: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
        dy, dx = offset.unbind(1)
        return ((index * self._side + dy) * self._side + dx) * self._flips + flip

    def _view(self, row: Tensor) -> View:
        """Return the views that have these rows."""
        row, flip = row // self._flips, row % self._flips
        row, dx = row // self._side, row % self._side
        index, dy = row // self._side, row % self._side
        return View(index, torch.stack((dy, dx), dim=1), flip.bool())
