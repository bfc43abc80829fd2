"""The target's outputs on every view of every image, computed once instead of at every step.

Random crops and flips make finitely many views of an image, so the outputs of a frozen target on
them are a finite table, and looking them up is exact.
"""

import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill.config import DistillConfig
from krrst_fast.ops.views import views
from krrst_fast.targets import FrozenTarget

LARGEST = 2**30
"""Bytes that a cache nobody asked for may take."""
CHUNK = 256


def is_cached(config: DistillConfig, count: int, dim: int) -> bool:
    """Whether a run keeps a table of the target's outputs.

    Args:
        config: of the run; "auto" keeps one that is small and costs less than it saves.
        count: N, the real images.
        dim: P, the outputs of the target.
    """
    if config.target_cache != "auto":
        return config.target_cache == "on"
    rows = count * views_per_image(config.views)
    return 4 * rows * dim <= LARGEST and rows < config.steps * config.batch_size


def views_per_image(view: ViewConfig) -> int:
    """How many views an image has."""
    return (2 * view.padding + 1) ** 2 * (2 if view.flip else 1)


class TargetCache:
    """A `Represent` that looks the outputs up.

    The table is filled in chunks that do not depend on where the run is, so a resumed run finds the
    same bits. They differ in the last bits from outputs computed on a batch, whose shape may make
    the target sum in another order.

    Args:
        target: on the device of `images`.
        images: [N, C, H, W] uint8.
        view: which views there are.
        dtype: in which the views are made; the target takes them in float32.
        progress: show a bar, where there is a terminal.
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
        from tqdm import tqdm

        self._side = 2 * view.padding + 1
        self._flips = 2 if view.flip else 1
        rows = len(images) * views_per_image(view)
        self.outputs = torch.empty(rows, target.dim, device=images.device)
        """[N * views, P], the views of an image one after another."""
        off = None if progress else True
        with tqdm(total=rows, desc="target outputs", unit="view", disable=off) as bar:
            for chunk in torch.arange(rows, device=images.device).split(CHUNK):
                index, offset, flip = self._view(chunk)
                batch = views(
                    images,
                    index,
                    offset,
                    flip,
                    padding=view.padding,
                    mean=target.mean,
                    std=target.std,
                    dtype=dtype,
                )
                self.outputs[chunk] = target(batch.float())
                bar.update(len(chunk))

    def __call__(self, index: Tensor, offset: Tensor, flip: Tensor, batch: Tensor) -> Tensor:
        """The target's outputs [B, P] on the views (index [B], offset [B, 2], flip [B])."""
        return self.outputs[self._row(index, offset, flip)]

    def _row(self, index: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
        dy, dx = offset.unbind(1)
        return ((index * self._side + dy) * self._side + dx) * self._flips + flip

    def _view(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The index, offset and flip that have these rows."""
        row, flip = row // self._flips, row % self._flips
        row, dx = row // self._side, row % self._side
        index, dy = row // self._side, row % self._side
        return index, torch.stack((dy, dx), dim=1), flip.bool()
