"""`Solver`: how a ridged system is solved, passed unchanged from the caller to the kernels."""

from dataclasses import dataclass
from typing import Literal, get_args

RidgeOf = Literal["trace", "mean_diagonal", "absolute"]
Precision = Literal["float64", "float32", "fast"]
FormName = Literal["auto", "k", "w", "primal"]
BackendName = Literal["auto", "cpp", "triton", "torch", "reference"]
Check = Literal["raise", "flag"]

# 10^700 is beyond the range of float64, so that no larger number of retries can change a result.
_MOST_RETRIES = 700


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Settings of a ridged solve: they change speed, rounding and checks, not the exact result.

    Attributes:
        precision: Arithmetic of the whole computation; results have the precision of the inputs.
            None computes in the precision of the inputs, half precision in float32. "float64" and
            "float32" convert the inputs first. "fast" rounds the features once to the 11
            significant bits of float16 (with one power of two as a scale, so that their size does
            not matter) and computes with the rounded features in float32.
        form: Closed form: "k" keeps K_rs, "w" keeps F_s^T alpha, "primal" solves a D x D system;
            "auto" takes the one with the fewest operations (see `krrst_fast.plan`).
        backend: Implementation: "cpp" (CPU), "triton" (CUDA, float32), "torch" (anywhere), or
            "reference" (the formula by LU and autograd). "auto" takes "cpp" on the CPU; on CUDA it
            takes for each step the implementation that was measured to be fastest.
        max_retries: How often a failed Cholesky factorisation is repeated with ten times the ridge.
            None means 3, and 0 for check="flag", where all retries are always computed.
        check: "raise" reads the result back and raises an error on failure. "flag" reads nothing
            back from the device: a failed result is NaN, and `SolveInfo.failed` says so.

    Raises:
        ValueError: A value is not one of those above.
        TypeError: A value has another type.
    """

    precision: Precision | None = None
    form: FormName = "auto"
    backend: BackendName = "auto"
    max_retries: int | None = None
    check: Check = "raise"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", (None, *get_args(Precision))),
            ("form", get_args(FormName)),
            ("backend", get_args(BackendName)),
            ("check", get_args(Check)),
        ):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in allowed:
                raise ValueError(f"Solver: {name} must be one of {list(allowed)}, got {value!r}")
        retries = self.max_retries
        if retries is None:
            return
        if isinstance(retries, bool) or not isinstance(retries, int):
            raise TypeError(f"Solver: max_retries must be a whole number or None, got {retries!r}")
        if not 0 <= retries <= _MOST_RETRIES:
            raise ValueError(
                f"Solver: max_retries must be from 0 to {_MOST_RETRIES}, got {retries}"
            )


DEFAULT = Solver()
