"""The KRR loss of KRR-ST with its gradients: every backend, in turn with the released one.

Features are those of a random ReLU layer on 64 latent numbers (`bench.common.features`), whose
ridged Gram has a condition number of some 1e5. Every call finds a cold L2 cache.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import features
from bench.gpu import table
from bench.gpu.clock import Sample, error_of, reason
from bench.gpu.released import RIDGE, released_mse
from bench.gpu.stage import Run
from bench.gpu.table import KEPT_EYE, RELEASED
from bench.suite import forward_and_backward, in_double
from krrst_fast import krr_mse, plan
from krrst_fast.backends import choose
from krrst_fast.reference import round_features
from krrst_fast.seeding import generator

BACKENDS = ("torch", "triton", "cuda", "tuned")
PRECISIONS = (None, "fast", "float64")
RESULTS = ("loss", "f_syn", "y_syn")
PROFILED = 5
"""Calls in a profile."""


class Shape(NamedTuple):
    """M synthetic images, P target features, D features, B real images."""

    m: int
    p: int
    d: int = 8192
    b: int = 1024


FULL = (Shape(1000, 512), Shape(1000, 10), Shape(2000, 512), Shape(10000, 512), Shape(5000, 100))
TOY = (Shape(12, 5, 40, 9), Shape(50, 5, 40, 9))
TO_PROFILE = (*FULL[:2], TOY[0])
SECONDS = {FULL[3]: 8.0, FULL[4]: 5.0}
"""For the rounds of a shape; 3 for the others."""
LOOKED_AT = 2000
"""Systems of up to so many rows are also solved with a look at whether there is a factor."""


class Alternative(NamedTuple):
    """A way to call `krr_mse`."""

    backend: str
    precision: str | None
    check: str
    form: str = "auto"

    @property
    def name(self) -> str:
        form = "" if self.form == "auto" else f", form {self.form}"
        return f"{self.backend}, {self.precision or 'float32'}, {self.check}{form}"

    @property
    def family(self) -> str:
        """What is left out if one of them takes the process with it."""
        return f"krr {self.backend} {self.precision or 'float32'}"

    def call(self, tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        options: dict[str, Any] = self._asdict() | {"ridge": RIDGE, "bias": 1.0}
        ours = partial(krr_mse, **options)
        return partial(forward_and_backward, ours, tensors)


def alternatives(shape: Shape, device: str) -> list[Alternative]:
    """All there are; what this machine has not refuses."""
    backends = (*BACKENDS, *(("cpp",) if device == "cpu" else ()))
    # Beside what a large system takes, reading a number back takes no time.
    checks = ("raise", "flag") if shape.m <= LOOKED_AT else ("flag",)
    ways = [Alternative(b, p, c) for b in backends for p in PRECISIONS for c in checks]
    # The planner counts work; which form is faster on a GPU is a question of its own.
    other = {"k": "w", "w": "k"}.get(plan(**shape._asdict()).form)
    own = ("cuda", "cpp") if other and shape.m <= LOOKED_AT else ()
    return ways + [Alternative(b, "fast", "flag", other) for b in own if b in backends and other]


def inputs(shape: Shape, device: str) -> list[Tensor]:
    """f_syn, y_syn, which ask for gradients, f_real, y_real."""
    f_syn, f_real = (f.to(device) for f in features(shape.m, shape.b, columns=shape.d))
    draw = generator(0, "targets")
    y_syn, y_real = (torch.randn(n, shape.p, generator=draw).to(device) for n in (shape.m, shape.b))
    return [f_syn.requires_grad_(), y_syn.requires_grad_(), f_real, y_real]


def measure(run: Run) -> None:
    """A row a shape."""
    table.install(run.out, run.notes.key)
    for shape in TOY if run.toy else FULL:
        run.row(f"m {shape.m}, p {shape.p}", partial(compare, run, shape))


def compare(run: Run, shape: Shape) -> dict[str, Any]:
    """Everybody at one shape."""
    tensors = inputs(shape, run.device)
    ways = {way.name: way for way in alternatives(shape, run.device)}
    refused = {name: why for name, way in ways.items() if (why := refusal(way, tensors[0]))}
    calls = {name: way.call(tensors) for name, way in ways.items() if name not in refused}
    eye = torch.eye(shape.m, device=run.device)
    released = {
        RELEASED: partial(forward_and_backward, released_mse, tensors),
        KEPT_EYE: partial(forward_and_backward, partial(released_mse, eye=eye), tensors),
    }
    families = {name: ways[name].family for name in calls}
    taken = run.clock.in_turn(released | calls, seconds=SECONDS.get(shape, 3.0), names=families)
    row = described(shape, tensors)
    row["released"] = {name: _told(taken[name]) for name in released}
    row["ours"] = {name: {"refused": why} for name, why in refused.items()}
    row["ours"] |= {name: _told(taken[name]) for name in calls}
    _errors(run, shape, tensors, released, calls, row)
    for name, call in calls.items():
        one = row["ours"][name]
        if "ms" in one:
            one["peak_mb"] = run.clock.peak_mb(call)
            one["times_released"] = row["released"][RELEASED].get("ms", 0.0) / one["ms"]
            one["times_kept_eye"] = row["released"][KEPT_EYE].get("ms", 0.0) / one["ms"]
            if ways[name].check == "flag":
                one["graph"] = graph(run, call, ways[name].family)
    for name, call in released.items():
        if "ms" in row["released"][name]:
            row["released"][name]["peak_mb"] = run.clock.peak_mb(call)
    everybody = {**row["released"], **row["ours"]}
    row["wrong"] = [f"{name}: {one['failed']}" for name, one in everybody.items() if _bad(one)]
    best = table.best(row)
    if shape in TO_PROFILE and best is not None:
        row["profile"] = {"of": best, "kernels": profile(run, calls[best])}
    return row


def refusal(way: Alternative, x: Tensor) -> str | None:
    """Why a backend does not compute this, or None."""
    x = x.detach().double() if way.precision == "float64" else x.detach()
    try:
        choose(way.backend, x, "bench")
    except ValueError as error:
        return str(error)
    return None


def described(shape: Shape, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The shape, its closed form, and how badly conditioned it is."""
    chosen = plan(**shape._asdict())
    with torch.no_grad():
        _, info = krr_mse(
            *tensors, ridge=RIDGE, bias=1.0, backend="torch", check="flag", return_info=True
        )
    row: dict[str, Any] = {"shape": shape._asdict(), "form": chosen.form}
    return row | {"gflop": chosen.flops[chosen.form] / 1e9, "condition": info.condition.item()}


def _told(one: Sample | str) -> dict[str, Any]:
    return one._asdict() if isinstance(one, Sample) else {"failed": one}


def _bad(one: dict[str, Any]) -> bool:
    return "failed" in one and one["failed"] != "out of memory"


def _errors(
    run: Run,
    shape: Shape,
    tensors: Sequence[Tensor],
    released: Mapping[str, Callable],
    calls: Mapping[str, Callable],
    row: dict[str, Any],
) -> None:
    """Against float64: of the problem, and for rounded features of the problem with these."""
    plain = partial(released_mse, eye=torch.eye(shape.m, device=run.device).double())
    exact, why = run.clock.tried(lambda: in_double(plain, tensors))
    rounded = None
    if exact is not None:
        f_syn, f_real = round_features(tensors[0].detach(), tensors[2])
        assert f_real is not None
        near = [f_syn.requires_grad_(), tensors[1], f_real, tensors[3]]
        rounded, why = run.clock.tried(lambda: in_double(plain, near))
    if exact is None or rounded is None:
        row["no_errors"] = why
        return
    for told, those in ((row["released"], released), (row["ours"], calls)):
        for name, call in those.items():
            if "ms" not in told[name]:
                continue
            got = call()
            told[name]["error"] = errors(got, exact)
            if ", fast, " in name:
                told[name]["error_rounded"] = errors(got, rounded)


def errors(got: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float | str]:
    """Relative errors of the loss and of the two gradients."""
    return {name: error_of(a, b) for name, a, b in zip(RESULTS, got, exact, strict=True)}


def graph(run: Run, call: Callable[[], Sequence[Tensor]], family: str) -> dict[str, Any]:
    """The same call captured once and replayed: its time, and whether the bits are the same."""
    if run.device != "cuda":
        return {"refused": "there are no graphs on a CPU"}

    def capture() -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = call()
        return captured, result

    plain = [x.clone() for x in call()]
    found, why = run.clock.tried(capture, f"graph of {family}")
    if found is None:
        return {"failed": why}
    captured, result = found
    for x in result:
        x.fill_(float("nan"))
    captured.replay()
    run.clock.wait()
    same = all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))
    taken = run.clock.in_turn({"replay": captured.replay}, seconds=0.3)["replay"]
    del captured, result, found
    run.clock.free()
    return {**_told(taken), "same_bits": same}


def profile(run: Run, call: Callable[[], Any]) -> list[dict[str, Any]] | str:
    """The kernels that take most of a call: name, launches, milliseconds."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if run.device == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=kinds) as found:
            for _ in range(PROFILED):
                call()
            run.clock.wait()
        return top(found.key_averages(), run.device)
    except RuntimeError as error:
        return reason(error)


def top(events: Any, device: str, count: int = 12) -> list[dict[str, Any]]:
    """The events with most time of their own, a call."""
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    ranked = sorted(events, key=lambda event: getattr(event, field), reverse=True)[:count]
    return [
        {
            "name": event.key[:100],
            "launches": event.count / PROFILED,
            "ms": getattr(event, field) / PROFILED / 1e3,
        }
        for event in ranked
    ]
