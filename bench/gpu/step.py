"""The time of an outer step part by part, in each arithmetic, and the released formulation's.

At the paper's settings for CIFAR-100. Parts are timed inside whole steps, without a wait between
them; the totals are of whole steps in turn.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu import images
from bench.gpu.clock import reason
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE, ReleasedStep, released_mse
from krrst_fast import Solver, krr_mse
from krrst_fast.data.augment import ViewConfig, draw_views
from krrst_fast.distill.arithmetic import PLAIN, Arithmetic
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.loop import PlainSteps
from krrst_fast.distill.static import StaticSteps
from krrst_fast.distill.step import LinearDecay
from krrst_fast.ops.views import views

RATE = LinearDecay(start=1e-4, final=1e-7, steps=160_000)
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3}
REPEATS = 12
COUNT = 512
"""Real images; the more, the longer it takes to run the target on all their views."""


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


class Way(NamedTuple):
    """How a step is made: its networks, its solver, whether the target's outputs are looked up."""

    arithmetic: Arithmetic
    solver: Solver = Solver()
    looked_up: bool = False
    replayed: bool = False
    """From CUDA graphs, one for each slot of the pool."""


REPLAYED = "float16, fast KRR, looked up, replayed"


def ways(toy: bool) -> dict[str, Way]:
    """Return the measured ways; in a dry run nothing is compiled."""
    float32 = Arithmetic(compiles=not toy)
    float16 = Arithmetic(half=True, compiles=not toy)
    quick = Solver(precision="fast", check="flag")
    return {
        "krrst_fast": Way(PLAIN),
        "TF32": Way(float32),
        "float16": Way(float16),
        "TF32, fast KRR, looked up": Way(float32, quick, looked_up=True),
        "float16, fast KRR": Way(float16, quick),
        "float16, fast KRR, looked up": Way(float16, quick, looked_up=True),
        REPLAYED: Way(float16, quick, looked_up=True, replayed=True),
        "TF32, fast KRR, replayed": Way(float32, quick, replayed=True),
    }


IN_PARTS = ("TF32", "float16")
BEST = "float16, fast KRR, looked up"


def rows(run: Run) -> Rows:
    """Yield the parts of the steps, interleaved whole steps, and the kernels of whole steps."""
    steps = Steps(run)
    yield "krrst_fast", lambda: parts(run, our_step(steps["krrst_fast"], steps.draw))
    yield "released", lambda: parts(run, released_step(steps.theirs, steps.draw))
    for name in IN_PARTS:
        yield f"{name}, compiled", partial(first_step, run, steps, name)
        yield name, lambda name=name: parts(run, our_step(steps[name], steps.draw))
    yield "whole steps", lambda: whole_steps(run, steps)
    yield "kernels", lambda: run.clock.profile(partial(steps.ours, "krrst_fast"), calls=3, top=25)
    yield "kernels in float16", lambda: run.clock.profile(partial(steps.ours, BEST), top=25)
    yield "kernels replayed", lambda: run.clock.profile(partial(steps.ours, REPLAYED), top=25)


class Steps:
    """Our step in each way, and the released one, each made when it is asked for."""

    def __init__(self, run: Run) -> None:
        self.scale = images.TOY if run.toy else images.FULL
        self.device, self.ways = run.device, ways(run.toy)

    # No network is renewed while it is measured: every step is the same work.
    def _made(self, arithmetic: Arithmetic = PLAIN) -> images.Distillation:
        noise = images.noise(self.scale.size, COUNT)
        return images.make(
            *(self.scale, noise, self.device), slots=1, online_steps=10**9, arithmetic=arithmetic
        )

    @functools.cache  # noqa: B019  # one object of the class a process
    def __getitem__(self, name: str) -> images.Distillation:
        """Return the distillation of a way."""
        way = self.ways[name]
        made = self._made(way.arithmetic)
        if not way.looked_up:
            return made
        cache = TargetCache(
            made.target,
            made.images.pixels,
            made.source.view,
            kept_as=torch.float16 if way.arithmetic.half else torch.float32,
            compute=made.run,
        )
        return made._replace(source=images.source(self.scale, made.images, cache))

    @functools.cached_property
    def theirs(self) -> ReleasedStep:
        made = self._made()
        network, state = made.state.pool.slots[0].network, made.state
        return ReleasedStep(network, made.target.model, state.x_syn, state.y_syn, 1e-4, SGD)

    @functools.cached_property
    def draw(self) -> Callable[[], dict[str, Any]]:
        return drawer(self["krrst_fast"], self.scale.b)

    def ours(self, name: str) -> None:
        """Make one step in a way, as a distillation makes it."""
        steps = self._taken_by(name)
        with steps.aside():
            steps()

    def require_replays(self, name: str) -> None:
        """Raise RuntimeError if steps that are to be replayed cannot be captured."""
        taken = self._taken_by(name)
        if isinstance(taken, StaticSteps) and taken.replays.failure:
            raise RuntimeError(taken.replays.failure)

    @functools.cache  # noqa: B019  # one object of the class a process
    def _taken_by(self, name: str) -> PlainSteps | StaticSteps:
        made, way = self[name], self.ways[name]
        options = {"ridge": RIDGE, "ridge_of": "trace", "solver": way.solver}
        kind = StaticSteps if way.replayed else PlainSteps
        return kind(made.state, made.source, RATE, **options)


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
        embed: Features of images by the network of the pool at rest.
        x_syn, y_syn: The synthetic set.
        zero: Clears the gradients of the set.
        loss: The KRR loss of features and targets.
        update: The optimizer step of the set.
        train: The step of the network.
    """

    views: Callable[[], Tensor]
    target: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor], Tensor]
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
        f_syn = self.embed(self.x_syn)
        mark("features of the synthetic images")
        with torch.no_grad():
            f_real = self.embed(x_real)
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
        *(lambda: views(**draw()), made.run, slot.embed, state.x_syn, state.y_syn),
        zero=partial(state.optimizer.zero_grad, set_to_none=True),
        loss=partial(krr_mse, ridge=RIDGE, bias=1.0),
        update=state.optimizer.step,
        train=lambda: state.pool.advance(slot, state.x_syn.detach(), state.y_syn.detach()),
    )


def released_step(theirs: ReleasedStep, draw: Callable[[], dict[str, Any]]) -> Step:
    """Return the same by plain PyTorch."""
    return Step(
        *(lambda: theirs.views(draw()), theirs.target, theirs.network.embed),
        *(theirs.x_syn, theirs.y_syn),
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


def first_step(run: Run, steps: Steps, name: str) -> dict[str, Any]:
    """Make the first step in a way; return the seconds, most of which go into compiling it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        begin = time.perf_counter()
        steps.ours(name)
        run.clock.wait()
    failures = [str(one.message) for one in said if "torch.compile failed" in str(one.message)]
    return {
        "arithmetic": str(steps.ways[name].arithmetic),
        "seconds": time.perf_counter() - begin,
        "not_compiled": failures,
    }


def whole_steps(run: Run, steps: Steps) -> dict[str, Any]:
    """Measure interleaved whole steps: `outer_step` in each way, and the released formulation."""
    theirs = released_step(steps.theirs, steps.draw)
    calls: dict[str, Callable[[], Any]] = {"released": lambda: theirs(Marks(run.device))}
    failed = {}
    for name in steps.ways:
        try:
            for _ in range(3):  # plainly, then captured, then replayed
                steps.ours(name)
            run.clock.wait()
            steps.require_replays(name)
        except Exception as error:  # of one way; the others are measured
            run.clock.require_device(error)
            failed[name] = {"failed": reason(error)}
        else:
            calls[name] = partial(steps.ours, name)
    taken = run.clock.in_turn(calls, seconds=8.0)
    row: dict[str, Any] = {name: one._asdict() for name, one in taken.items()}
    if "krrst_fast" in taken:
        row["times_released"] = taken["released"].ms / taken["krrst_fast"].ms
    return row | failed
