"""Outer steps on images by the code of a distillation: their speed, and whether the loss falls.

All rows begin with the same synthetic set and the same pool, and see the same views.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.gpu import images
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE
from bench.gpu.step import REPLAYED, Way, ways
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.cache_plan import views_per_image
from krrst_fast.distill.loop import PlainSteps, warm_up
from krrst_fast.distill.source import Source
from krrst_fast.distill.static import StaticSteps
from krrst_fast.distill.step import LinearDecay
from krrst_fast.runs.environment import peak_memory_mb


class Length(NamedTuple):
    """Number of steps, of untimed first steps, and of losses averaged at either end."""

    steps: int
    untimed: int
    averaged: int
    # The paper's is 1000: its warm-up alone would be the work of thousands of steps.
    online_steps: int = 50


FULL = Length(200, 10, 20)
TOY = Length(6, 2, 2, 3)
SLOTS = 10
LR = 1e-3
NAMES = ("TF32", "float16", "float16, fast KRR", "float16, fast KRR, looked up", REPLAYED)
"""The ways of the stage `step` that are tried, the first as the one to compare with."""


def units(toy: bool) -> Iterator[Unit]:
    """Yield one unit."""
    yield Unit("steps", rows)


def rows(run: Run) -> Rows:
    """Yield a row for each way: how networks compute, where the target's outputs come from."""
    scale = images.TOY if run.toy else images.FULL
    kept = images.read(run.images, scale.size)
    if run.toy:
        kept = kept._replace(pixels=kept.pixels[:20])
    first = f"{kept.name}, TF32"
    for name in NAMES:
        way = ways(run.toy)[name]
        values = len(kept.pixels) * views_per_image(ViewConfig()) * scale.p
        if way.looked_up and values * (2 if way.arithmetic.half else 4) > most_bytes(run):
            continue
        yield f"{kept.name}, {name}", partial(distil, run, scale, kept, way, first)


def most_bytes(run: Run) -> float:
    """Return how large a table may be: half of the free memory of the GPU."""
    return 2**30 if run.toy else torch.cuda.mem_get_info()[0] / 2


def distil(
    run: Run, scale: images.Scale, kept: images.Images, way: Way, first: str
) -> dict[str, Any]:
    """Make the steps of a distillation, and compare its losses with those of the first row."""
    length = TOY if run.toy else FULL
    made = images.make(
        *(scale, kept, run.device),
        slots=SLOTS,
        online_steps=length.online_steps,
        arithmetic=way.arithmetic,
    )
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    source, fill = made.source, 0.0
    if way.looked_up:
        begin = time.perf_counter()
        cache = TargetCache(
            made.target,
            made.images.pixels,
            source.view,
            kept_as=torch.float16 if way.arithmetic.half else torch.float32,
            compute=made.run,
        )
        run.clock.wait()
        fill = time.perf_counter() - begin
        source = images.source(scale, made.images, cache)
    begin = time.perf_counter()
    warm_up(made.state)
    run.clock.wait()
    warm = time.perf_counter() - begin
    losses, seconds = advance(run, made, source, length, way)
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
    before = run.row(first) or {}
    if "loss_at_the_end" in before:
        row["loss_at_the_end_by_the_first"] = before["loss_at_the_end"]
    if not losses.isfinite().all():
        row["wrong"] = ["a loss is not finite"]
    return row


def advance(
    run: Run, made: images.Distillation, source: Source, length: Length, way: Way
) -> tuple[torch.Tensor, float]:
    """Make the steps; return the loss of each, and the seconds of the timed ones."""
    rate = LinearDecay(start=LR, final=LR * 1e-3, steps=length.steps)
    options = {"ridge": RIDGE, "ridge_of": "trace", "solver": way.solver}
    kind = StaticSteps if way.replayed else PlainSteps
    steps, losses, begin = kind(made.state, source, rate, **options), [], 0.0
    with steps.aside():
        for step in range(length.steps):
            if step == length.untimed:
                run.clock.wait()
                begin = time.perf_counter()
            # A replay writes to the same loss again.
            losses.append(steps().loss.clone())
        run.clock.wait()
    if isinstance(steps, StaticSteps) and steps.replays.failure:
        raise RuntimeError(f"not replayed: {steps.replays.failure}")
    return torch.stack(losses).cpu(), time.perf_counter() - begin
