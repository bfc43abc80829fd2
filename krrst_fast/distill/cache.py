"""The target's outputs on every view of every image, computed once instead of at every step.

Random crops and flips make finitely many views of an image, so the outputs of a frozen target on
them are a finite table, and looking them up is exact.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from krrst_fast.data.augment import View, ViewConfig, all_views, kept_views, render
from krrst_fast.distill.arithmetic import storage
from krrst_fast.distill.cache_plan import CachePlan, Place, views_per_image
from krrst_fast.distill.config import DistillConfig
from krrst_fast.errors import NonFiniteError
from krrst_fast.runs.progress import progress_bar
from krrst_fast.runs.rows import computed_rows
from krrst_fast.targets import FrozenTarget

CHUNK = 256


def make_cache(
    config: DistillConfig,
    plan: CachePlan,
    target: FrozenTarget,
    images: Tensor,
    *,
    compute: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> "TargetCache":
    """Compute, or find on the disk, the target's outputs on the views that a run may draw.

    Args:
        config: Settings of the run.
        plan: Its `plan_cache`.
        target: Its target.
        images: The images [N, C, H, W], uint8, on the device.
        compute: What runs the target on views [B, C, H, W]; the target itself if left out.
        progress: Show a bar, where there is a terminal.
    """
    return TargetCache(
        target,
        images,
        config.views,
        storage(config),
        kept_as=plan.dtype,
        place=plan.place,
        compute=compute,
        kept=kept_views(config.views, config.fixed_views) if config.fixed_views else None,
        folder=plan.folder,
        inputs=dict(plan.inputs),
        progress=progress,
    )


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
        kept_as: Dtype of the table.
        place: Where the table is looked up: on the device of the images, in the CPU's memory, or in
            a file that is mapped into it.
        compute: As of `make_cache`.
        kept: The views that are drawn, [K, 3] as of `kept_views`; None for all of them.
        folder: Where the outputs are kept on the disk and taken up after a kill; None keeps no
            file.
        inputs: What tells these outputs from others in the folder.
        progress: Show a bar, where there is a terminal.

    Raises:
        NonFiniteError: An output is not finite.
    """

    def __init__(
        self,
        target: FrozenTarget,
        images: Tensor,
        view: ViewConfig,
        dtype: torch.dtype = torch.float32,
        *,
        kept_as: torch.dtype = torch.float32,
        place: Place = "device",
        compute: Callable[[Tensor], Tensor] | None = None,
        kept: Tensor | None = None,
        folder: Path | None = None,
        inputs: dict[str, str] | None = None,
        progress: bool = False,
    ) -> None:
        self._side = 2 * view.padding + 1
        self._flips = 2 if view.flip else 1
        # Rows are found on the CPU, where views are drawn: one copy of their numbers is to be sent.
        self._views = all_views(view) if kept is None else kept
        self._place = torch.full((views_per_image(view),), -1)
        """Of each possible view among those that are drawn."""
        self._place[self._code(*self._views.unbind(1))] = torch.arange(len(self._views))
        rows, device = len(images) * len(self._views), images.device
        self._on_device = place == "device"
        there = device if self._on_device else torch.device("cpu")
        run = target if compute is None else compute

        def compute_rows(chunk: Tensor) -> Tensor:
            batch = render(
                images,
                View(*(part.to(device) for part in self._view(chunk))),
                padding=view.padding,
                mean=target.mean,
                std=target.std,
                dtype=dtype,
            )
            return run(batch.float()).to(kept_as)

        shape, what = (rows, target.dim), "target outputs"
        self.outputs: Tensor
        """[N * views, P], the views of an image one after another."""
        if folder is not None:
            self.outputs = computed_rows(
                folder,
                shape,
                inputs or {},
                compute_rows,
                block=CHUNK,
                what=what,
                dtype=kept_as,
                progress=progress,
            )
            if place != "disk":
                self.outputs = self.outputs.to(there, copy=True)
            return
        self.outputs = torch.empty(shape, device=there, dtype=kept_as)
        with progress_bar(progress, total=rows, desc=what, unit="view") as bar:
            finite = torch.ones((), dtype=torch.bool, device=device)
            for chunk in torch.arange(rows).split(CHUNK):
                outputs = compute_rows(chunk)
                finite &= torch.isfinite(outputs).all()
                self.outputs[chunk[0] : chunk[-1] + 1] = outputs
                bar.update(len(chunk))
        if not finite:
            half = " in float16 (--target_cache_dtype float32)" if kept_as == torch.float16 else ""
            raise NonFiniteError(f"distill: the target's outputs hold NaN or infinity{half}")

    def find(self, view: View) -> Tensor:
        """Return the rows [B] of a table on the device, or the rows' outputs [B, P] of another."""
        row = self._row(*(part.cpu() for part in view))
        return row if self._on_device else self.outputs[row]

    def __call__(self, found: Tensor, batch: Tensor) -> Tensor:
        """Return the target's outputs [B, P] on the views of which `found` was said."""
        return self.outputs[found] if self._on_device else found

    def _row(self, index: Tensor, offset: Tensor, flip: Tensor) -> Tensor:
        place = self._place[self._code(offset[:, 0], offset[:, 1], flip.long())]
        # A view that is not kept has a place of -1, and its row is to be out of range.
        row = index * len(self._views) + place
        return torch.where(place < 0, len(self.outputs), row)

    def _code(self, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
        return (dy * self._side + dx) * self._flips + flip

    def _view(self, row: Tensor) -> View:
        """Return the views that have these rows."""
        index, view = row // len(self._views), self._views[row % len(self._views)]
        return View(index, view[:, :2].contiguous(), view[:, 2].bool())
