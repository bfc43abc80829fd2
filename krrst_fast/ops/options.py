"""The keywords that the operators share: their names, meanings and defaults, in one place."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict

from torch import Tensor

from krrst_fast import reference
from krrst_fast.backends import BackendName
from krrst_fast.ops import checks
from krrst_fast.planner import Form

RidgeOf = Literal["trace", "mean_diagonal", "absolute"]
Precision = Literal["float64", "float32", "fast"]
Check = Literal["raise", "flag"]


class SolveOptions(TypedDict, total=False):
    """How a ridged gram is solved.

    Attributes:
        ridge: positive; a tensor, a scalar or one number a problem [...], may be learnt. 1e-6.
        ridge_of: lam is `ridge` times the "trace" (the default) of K_ss, its "mean_diagonal", or 1
            ("absolute").
        precision: "float64" | "float32": what everything is computed in, whatever the inputs are;
            the result has the precision of the inputs again. None (the default): that of the
            inputs, and float32 for half precision. "fast": the features are rounded once to 11
            bits (float16 with a power of two of their own), and what follows is exact arithmetic
            on these in float32.
        refine: steps of iterative refinement of each solve, with a float64 residual: 0. Keeps
            K_ss. Nothing to do where the factor is float64 (grams of up to 512 rows).
        max_retries: how often a failed factorisation is tried again with ten times the ridge. 3,
            and 0 for check="flag", where every step of the ladder is climbed, needed or not.
        check: "raise" (the default) looks at the result and raises; "flag" reads nothing back from
            the device: what failed is NaN, and `SolveInfo.failed` tells.
    """

    ridge: float | Tensor
    ridge_of: RidgeOf
    precision: Precision | None
    refine: int
    max_retries: int | None
    check: Check


class FitOptions(SolveOptions, total=False):
    """What is fitted: `SolveOptions`, the kernel, the rows, and who computes.

    Attributes:
        bias: added to every kernel value: a constant feature sqrt(bias), never materialised (but
            with `weights` it is). 0.0.
        scale: multiplies every inner product. 1.0.
        weights: of the rows of F_s [..., M], none negative; those that ask for a gradient positive.
            A whole number is as many equal rows: also in the trace, and `mean_diagonal` is that of
            the repeated rows. None: ones.
        form: the closed form, "k" | "w" | "primal"; "auto" (the default) asks `krrst_fast.plan`.
        backend: "auto" (the default), "cpp", "tuned", "triton", "cuda", "torch" (see README and
            docs/gpu.md), or "reference" (the formula by LU and autograd, whose backward pass
            torch's switches for less precise products do reach).
    """

    bias: float
    scale: float
    weights: Tensor | None
    form: Literal["auto"] | Form
    backend: BackendName


class PredictOptions(FitOptions, total=False):
    """`FitOptions`, and what only a prediction has.

    Attributes:
        detach_ridge: take the trace as a constant (KRR-ST: True, the default) or differentiate
            through it (FRePo).
        out_syn, out_real: outputs of a network at the rows of F_s [..., M, P] and F_r [..., B, P]:
            regress what they leave, `out_real + K_rs A^-1 (Y_s - out_syn)`. Both or neither.
    """

    detach_ridge: bool
    out_syn: Tensor | None
    out_real: Tensor | None


class PathOptions(TypedDict, total=False):
    """What `krr_path` fits: see `SolveOptions` and `FitOptions`."""

    ridge_of: RidgeOf
    bias: float
    scale: float
    weights: Tensor | None


class GramOptions(SolveOptions, total=False):
    """`SolveOptions`, and what a prediction from given grams has; see `PredictOptions`."""

    detach_ridge: bool
    weights: Tensor | None
    out_syn: Tensor | None
    out_real: Tensor | None


class Options(NamedTuple):
    """All keywords with their defaults; each operator takes some of them."""

    ridge: float | Tensor = 1e-6
    ridge_of: RidgeOf = "trace"
    precision: Precision | None = None
    refine: int = 0
    max_retries: int | None = None
    check: Check = "raise"
    bias: float = 0.0
    scale: float = 1.0
    weights: Tensor | None = None
    form: str = "auto"
    backend: BackendName = "auto"
    detach_ridge: bool = True
    out_syn: Tensor | None = None
    out_real: Tensor | None = None

    @property
    def raises(self) -> bool:
        return self.check == "raise"

    @property
    def retries(self) -> int:
        if self.max_retries is None:
            return 3 if self.raises else 0
        return self.max_retries


_DEFAULTS = Options()

# Ten to this power is more than any float64 holds.
_MOST_RETRIES = 700


def takes(kind: type) -> Callable[[Callable], Callable]:
    """Give a function with `**options: Unpack[kind]` the signature that `help` should show."""

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [x for x in signature.parameters.values() if x.kind is not x.VAR_KEYWORD]
        parameters += [
            inspect.Parameter(
                name, keyword, default=getattr(_DEFAULTS, name), annotation=annotation
            )
            for name, annotation in kind.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


def read(op: str, given: Mapping[str, Any], kind: type) -> Options:
    """The keywords of one call, checked one by one.

    Raises:
        TypeError: `op` has no such keyword, or its value is of another type.
        ValueError: a value is none of those that there are.
    """
    if not given:
        return _DEFAULTS
    known = kind.__annotations__
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{op}: has no keyword {name!r}{hint}")
        _CHECKS[name](op, name, value)
    options = Options(**given)
    if (options.out_syn is None) != (options.out_real is None):
        raise ValueError(f"{op}: out_syn and out_real must be given together")
    return options


def _one_of(*names: object) -> Callable[[str, str, Any], None]:
    return lambda op, name, value: checks.one_of(op, name, value, names)


def _count_or_none(op: str, name: str, value: Any) -> None:
    if value is None:
        return
    checks.count(op, name, value)
    if value > _MOST_RETRIES:
        raise ValueError(f"{op}: {name} must be at most {_MOST_RETRIES}, got {value}")


def _dense_or_none(op: str, name: str, value: Any) -> None:
    """Against the other tensors it is checked later."""
    if value is not None:
        checks.dense(op, name, value)


def _word(op: str, name: str, value: Any) -> None:
    """Which words there are, knows who chooses."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a word, got {value!r}")


# Only what is given is looked at: the defaults are right.
_CHECKS: dict[str, Callable[[str, str, Any], None]] = {
    "ridge": checks.ridge,
    "ridge_of": _one_of(*reference.RIDGE_OF),
    "precision": _one_of(None, "float64", "float32", "fast"),
    "refine": checks.count,
    "max_retries": _count_or_none,
    "check": _one_of("raise", "flag"),
    "bias": checks.bias,
    "scale": checks.scale,
    "weights": _dense_or_none,
    "form": _one_of("auto", "k", "w", "primal"),
    "backend": _word,
    "detach_ridge": checks.yes_or_no,
    "out_syn": _dense_or_none,
    "out_real": _dense_or_none,
}
