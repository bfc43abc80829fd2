"""The time of an outer step part by part, ours and the released formulation's.

At the paper's settings for CIFAR-100. Parts are timed inside whole steps, without a wait between
them; the totals are of whole steps in turn.
"""

import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu import images
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE, ReleasedStep, released_mse
from krrst_fast import krr_mse
from krrst_fast.data.augment import ViewConfig, draw_views
from krrst_fast.distill.step import LinearDecay, outer_step
from krrst_fast.models import Network
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
    """Yield one unit."""
    yield Unit("step", rows)


def rows(run: Run) -> Rows:
    """Yield the parts of both steps, interleaved whole steps, and the kernels of whole steps."""
    both = Both(run)
    yield "krrst_fast", lambda: parts(run, our_step(both.ours, both.draw))
    yield "released", lambda: parts(run, released_step(both.theirs, both.draw))
    yield "whole steps", lambda: whole_steps(run, both)
    yield "kernels", lambda: run.clock.profile(partial(ours, both), calls=3, top=25)


class Both:
    """Our step and the released one, made for the first row."""

    def __init__(self, run: Run) -> None:
        self.scale = images.TOY if run.toy else images.FULL
        self.device = run.device

    # No network is renewed while it is measured: every step is the same work.
    def _made(self) -> images.Distillation:
        noise = images.noise(self.scale.size)
        return images.make(self.scale, noise, self.device, slots=1, online_steps=10**9)

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
    """Return a function that draws the arguments of `views`: `batch` random views."""
    kept = made.images
    random = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Any]:
        index = torch.randint(len(kept.pixels), (batch,), generator=random)
        view = draw_views(index.to(kept.pixels.device), VIEW, random)
        options = {"images": kept.pixels, "padding": VIEW.padding}
        return view._asdict() | options | {"mean": kept.mean, "std": kept.std}

    return draw


VIEW = ViewConfig()


class Step(NamedTuple):
    """An outer step as its operations, so that both implementations are taken apart alike.

    Attributes:
        views: Draws the real images.
        target: Returns the targets of the real images.
        network: Network of the pool.
        x_syn, y_syn: The synthetic set.
        zero: Clears the gradients of the set.
        loss: The KRR loss of features and targets.
        update: The optimizer step of the set.
        train: The step of the network.
    """

    views: Callable[[], Tensor]
    target: Callable[[Tensor], Tensor]
    network: Network
    x_syn: Tensor
    y_syn: Tensor
    zero: Callable[[], Any]
    loss: Callable[..., Tensor]
    update: Callable[[], Any]
    train: Callable[[], Any]

    def __call__(self, mark: Marks) -> None:
        """Make the step, and mark the end of each part."""
        x_real = self.views()
        mark("views")
        with torch.no_grad():
            y_real = self.target(x_real)
        mark("target forward")
        f_syn = self.network.embed(self.x_syn)
        mark("features of the synthetic images")
        with torch.no_grad():
            f_real = self.network.embed(x_real)
        mark("features of the real images")
        self.zero()
        leaf = f_syn.detach().requires_grad_()
        loss = self.loss(leaf, self.y_syn, f_real, y_real)
        mark("KRR forward")
        # In two pieces, which autograd would do in one; it stores gradients as optimizers expect.
        loss.backward()
        mark("KRR backward")
        f_syn.backward(leaf.grad)
        mark("network backward")
        self.update()
        mark("AdamW")
        self.train()
        mark("SGD step of the network")


def our_step(made: images.Distillation, draw: Callable[[], dict[str, Any]]) -> Step:
    """Return `outer_step` taken apart."""
    state, slot = made.state, made.state.pool.slots[0]
    return Step(
        *(lambda: views(**draw()), made.target, slot.network, state.x_syn, state.y_syn),
        zero=partial(state.optimizer.zero_grad, set_to_none=True),
        loss=partial(krr_mse, ridge=RIDGE, bias=1.0),
        update=state.optimizer.step,
        train=lambda: state.pool.advance(slot, state.x_syn.detach(), state.y_syn.detach()),
    )


def released_step(theirs: ReleasedStep, draw: Callable[[], dict[str, Any]]) -> Step:
    """Return the same by plain PyTorch."""
    return Step(
        *(lambda: theirs.views(draw()), theirs.target, theirs.network, theirs.x_syn, theirs.y_syn),
        zero=theirs.outer.zero_grad,
        loss=released_mse,
        update=theirs.outer.step,
        train=theirs.fit,
    )


def parts(run: Run, step: Callable[[Marks], None]) -> dict[str, Any]:
    """Measure medians of the parts over some steps, after two that warm up."""
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
    """Measure interleaved whole steps: `outer_step` itself, and the released formulation."""
    theirs = released_step(both.theirs, both.draw)
    calls = {
        "krrst_fast": partial(ours, both),
        "released": lambda: theirs(Marks(run.device)),
    }
    taken = run.clock.in_turn(calls, seconds=5.0)
    row = {name: one._asdict() for name, one in taken.items()}
    return row | {"times_released": taken["released"].ms / taken["krrst_fast"].ms}
