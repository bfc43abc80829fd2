"""Outer steps on images by the code of a distillation: their speed, and whether the loss falls."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench.gpu import images
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill.cache import LARGEST, TargetCache, views_per_image
from krrst_fast.distill.loop import warm_up
from krrst_fast.distill.source import Source
from krrst_fast.distill.step import LinearDecay, outer_step
from krrst_fast.runs.environment import peak_memory_mb


class Length(NamedTuple):
    """Number of steps, of untimed first steps, and of losses averaged at either end."""

    steps: int
    untimed: int
    averaged: int
    # The paper's is 1000: its warm-up alone would be the work of thousands of steps.
    online_steps: int = 50


FULL = Length(100, 10, 10)
TOY = Length(6, 2, 2, 3)
SLOTS = 10
LR = 1e-3


def units(toy: bool) -> Iterator[Unit]:
    """Yield one unit."""
    yield Unit("steps", rows)


def rows(run: Run) -> Rows:
    """Yield a row with the target at every step, and one with its outputs in a table."""
    scale = images.TOY if run.toy else images.FULL
    kept = images.read(run.images, scale.size)
    if run.toy:
        kept = kept._replace(pixels=kept.pixels[:20])
    about = f"{kept.name}, the target"
    yield f"{about} at every step", lambda: distil(run, scale, kept, cached=False)
    if 4 * len(kept.pixels) * views_per_image(ViewConfig()) * scale.p <= LARGEST:
        yield f"{about} looked up", lambda: distil(run, scale, kept, cached=True)


def distil(run: Run, scale: images.Scale, kept: images.Images, *, cached: bool) -> dict[str, Any]:
    """Make the steps of a distillation."""
    length = TOY if run.toy else FULL
    made = images.make(*(scale, kept, run.device), slots=SLOTS, online_steps=length.online_steps)
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    source, fill = made.source, 0.0
    if cached:
        begin = time.perf_counter()
        cache = TargetCache(made.target, made.images.pixels, source.view)
        run.clock.wait()
        fill = time.perf_counter() - begin
        source = images.source(scale, made.images, made.target, cache)
    begin = time.perf_counter()
    warm_up(made.state)
    run.clock.wait()
    warm = time.perf_counter() - begin
    losses, seconds = advance(run, made, source, length)
    start, end = losses[: length.averaged].mean(), losses[-length.averaged :].mean()
    row: dict[str, Any] = {
        "images": kept.name,
        "count": len(kept.pixels),
        "steps": length.steps,
        "steps_per_second": (length.steps - length.untimed) / seconds,
        "ms": seconds / (length.steps - length.untimed) * 1e3,
        "loss_at_the_start": start.item(),
        "loss_at_the_end": end.item(),
        "peak_mb": peak_memory_mb(torch.device(run.device)),
        "pool": {"size": SLOTS, "online_steps": length.online_steps, "seconds": warm},
        "seconds_to_fill_the_cache": fill,
    }
    if not losses.isfinite().all():
        row["wrong"] = ["a loss is not finite"]
    return row


def advance(
    run: Run, made: images.Distillation, source: Source, length: Length
) -> tuple[torch.Tensor, float]:
    """Make the steps; return the loss of each, and the seconds of the timed ones."""
    rate = LinearDecay(start=LR, final=LR * 1e-3, steps=length.steps)
    losses, begin = [], 0.0
    for step in range(length.steps):
        if step == length.untimed:
            run.clock.wait()
            begin = time.perf_counter()
        measured = outer_step(made.state, source, rate, ridge=RIDGE, ridge_of="trace")
        losses.append(measured.loss)
    run.clock.wait()
    return torch.stack(losses).cpu(), time.perf_counter() - begin
