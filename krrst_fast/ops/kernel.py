"""`Kernel`: which function of two rows the Gram matrices hold."""

import sys
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from krrst_fast.ops.autograd import needs_composite
from krrst_fast.ops.problem import Problem, check_ridge, fold, number, readable
from krrst_fast.reference.kernels import OF_PRODUCTS

KernelName = Literal["linear", "polynomial", "rbf", "cosine", "arccos"]

# Beyond this power a float64 close to 1 overflows or vanishes.
_MOST_DEGREE = 100


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel k(x, y) of two rows of D features.

    The Gram matrices of an operator are scale k(x, y) + bias.

    | name | k(x, y) |
    |---|---|
    | "linear" | <x, y> |
    | "polynomial" | (gamma <x, y> + coef0)^degree |
    | "rbf" | exp(-gamma |x - y|^2) |
    | "cosine" | <x, y> / (|x| |y|), 0 where a row is zero |
    | "arccos" | |x| |y| (sin t + (pi - t) cos t) / pi with the angle t: an infinitely wide layer of ReLUs (Cho and Saul 2009) |

    Attributes:
        name: One of these.
        gamma: Positive number, or a tensor [...], one for each problem, which may require a
            gradient; None is 1 / D. Of "polynomial" and "rbf".
        degree: Whole number from 1 to 100. Of "polynomial".
        coef0: Finite number; with a negative one the kernel may not be positive definite. Of
            "polynomial".

    Raises:
        ValueError: A value is not one of those above, or gamma is given for another kernel.
        TypeError: A value has another type.
    """  # noqa: E501

    name: KernelName = "linear"
    gamma: float | Tensor | None = None
    degree: int = 3
    coef0: float = 1.0

    def __post_init__(self) -> None:
        check_name("Kernel", "name", self.name)
        if self.gamma is not None:
            if self.name not in ("polynomial", "rbf"):
                need = "gamma must be None with"
                raise ValueError(f"Kernel: {need} {self.name!r}, got {self.gamma!r}")
            check_ridge("Kernel", self.gamma, "gamma")
            self._check_tensor()
        if isinstance(self.degree, bool) or not isinstance(self.degree, int):
            raise TypeError(f"Kernel: degree must be a whole number, got {self.degree!r}")
        if not 1 <= self.degree <= _MOST_DEGREE:
            raise ValueError(f"Kernel: degree must be from 1 to {_MOST_DEGREE}, got {self.degree}")
        if not abs(number("Kernel", "coef0", self.coef0)) <= sys.float_info.max:
            raise ValueError(f"Kernel: coef0 must be finite, got {self.coef0}")

    def _check_tensor(self) -> None:
        gamma = self.gamma
        if isinstance(gamma, Tensor) and readable(gamma) and not gamma.isfinite().all():
            raise ValueError(f"Kernel: gamma must be finite, got {gamma.detach().max().item():.3g}")

    @property
    def of_products(self) -> bool:
        """Whether it is computed from inner products and norms, and is not a linear kernel."""
        return self.name in OF_PRODUCTS


def check_name(op: str, what: str, name: object) -> None:
    """Check the name of a kernel."""
    names = list(get_args(KernelName))
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{op}: {what} must be one of {names}, got {name!r}")


LINEAR = Kernel()


def as_kernel(op: str, kernel: str | Kernel) -> Kernel:
    """Return a kernel that may be given by its name."""
    if isinstance(kernel, Kernel):
        return kernel
    if not isinstance(kernel, str):
        raise TypeError(f"{op}: kernel must be a name or a Kernel, got {kernel!r}")
    check_name(op, "kernel", kernel)
    return Kernel(kernel)  # type: ignore[arg-type]


def of_unit_length(problem: Problem) -> Problem:
    """Return the problem of rows divided by their length: the cosine is their linear kernel."""
    f_syn, _, f_real, *_ = problem
    real = None if f_real is None else unit_rows(f_real)
    return problem._replace(f_syn=unit_rows(f_syn), f_real=real)


def unit_rows(f: Tensor) -> Tensor:
    """Return the rows of f [..., D] divided by their length; a row of zeros stays.

    The squares of the numbers may lie outside of their range. A row of zeros has no gradient: 0 is
    taken for it.
    """
    if f.shape[-1] == 0:
        return f
    largest = f.detach().abs().amax(-1, keepdim=True)
    none = largest == 0
    scaled = f / torch.where(none, 1, largest)
    # A zero row of another value, so that the square root has a derivative.
    length = torch.where(none, 1, scaled).square().sum(-1, keepdim=True).sqrt()
    return torch.where(none, 0, scaled / length)


class Rows(NamedTuple):
    """Rows of features as a kernel takes them.

    Attributes:
        x: [N?, I, D], for "rbf" less the mean of F_s: distances stay, and their rounding shrinks.
        given: The same without a gradient and with no mean subtracted, whose differences are exact.
    """

    x: Tensor
    given: Tensor


def rows_of(kernel: Kernel, f: Tensor, mean: Tensor | None) -> Rows:
    """Return the rows of features [N?, I, D] for a kernel and the mean [N?, 1, D] of F_s."""
    if needs_composite() or torch.compiler.is_compiling():
        f = f.double()  # no differences of near rows are taken there
    return Rows(f if mean is None else f - mean.to(f.dtype), f.detach())


def mean_of(kernel: Kernel, f_syn: Tensor) -> Tensor | None:
    """Return the mean of the rows of F_s [N?, M, D] as a constant [N?, 1, D], or None for 0."""
    x = f_syn.detach()
    if kernel.name != "rbf" or x.shape[-2] == 0:
        return None
    return x.mean(-2, keepdim=True, dtype=torch.float64)


def gamma_of(kernel: Kernel, f: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return gamma in float64 [N?] for features f [N?, I, D]."""
    if isinstance(kernel.gamma, Tensor):
        return fold(kernel.gamma.to(device=f.device, dtype=torch.float64), batch, 0)
    gamma = 1 / max(f.shape[-1], 1) if kernel.gamma is None else float(kernel.gamma)
    return f.new_full(f.shape[:-2], gamma, dtype=torch.float64)
