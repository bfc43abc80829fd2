"""What every suite measures, and its rows: a shape, who computes where, in which precision."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from bench.common import (
    THREADS,
    Call,
    interleaved,
    median_seconds,
    peak_mb,
    relative_error,
    waiting,
)
from krrst_fast.backends import BackendName, choose

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Setting:
    """How one row is computed.

    Attributes:
        backend: who computes; the name an op takes.
        device: "cpu" or "cuda".
        dtype: of the inputs.
        options: what else the op is told, such as `precision`.
    """

    backend: BackendName = "auto"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)

    def why_not(self) -> str | None:
        """Why this machine has no such row, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU that torch can use"
        try:
            in_double = self.dtype == torch.float64 or self.options.get("precision") == "float64"
            dtype = torch.float64 if in_double else torch.float32
            choose(self.backend, torch.empty(0, device=self.device, dtype=dtype), "bench")
        except ValueError as error:
            return str(error)
        return None

    def place(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs where they belong, with the numbers of `dtype`."""
        return [leaf(x, x.to(self.device, self.dtype)) for x in tensors]


# Rows are the same on every machine; one that has no GPU, or no extension, skips them.
BACKENDS: dict[str, tuple[BackendName, str]] = {
    "cpp": ("cpp", "cpu"),
    "torch": ("torch", "cpu"),
    "torch-cuda": ("torch", "cuda"),
    "triton-cuda": ("triton", "cuda"),
    "own-cuda": ("cuda", "cuda"),
}
PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float32, float64 inside": (torch.float32, {"precision": "float64"}),
    "float32, refined": (torch.float32, {"refine": 1}),
    "fast": (torch.float32, {"precision": "fast"}),
}
"""By name: the dtype of the inputs, and what the op is told."""

EVERYWHERE = tuple(BACKENDS)
PLAIN = ("float32", "float64")
SPECIAL = ("bfloat16", "float32, float64 inside", "float32, refined", "fast")


def setting(backend: str, precision: str) -> Setting:
    """The row called so."""
    dtype, options = PRECISIONS[precision]
    return Setting(*BACKENDS[backend], dtype, options)


class Case(NamedTuple):
    """One computation, three times: by a backend, by the reference, and by it in float64.

    Calls of `exact` give what the next call of `ours` should. `flops` counts the arithmetic that
    `ours` needs, not that which an implementation happens to do. Where the two sides go different
    ways, `exact_reference` gives what the next call of `reference` should.
    """

    ours: Call
    reference: Call
    exact: Call
    flops: float
    exact_reference: Call | None = None


def leaf(like: Tensor, x: Tensor) -> Tensor:
    """A tensor with these numbers that asks for a gradient if the other one does."""
    return x.detach().requires_grad_(like.requires_grad)


def forward_and_backward(
    forward: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """The result, and the gradients to the tensors that ask for one.

    The gradients are those of the result if it is a number, and else of half its square.
    """
    result = forward(*tensors)
    wanted = [x for x in tensors if x.requires_grad]
    if not wanted:
        return (result,)
    outer = result.detach() if result.dim() else None
    return (result.detach(), *torch.autograd.grad(result, wanted, grad_outputs=outer))


def in_double(plain: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same computation in float64. The wide copies live no longer than the call."""
    return forward_and_backward(plain, [leaf(x, x.double()) for x in tensors])


def _widened(plain: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """What the formula is for features of half precision: nobody solves in that."""
    return plain(*(x.float() if x.dtype in HALF else x for x in tensors))


def compared(
    how: Setting,
    tensors: Sequence[Tensor],
    *,
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    flops: float,
) -> Case:
    """Two functions of the same tensors, with the gradients to those that ask for them."""
    placed = how.place(tensors)
    return Case(
        ours=partial(forward_and_backward, ours, placed),
        reference=partial(forward_and_backward, partial(_widened, plain), placed),
        exact=partial(in_double, plain, placed),
        flops=flops,
    )


def skip(reason: str) -> NoReturn:
    """Make the row n/a."""
    from asv_runner.benchmarks.mark import SkipNotImplemented

    raise SkipNotImplemented(reason)


class Comparison(ABC):
    """What every suite measures. asv skips abstract classes, so this one it does not run.

    For asv less is always better, so the ratio is ours / reference: 0.5 is twice as fast.
    `track_tflops` alone is to be read the other way round; leave it out of `asv continuous`.
    """

    against: ClassVar[str]
    """What the reference does, in a few words."""
    param_names = ("shape", "backend", "precision")
    params: tuple[Sequence[Any], Sequence[str], Sequence[str]]
    timeout = 1800
    rounds = 1
    repeat = (2, 8, 2.0)
    warmup_time = 0.0
    seconds = 3.0
    """How long the calls take turns."""
    at_least = 5
    """How often they do."""

    @abstractmethod
    def case(self, shape: Any, how: Setting) -> Case:
        """The computation at this shape, which can be done here."""

    def setup(self, shape: Any, backend: str, precision: str) -> None:
        """Make the inputs, and call once."""
        how = setting(backend, precision)
        reason = how.why_not()
        if reason is not None:
            skip(reason)
        torch.set_num_threads(THREADS)
        try:
            case = self.case(shape, how)
        except ImportError as error:
            # These benchmarks also run against older commits, and without the peers.
            skip(str(error))
        self._device = how.device
        self._ours = waiting(case.ours, how.device)
        self._reference = waiting(case.reference, how.device)
        self._exact, self._flops = case.exact, case.flops
        self._exact_reference = case.exact_reference or case.exact
        self._ours()

    def time_call(self, shape: Any, backend: str, precision: str) -> None:
        self._ours()

    def track_ratio_to_reference(self, shape: Any, backend: str, precision: str) -> float:
        timing = interleaved(
            self._ours, self._reference, seconds=self.seconds, at_least=self.at_least
        )
        return timing.ours / timing.reference

    def track_error(self, shape: Any, backend: str, precision: str) -> float:
        exact = self._exact()
        return relative_error(self._ours(), exact)

    def track_reference_error(self, shape: Any, backend: str, precision: str) -> float:
        exact = self._exact_reference()
        return relative_error(self._reference(), exact)

    def track_peak_mb(self, shape: Any, backend: str, precision: str) -> float:
        return peak_mb(self._ours, self._device)

    def track_tflops(self, shape: Any, backend: str, precision: str) -> float:
        return self._flops / median_seconds(self._ours, seconds=self.seconds / 3) / 1e12

    track_ratio_to_reference.unit = "of the reference's time"  # type: ignore[attr-defined]
    track_error.unit = "relative to float64"  # type: ignore[attr-defined]
    track_reference_error.unit = "relative to float64"  # type: ignore[attr-defined]
    track_peak_mb.unit = "MB"  # type: ignore[attr-defined]
    track_tflops.unit = "TFLOP/s"  # type: ignore[attr-defined]
