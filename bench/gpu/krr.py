"""The KRR loss of KRR-ST with its gradients: our variants, each interleaved with the released code.

Features are those of a random ReLU layer on 64 latent numbers (`bench.common.features`), whose
ridged Gram has a condition number of some 1e5. Every call finds a cold L2 cache, and none reads
anything back from the device.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.bench_krr import Shape
from bench.bench_krr import inputs as drawn
from bench.common import refusal, relative_error, solving
from bench.gpu import table
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.released import RIDGE, released_mse
from bench.gpu.table import KEPT_EYE, RELEASED
from bench.suite import forward_and_backward, in_double, leaf
from krrst_fast import krr_mse, plan
from krrst_fast.reference import round_features

RESULTS = ("loss", "f_syn", "y_syn")
MANY = 64
"""Targets whose errors together are no luck."""
SECONDS = 1.0
"""For the rounds of a way in turn with the released formulation."""


# The second is the one with the highest goal.
FULL = tuple(
    Shape(m, p, 8192) for m, p in ((1000, 512), (10000, 512), (1000, 10), (2000, 512), (5000, 100))
)
TOY = (Shape(12, 5, 40, 9),)


class Alternative(NamedTuple):
    """A variant of a call of `krr_mse`."""

    backend: str
    precision: str | None = None

    @property
    def name(self) -> str:
        return f"{self.backend}, {self.precision or 'float32'}"

    def call(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        how = solving(**self._asdict(), check="flag")
        loss = partial(krr_mse, ridge=RIDGE, bias=1.0, **how)
        return partial(forward_and_backward, loss, tensors)


def alternatives() -> list[Alternative]:
    """Return the variants, torch's last: a failed capture of its solver ends the process."""
    fast = [Alternative(name, "fast") for name in ("auto", "triton")]
    return [*fast, Alternative("auto"), Alternative("triton"), Alternative("torch")]


def inputs(shape: Shape, device: str) -> list[Tensor]:
    """Draw f_syn, y_syn, which require gradients, f_real, y_real on a device."""
    return [leaf(x, x.to(device)) for x in drawn(shape)]


def units(toy: bool) -> Iterator[Unit]:
    """Yield a unit for each shape."""
    for shape in TOY if toy else FULL:
        yield Unit(f"m {shape.m}, p {shape.p}", partial(rows, shape))


def rows(shape: Shape, run: Run) -> Rows:
    """Yield each variant eagerly, as a graph, and by kernels: "m 1000, p 512: auto, fast"."""
    compared, label = Compared(shape, run), f"m {shape.m}, p {shape.p}: "
    yield f"{label}{RELEASED}", partial(compared.baseline, RELEASED)
    yield f"{label}{KEPT_EYE}", partial(compared.baseline, KEPT_EYE)
    ways = alternatives()
    for way in ways:
        yield f"{label}{way.name}", partial(compared.eager, way)
    for way in ways:
        if not _lacks(run.row(f"{label}{way.name}")):
            yield f"{label}{way.name}, as a graph", partial(compared.replayed, way)
    for way in ways[:2]:
        if not _lacks(run.row(f"{label}{way.name}")):
            yield f"{label}{way.name}, kernels", partial(compared.profiled, way)


def _lacks(row: dict[str, Any] | None) -> bool:
    """Return whether a variant was refused, failed or is wrong."""
    return row is None or "ms" not in row or "wrong" in row


class Compared:
    """One shape: its tensors, made for its first row, and the errors of the variants."""

    def __init__(self, shape: Shape, run: Run) -> None:
        self.shape, self.run = shape, run

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        return inputs(self.shape, self.run.device)

    @functools.cached_property
    def released(self) -> dict[str, Callable[[], Sequence[Tensor]]]:
        eye = torch.eye(self.shape.m, device=self.run.device)
        kept = partial(released_mse, eye=eye)
        formulas = {RELEASED: released_mse, KEPT_EYE: kept}
        return {
            name: partial(forward_and_backward, f, self.tensors) for name, f in formulas.items()
        }

    @functools.cached_property
    def exact(self) -> Sequence[Tensor]:
        """The loss and its gradients in float64."""
        return in_double(self._wide, self.tensors)

    @functools.cached_property
    def exact_rounded(self) -> Sequence[Tensor]:
        """The same for features that are rounded as "fast" rounds them."""
        f_syn, f_real = round_features(self.tensors[0].detach(), self.tensors[2])
        assert f_real is not None
        rounded = [f_syn.requires_grad_(), self.tensors[1], f_real, self.tensors[3]]
        return in_double(self._wide, rounded)

    def _wide(self, *tensors: Tensor) -> Tensor:
        eye = torch.eye(self.shape.m, dtype=torch.float64, device=self.run.device)
        return released_mse(*tensors, eye=eye)

    @functools.cached_property
    def allowed(self) -> float:
        """The largest error of a way that counts as right: twice that of the released formulation.

        With few targets it is an error of few draws, and twice as much is allowed.
        """
        found = errors(self.released[KEPT_EYE](), self.exact)
        return (2 if self.shape.p >= MANY else 4) * max(found.values()) + table.FLOOR

    def baseline(self, name: str) -> dict[str, Any]:
        """Measure the released formulation. That memory does not suffice for it is a result."""
        call = self.released[name]
        try:
            row = self.run.clock.alone(call, seconds=SECONDS)
        except torch.OutOfMemoryError:
            return {"refused": "out of memory"}
        row |= {"error": errors(call(), self.exact), "peak_mb": self.run.clock.peak_mb(call)}
        return row | self._about()

    def _about(self) -> dict[str, Any]:
        chosen = plan(**self.shape._asdict())
        return {
            "shape": self.shape._asdict(),
            "form": chosen.form,
            "gflop": chosen.flops[chosen.form] / 1e9,
        }

    def eager(self, way: Alternative) -> dict[str, Any]:
        """Measure a variant, interleaved with the released formulation."""
        if (why := refusal(way.backend, self.tensors[0].detach())) is not None:
            return {"refused": why}
        call = way.call(self.tensors)
        row: dict[str, Any] = {"error": errors(call(), self.exact)}
        judged = row["error"]
        if way.precision == "fast":
            judged = row["error_rounded"] = errors(call(), self.exact_rounded)
        if not max(judged.values()) <= self.allowed:
            row["wrong"] = [f"error {max(judged.values()):.1e} > {self.allowed:.1e}"]
        calls = {"ours": call, RELEASED: self.released[RELEASED]}
        taken = self.run.clock.in_turn(calls, seconds=SECONDS)
        row |= taken["ours"]._asdict() | {"released_ms": taken[RELEASED].ms}
        row["times_released"] = row["released_ms"] / row["ms"]
        return row | {"peak_mb": self.run.clock.peak_mb(call)}

    def replayed(self, way: Alternative) -> dict[str, Any]:
        """Measure a way captured in a CUDA graph."""
        return self.run.clock.graph(way.call(self.tensors), seconds=0.5)

    def profiled(self, way: Alternative) -> dict[str, Any]:
        """Sum up the kernels of a way: far less of their time than elapsed means host-bound."""
        return self.run.clock.profile(way.call(self.tensors))


def errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> Mapping[str, float]:
    """Compute relative errors of the loss and of the two gradients.

    Raises:
        FloatingPointError: An error is not finite.
    """
    pairs = zip(RESULTS, got, exact, strict=True)
    return {name: relative_error([a], [b]) for name, a, b in pairs}
