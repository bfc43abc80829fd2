"""The target's outputs on every view of every image, computed once instead of at every step.

Random crops and flips make finitely many views of an image, so the outputs of a frozen target on
them are a finite table, and looking them up is exact.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from krrst_fast.data.augment import View, ViewConfig, all_views, kept_views, render
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.arithmetic import kept_dtype, storage
from krrst_fast.distill.config import DistillConfig
from krrst_fast.errors import ConfigError
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.progress import progress_bar
from krrst_fast.runs.rows import computed_rows
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.encoder import EncoderInfo

LARGEST = 2**30
"""Bytes that a cache may take with the setting "auto", where it is not in the memory of a GPU."""
_SHARE = 4
"""Of the memory of a GPU it may take one part in so many: of all memory, so that a resumed run
does as the run before it, whatever else has memory now."""
CHUNK = 256


def most_bytes(target: FrozenTarget, device: torch.device) -> int:
    """Return how much a cache on a device may take with the setting "auto"."""
    if device.type != "cuda" or isinstance(target.config, EncoderInfo):
        return LARGEST
    return torch.cuda.get_device_properties(device).total_memory // _SHARE


def is_cached(config: DistillConfig, count: int, dim: int, most: int = LARGEST) -> bool:
    """Return whether a run keeps a table of the target's outputs.

    Args:
        config: Settings of the run; "auto" keeps a small cache that costs less than it saves.
        count: N, the real images.
        dim: P, the outputs of the target.
        most: The bytes of a small one.
    """
    if config.target_cache != "auto":
        return config.target_cache == "on"
    rows = count * (config.fixed_views or views_per_image(config.views))
    size = kept_dtype(config).itemsize * rows * dim
    return size <= most and rows < config.steps * config.batch_size


def views_per_image(view: ViewConfig) -> int:
    """Return how many views an image has."""
    return (2 * view.padding + 1) ** 2 * (2 if view.flip else 1)


def check_views(config: DistillConfig, store: ImageStore, target: FrozenTarget) -> None:
    """Refuse views that the target has no outputs for, or an encoder none in reasonable space.

    Raises:
        ConfigError: The message says which settings can work.
        DataError: The target does not fit the store.
    """
    target.check_store(store)
    if config.fixed_views:
        kept_views(config.views, config.fixed_views)
    if target.table is not None:
        flips = config.views.flip and not target.table.mirrored
        if config.views.padding or flips:
            kept = "plain images" if not target.table.mirrored else "plain and mirrored images"
            flag = "" if target.table.mirrored else " --views.flip false"
            raise ConfigError(
                f"distill: the target {config.target} is a table with features of {kept}, and "
                f"other views would be drawn: pass --views.padding 0{flag}"
            )
        return
    if not isinstance(target.config, EncoderInfo) or config.target_cache == "off":
        return
    count = store.count("train")
    views = config.fixed_views or views_per_image(config.views)
    size, runs = 4 * count * views * target.dim, config.steps * config.batch_size
    if config.target_cache == "auto":
        most = LARGEST // (4 * count * target.dim)
        if size > LARGEST and count * views < runs:
            fewer = f"--fixed_views {min(most, 8)} (a changed algorithm), " if most else ""
            raise ConfigError(
                f"distill: the encoder would run on {views} views of each of {count} images, and "
                f"its outputs take {size / 2**30:.1f} GiB: pass {fewer}--views.padding 0, "
                "--target_cache on (to keep them all), or off (to run it at every step)"
            )
    if is_cached(config, count, target.dim):
        folder = outputs_folder(config, _inputs(config, store, target))
        there = _size_on_disk(folder)
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if size - there > free:
            raise ConfigError(
                f"distill: the outputs of the encoder take {size / 2**30:.1f} GiB, and "
                f"{folder} has {free / 2**30:.1f} GiB free; pass --fixed_views with fewer views"
            )


def _size_on_disk(folder: Path) -> int:
    rows = folder / "rows.f32"
    return rows.stat().st_size if rows.exists() else 0


def _inputs(config: DistillConfig, store: ImageStore, target: FrozenTarget) -> dict[str, str]:
    """Return what a table of outputs depends on."""
    return {
        "store": store.identity(),
        "target": target.identity(),
        "views": f"{to_dict(config.views)}, {config.fixed_views} of them",
        "dtype": config.dtype,
        "device": target.device.type,
    }


def outputs_folder(config: DistillConfig, inputs: Mapping[str, str]) -> Path:
    """Return where outputs are kept: by the target, or in the run where that is read-only.

    Args:
        config: Settings of the run.
        inputs: What the outputs depend on.
    """
    return beside_target(config.target, inputs) or _named(config.out, inputs)


def beside_target(target: Path, inputs: Mapping[str, str]) -> Path | None:
    """Return the folder of outputs beside a target, its folder or file; None if it is read-only."""
    home = target if target.is_dir() else target.parent
    return _named(home, inputs) if os.access(home, os.W_OK) else None


def _named(home: Path, inputs: Mapping[str, str]) -> Path:
    key = json.dumps(dict(inputs), sort_keys=True).encode()
    return home / "outputs" / hashlib.sha256(key).hexdigest()[:16]


def make_cache(
    config: DistillConfig,
    store: ImageStore,
    target: FrozenTarget,
    images: Tensor,
    *,
    compute: Callable[[Tensor], Tensor] | None = None,
    progress: bool = False,
) -> "TargetCache":
    """Compute, or find on the disk, the target's outputs on the views that a run may draw.

    Args:
        config: Settings of the run.
        store: Its images.
        target: Its target.
        images: The images [N, C, H, W], uint8, on the device.
        compute: What runs the target on views [B, C, H, W]; the target itself if left out.
        progress: Show a bar, where there is a terminal.
    """
    kept = kept_views(config.views, config.fixed_views) if config.fixed_views else None
    on_disk = isinstance(target.config, EncoderInfo)
    inputs = _inputs(config, store, target)
    return TargetCache(
        target,
        images,
        config.views,
        storage(config),
        kept_as=kept_dtype(config),
        compute=compute,
        kept=kept,
        folder=outputs_folder(config, inputs) if on_disk else None,
        inputs=inputs if on_disk else {},
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
        kept_as: Dtype of the outputs in memory.
        compute: As of `make_cache`.
        kept: The views that are drawn, [K, 3] as of `kept_views`; None for all of them.
        folder: Where the outputs are kept on the disk and taken up after a kill; None keeps them
            in memory.
        inputs: What tells these outputs from others in the folder.
        progress: Show a bar, where there is a terminal.
    """

    def __init__(
        self,
        target: FrozenTarget,
        images: Tensor,
        view: ViewConfig,
        dtype: torch.dtype = torch.float32,
        *,
        kept_as: torch.dtype = torch.float32,
        compute: Callable[[Tensor], Tensor] | None = None,
        kept: Tensor | None = None,
        folder: Path | None = None,
        inputs: dict[str, str] | None = None,
        progress: bool = False,
    ) -> None:
        self._side = 2 * view.padding + 1
        self._flips = 2 if view.flip else 1
        self._views = (all_views(view) if kept is None else kept).to(images.device)
        self._place = torch.full((views_per_image(view),), -1, device=images.device)
        """Of each possible view among those that are drawn."""
        self._place[self._code(*self._views.unbind(1))] = torch.arange(
            len(self._views), device=images.device
        )
        rows = len(images) * len(self._views)
        device = images.device

        run = target if compute is None else compute

        def compute_rows(chunk: Tensor) -> Tensor:
            batch = render(
                images,
                self._view(chunk.to(device)),
                padding=view.padding,
                mean=target.mean,
                std=target.std,
                dtype=dtype,
            )
            return run(batch.float()).to(kept_as)

        what = "target outputs"
        if folder is not None:
            self.outputs = computed_rows(
                folder,
                (rows, target.dim),
                inputs or {},
                compute_rows,
                block=CHUNK,
                what=what,
                progress=progress,
            )
            """[N * views, P], the views of an image one after another."""
            # A large table stays on the disk, and its rows go to the device as they are drawn.
            if self.outputs.nbytes <= LARGEST:
                self.outputs = self.outputs.to(device)
            return
        self.outputs = torch.empty(rows, target.dim, device=device, dtype=kept_as)
        with progress_bar(progress, total=rows, desc=what, unit="view") as bar:
            for chunk in torch.arange(rows, device=device).split(CHUNK):
                self.outputs[chunk] = compute_rows(chunk)
                bar.update(len(chunk))

    def __call__(self, index: Tensor, offset: Tensor, flip: Tensor, batch: Tensor) -> Tensor:
        """Return the target's outputs [B, P] on the views (index [B], offset [B, 2], flip [B])."""
        row = self._row(index, offset, flip).to(self.outputs.device)
        return self.outputs[row].to(batch.device)

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
