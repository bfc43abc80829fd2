"""What every suite measures, and its rows: shape, backend with device, precision."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bench.common import THREADS, Call, medians, peak_mb, refusal, relative_error, solving, waiting
from krrst_fast.ops.solver import BackendName

HALF = (torch.float16, torch.bfloat16)
# Rows are the same on every machine; without a GPU, or the extension, some are skipped.
BACKENDS: dict[str, tuple[BackendName, str]] = {
    "cpp": ("cpp", "cpu"),
    "torch": ("torch", "cpu"),
    "torch-cuda": ("torch", "cuda"),
    "triton-cuda": ("triton", "cuda"),
    "auto-cuda": ("auto", "cuda"),
}
PRECISIONS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "bfloat16": (torch.bfloat16, None),
    "float32, float64 inside": (torch.float32, "float64"),
    "fast": (torch.float32, "fast"),
}
"""By name: dtype of the inputs, and precision of the computation."""

EVERYWHERE = tuple(BACKENDS)
PLAIN = ("float32", "float64")
SPECIAL = ("bfloat16", "float32, float64 inside", "fast")


class Setting(NamedTuple):
    """Backend, device ("cpu" or "cuda"), dtype of the inputs, precision of the computation."""

    backend: BackendName = "auto"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    precision: str | None = None

    def why_not(self) -> str | None:
        """Return why this machine cannot compute so, or None."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "there is no GPU that torch can use"
        in_double = self.dtype == torch.float64 or self.precision == "float64"
        dtype = torch.float64 if in_double else torch.float32
        return refusal(self.backend, torch.empty(0, device=self.device, dtype=dtype))

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of an operation."""
        return solving(self.backend, precision=self.precision)

    def place(self, *tensors: Tensor) -> list[Tensor]:
        """Move tensors to the device and dtype."""
        return [leaf(x, x.to(self.device, self.dtype)) for x in tensors]


class Case(NamedTuple):
    """One computation by krrst_fast, by the reference, and exactly (in float64).

    `flops` counts the arithmetic that is needed, not that of an implementation. If the calls have
    state, `exact` is the result of the next call of `ours`, and `exact_reference` that of the next
    call of `reference`.
    """

    ours: Call
    reference: Call
    exact: Call
    flops: float
    exact_reference: Call | None = None


def leaf(like: Tensor, x: Tensor) -> Tensor:
    """Detach x; the result requires a gradient if `like` does."""
    return x.detach().requires_grad_(like.requires_grad)


def forward_and_backward(
    forward: Callable[..., Tensor | Sequence[Tensor]], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Compute the result, and the gradients to the tensors that require one.

    The gradients are those of the result if it is a scalar, and else of half its square.
    """
    result = forward(*tensors)
    if not isinstance(result, Tensor):
        return result
    wanted = [x for x in tensors if x.requires_grad]
    if not wanted:
        return (result,)
    outer = result.detach() if result.dim() else None
    return (result.detach(), *torch.autograd.grad(result, wanted, grad_outputs=outer))


def in_double(plain: Callable[..., Any], tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Call `plain` and its backward pass on float64 copies, which are freed afterwards."""
    return forward_and_backward(plain, [leaf(x, x.double()) for x in tensors])


def _widened(plain: Callable[..., Any], *tensors: Tensor) -> Any:
    """Compute in float32 for features in half precision: torch has no half-precision solve."""
    return plain(*(x.float() if x.dtype in HALF else x for x in tensors))


def compared(
    tensors: Sequence[Tensor],
    *,
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    flops: float,
    exact: Callable[..., Any] | None = None,
) -> Case:
    """Compare two functions of the same tensors, and their gradients to those that require one.

    Args:
        tensors: The arguments.
        ours: The function of krrst_fast.
        plain: The reference.
        flops: FLOPs that the computation needs.
        exact: The function that is exact in float64, if not `plain`.
    """
    return Case(
        ours=partial(forward_and_backward, ours, tensors),
        reference=partial(forward_and_backward, partial(_widened, plain), tensors),
        exact=partial(in_double, exact or plain, tensors),
        flops=flops,
    )


class Comparison(ABC):
    """Measurements of a suite. asv skips abstract classes, such as this one.

    In asv less is better, so the ratio is ours / reference: 0.5 is twice as fast. Only for
    `track_tflops` more is better; leave it out of `asv continuous`.
    """

    against: ClassVar[str]
    """What the reference is, in a few words."""
    param_names = ("shape", "backend", "precision")
    params: tuple[Sequence[Any], Sequence[str], Sequence[str]]
    timeout = 1800
    rounds = 1
    repeat = (2, 8, 2.0)
    warmup_time = 0.0
    seconds = 3.0
    """Duration of the interleaved calls."""
    at_least = 5
    """Smallest number of calls of each side."""
    seed = 0
    """Seed of the inputs, where a suite has several draws."""

    @abstractmethod
    def case(self, shape: Any, how: Setting) -> Case:
        """Return the computation at a shape.

        Raises:
            ImportError: The reference is not installed.
        """

    def setup(self, shape: Any, backend: str, precision: str) -> None:
        """Make the inputs, and call once."""
        from asv_runner.benchmarks.mark import SkipNotImplemented

        how = Setting(*BACKENDS[backend], *PRECISIONS[precision])
        if (reason := how.why_not()) is not None:
            raise SkipNotImplemented(reason)
        torch.set_num_threads(THREADS)
        try:
            case = self.case(shape, how)
        except ImportError as error:
            raise SkipNotImplemented(str(error)) from error
        self._device = how.device
        self._ours = waiting(case.ours, how.device)
        self._reference = waiting(case.reference, how.device)
        self._exact, self._flops = case.exact, case.flops
        self._exact_reference = case.exact_reference or case.exact
        self._ours()

    def time_call(self, shape: Any, backend: str, precision: str) -> None:
        self._ours()

    def track_ratio_to_reference(self, shape: Any, backend: str, precision: str) -> float:
        calls = self._ours, self._reference
        ours, reference = medians(*calls, seconds=self.seconds, at_least=self.at_least)
        return ours / reference

    def track_error(self, shape: Any, backend: str, precision: str) -> float:
        exact = self._exact()
        return relative_error(self._ours(), exact)

    def track_reference_error(self, shape: Any, backend: str, precision: str) -> float:
        exact = self._exact_reference()
        return relative_error(self._reference(), exact)

    def track_peak_mb(self, shape: Any, backend: str, precision: str) -> float:
        return peak_mb(self._ours, self._device)

    def track_tflops(self, shape: Any, backend: str, precision: str) -> float:
        (seconds,) = medians(self._ours, seconds=self.seconds / 3, at_least=3)
        return self._flops / seconds / 1e12

    track_ratio_to_reference.unit = "of the reference's time"  # type: ignore[attr-defined]
    track_error.unit = "relative to float64"  # type: ignore[attr-defined]
    track_reference_error.unit = "relative to float64"  # type: ignore[attr-defined]
    track_peak_mb.unit = "MB"  # type: ignore[attr-defined]
    track_tflops.unit = "TFLOP/s"  # type: ignore[attr-defined]
