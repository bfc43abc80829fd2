"""Where the time of an outer step goes, ours and the released formulation's, part by part.

At the paper's settings for CIFAR-100. Parts are timed inside whole steps, without a wait between
them; the totals are of whole steps in turn.
"""

import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.gpu import images
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE, ReleasedStep, released_mse
from krrst_fast import krr_mse
from krrst_fast.data.augment import ViewConfig, draw_views
from krrst_fast.distill.step import LinearDecay, outer_step
from krrst_fast.ops.views import views

RATE = LinearDecay(start=1e-4, final=1e-7, steps=160_000)
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
REPEATS = 12


class Marks:
    """Moments on the device's clock: the milliseconds between one mark and the next, by name."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self("begin")

    def __call__(self, name: str) -> None:
        if self._device == "cuda":
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self._marks.append((name, moment))

    def milliseconds(self) -> dict[str, float]:
        if self._device == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self._marks, self._marks[1:])
        return {name: self._between(before, after) for (_, before), (name, after) in pairs}

    def _between(self, before: Any, after: Any) -> float:
        if self._device == "cuda":
            return before.elapsed_time(after)
        return (after - before) * 1e3


def units(toy: bool) -> Iterator[Unit]:
    """One unit."""
    yield Unit("step", rows)


def rows(run: Run) -> Rows:
    """The parts of either's step, whole steps in turn, and the kernels of whole steps."""
    both = Both(run)
    yield "krrst_fast", lambda: parts(run, partial(our_step, both.ours, both.draw))
    yield "released", lambda: parts(run, partial(released_step, both.theirs, both.draw))
    yield "whole steps", lambda: whole_steps(run, both)
    yield "kernels", lambda: run.clock.profile(partial(ours, both), calls=3, top=25)


class Both:
    """Our step and the released one, made when the first row asks."""

    def __init__(self, run: Run) -> None:
        self.scale = images.TOY if run.toy else images.FULL
        self.device = run.device

    # No network is renewed while it is measured: every step is the same work.
    def _made(self) -> images.Distillation:
        some = images.noise(self.scale.size)
        return images.make(self.scale, some, self.device, slots=1, online_steps=10**9)

    @functools.cached_property
    def ours(self) -> images.Distillation:
        return self._made()

    @functools.cached_property
    def theirs(self) -> ReleasedStep:
        made = self._made()
        network, state = made.state.pool.slots[0].network, made.state
        return ReleasedStep(network, made.target.model, state.x_syn, state.y_syn, 1e-4, SGD)

    @functools.cached_property
    def draw(self) -> Callable[[], dict[str, Any]]:
        return drawer(self.ours, self.scale.b)


def drawer(made: images.Distillation, batch: int) -> Callable[[], dict[str, Any]]:
    """Draws a random view of a random image, `batch` times: what `views` is called with."""
    kept = made.images
    random = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Any]:
        index = torch.randint(len(kept.pixels), (batch,), generator=random)
        there = [x.to(kept.pixels.device) for x in (index, *draw_views(batch, VIEW, random))]
        told: dict[str, Any] = dict(zip(("index", "offset", "flip"), there))
        told |= {"images": kept.pixels, "padding": VIEW.padding}
        return told | {"mean": kept.mean, "std": kept.std}

    return draw


VIEW = ViewConfig()


def our_step(made: images.Distillation, draw: Callable[[], dict[str, Any]], mark: Marks) -> None:
    """`outer_step` taken apart."""
    state, slot = made.state, made.state.pool.slots[0]
    x_real = views(**draw())
    mark("views")
    y_real = made.target(x_real)
    mark("target forward")
    f_syn = slot.network.embed(state.x_syn)
    mark("features of the synthetic images")
    with torch.no_grad():
        f_real = slot.network.embed(x_real)
    mark("features of the real images")
    state.optimizer.zero_grad(set_to_none=True)
    leaf = f_syn.detach().requires_grad_()
    loss = krr_mse(leaf, state.y_syn, f_real, y_real, ridge=RIDGE, bias=1.0)
    mark("KRR forward")
    _backward(loss, leaf, f_syn, mark)
    state.optimizer.step()
    mark("AdamW")
    state.pool.advance(slot, state.x_syn.detach(), state.y_syn.detach())
    mark("SGD step of the network")


def released_step(theirs: ReleasedStep, draw: Callable[[], dict[str, Any]], mark: Marks) -> None:
    """The same by plain PyTorch."""
    x_real = theirs.views(draw())
    mark("views")
    with torch.no_grad():
        y_real = theirs.target(x_real)
    mark("target forward")
    f_syn = theirs.network.embed(theirs.x_syn)
    mark("features of the synthetic images")
    with torch.no_grad():
        f_real = theirs.network.embed(x_real)
    mark("features of the real images")
    theirs.outer.zero_grad()
    leaf = f_syn.detach().requires_grad_()
    loss = released_mse(leaf, theirs.y_syn, f_real, y_real)
    mark("KRR forward")
    _backward(loss, leaf, f_syn, mark)
    theirs.outer.step()
    mark("AdamW")
    theirs.fit()
    mark("SGD step of the network")


def _backward(loss: Tensor, leaf: Tensor, f_syn: Tensor, mark: Marks) -> None:
    """In two pieces that autograd would do in one; it stores gradients as optimizers expect."""
    loss.backward()
    mark("KRR backward")
    f_syn.backward(leaf.grad)
    mark("network backward")


def parts(run: Run, step: Callable[[Marks], None]) -> dict[str, Any]:
    """Medians of the parts over some steps, after two that warm up."""
    taken = []
    for _ in range(2 + (1 if run.toy else REPEATS)):
        mark = Marks(run.device)
        step(mark)
        taken.append(mark.milliseconds())
    kept = taken[2:]
    return {"parts": {name: median(one[name] for one in kept) for name in kept[0]}}


def ours(both: Both) -> None:
    """Make one step as a distillation makes it."""
    outer_step(both.ours.state, both.ours.source, RATE, ridge=RIDGE, ridge_of="trace")


def whole_steps(run: Run, both: Both) -> dict[str, Any]:
    """Whole steps in turn: `outer_step` itself, and the released formulation."""
    calls = {
        "krrst_fast": partial(ours, both),
        "released": lambda: released_step(both.theirs, both.draw, Marks(run.device)),
    }
    taken = run.clock.in_turn(calls, seconds=5.0)
    row = {name: one._asdict() for name, one in taken.items()}
    return row | {"times_released": taken["released"].ms / taken["krrst_fast"].ms}
