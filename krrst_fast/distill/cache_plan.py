"""Whether a run keeps the target's outputs on all views, in which dtype, where, and if they fit."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from krrst_fast.data.augment import ViewConfig, kept_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.config import DistillConfig
from krrst_fast.errors import ConfigError
from krrst_fast.planner.limits import free_memory
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.rows import size_on_disk
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.encoder import EncoderInfo

Place = Literal["device", "memory", "disk"]

LARGEST = 2**30
"""Bytes that a table may take with the setting "auto", where it is not in the memory of a GPU."""
_SHARE = 4
"""Of the memory of a GPU it may take one part in so many: of all memory, so that a resumed run
does as the run before it, whatever else has memory now."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """A table of the target's outputs as a run keeps it."""

    rows: int
    """Of all views of all images."""
    views: int
    dim: int
    dtype: torch.dtype
    place: Place
    """Where it is looked up."""
    folder: Path | None
    """Of the file that it is kept in, None without one."""
    inputs: Mapping[str, str]
    """What tells it from others in the folder."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows * self.dim * self.dtype.itemsize

    @property
    def what(self) -> str:
        """What is looked up, wherever it is: all that results depend on."""
        return f"looked up among {self.rows:,} views in {str(self.dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        where = {"device": "on the device", "memory": "in memory", "disk": "on the disk"}
        return f"{self.what}, {self.size / 2**30:.2g} GiB {where[self.place]}"


def plan_cache(
    config: DistillConfig, store: ImageStore, target: FrozenTarget, device: torch.device
) -> CachePlan | None:
    """Choose how a run keeps the target's outputs; None where it runs the target at every step.

    The choice does not depend on what is free at the moment: a resumed run does as the run before.
    """
    count = store.count("train")
    most = most_bytes(config, target, device)
    if target.table is not None or not is_cached(config, count, target.dim, most):
        return None
    views = config.fixed_views or views_per_image(config.views)
    dtype = kept_dtype(config)
    fits = count * views * target.dim * dtype.itemsize <= most
    place: Place = "device" if fits else "disk"
    if config.target_cache_place != "auto":
        place = config.target_cache_place
    # What an encoder has computed is kept in any case.
    on_disk = place == "disk" or isinstance(target.config, EncoderInfo)
    inputs = _inputs(config, store, target, device)
    return CachePlan(
        rows=count * views,
        views=views,
        dim=target.dim,
        dtype=dtype,
        place=place,
        folder=outputs_folder(config, inputs) if on_disk else None,
        inputs=inputs if on_disk else {},
    )


def most_bytes(config: DistillConfig, target: FrozenTarget, device: torch.device) -> int:
    """Return how much a table may take with the setting "auto"."""
    if config.target_cache_limit is not None:
        return int(config.target_cache_limit * 2**30)
    if device.type != "cuda" or isinstance(target.config, EncoderInfo):
        return LARGEST
    return torch.cuda.get_device_properties(device).total_memory // _SHARE


def kept_dtype(config: DistillConfig) -> torch.dtype:
    """Return the dtype of the table: the one asked for, or the one the networks compute in."""
    chosen = config.target_cache_dtype
    half = config.dtype == "float16" if chosen == "auto" else chosen == "float16"
    return torch.float16 if half else torch.float32


def is_cached(config: DistillConfig, count: int, dim: int, most: int = LARGEST) -> bool:
    """Return whether a run keeps a table of the target's outputs.

    Args:
        config: Settings of the run; "auto" keeps a small table that costs less than it saves.
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


def check_views(
    config: DistillConfig, store: ImageStore, target: FrozenTarget, device: torch.device
) -> None:
    """Refuse views that the target has no outputs for, and tables that do not fit.

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
    if isinstance(target.config, EncoderInfo) and config.target_cache == "auto":
        count, itemsize = store.count("train"), kept_dtype(config).itemsize
        views = config.fixed_views or views_per_image(config.views)
        size, runs = itemsize * count * views * target.dim, config.steps * config.batch_size
        largest = most_bytes(config, target, device)
        most = largest // (itemsize * count * target.dim)
        if size > largest and count * views < runs:
            fewer = f"--fixed_views {min(most, 8)} (a changed algorithm), " if most else ""
            raise ConfigError(
                f"distill: the encoder would run on {views} views of each of {count} images, and "
                f"its outputs take {size / 2**30:.1f} GiB: pass {fewer}--views.padding 0, "
                "--target_cache on (to keep them all), or off (to run it at every step)"
            )
    if (plan := plan_cache(config, store, target, device)) is not None:
        _require_room(plan, device)


def _require_room(plan: CachePlan, device: torch.device) -> None:
    """Raise ConfigError if the table does not fit where it is to be kept and looked up."""
    needs: list[tuple[str, int, int | None]] = []
    if plan.place == "device" and device.type in ("cpu", "cuda"):
        needs.append((f"the device {device}", plan.size, free_memory(str(device))))
    if plan.place == "memory":
        needs.append(("the memory of this machine", plan.size, free_memory("cpu")))
    if (folder := plan.folder) is not None:
        there = size_on_disk(folder, plan.dtype)
        while not folder.exists():
            folder = folder.parent
        needs.append((str(folder), plan.size - there, shutil.disk_usage(folder).free))
    for where, size, free in needs:
        if free is not None and size > free:
            raise ConfigError(
                f"distill: the target's outputs on {plan.rows:,} views take "
                f"{plan.size / 2**30:.1f} GiB, and {where} has {free / 2**30:.1f} GiB free; pass "
                "--target_cache_dtype float16, --target_cache_place with another place, "
                "--fixed_views with fewer views, or --target_cache off"
            )


def _inputs(
    config: DistillConfig, store: ImageStore, target: FrozenTarget, device: torch.device
) -> dict[str, str]:
    """Return what a table of outputs depends on."""
    inputs = {
        "store": store.identity(),
        "target": target.identity(),
        "views": f"{to_dict(config.views)}, {config.fixed_views} of them",
        "dtype": config.dtype,
        "device": device.type,
    }
    if device.type == "cuda" and not config.tf32:
        inputs["convolutions"] = "in float32"
    # Two tables that differ by their dtype alone are two folders.
    kept = {} if config.target_cache_dtype == "auto" else {"kept": config.target_cache_dtype}
    return inputs | kept


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
