"""The table of contents of the compiled operators: schema, fallback, shape rule.

Every operator is defined here with `reference` as its implementation on every device; the extension
only adds faster ones for a device. They are not differentiable: they are the parts of which
`krrst_fast.ops` makes functions that are.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.exact import exact_arithmetic
from krrst_fast.factor import (
    FLOAT64_UP_TO,
    SOLVERS,
    Factor,
    Solver,
    cholesky_solve,
    factor_dtype,
    factor_many,
    factor_one,
    factor_unread,
)

# The registrations live as long as this object.
_LIBRARY = torch.library.Library("krrst_fast", "DEF")


def _define(schema: str, fallback: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]

    @functools.wraps(fallback)
    def exactly(x: Tensor, *rest: Any) -> Any:
        with exact_arithmetic(x):
            return fallback(x, *rest)

    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, exactly, "CompositeExplicitAutograd")
    torch.library.register_fake(f"krrst_fast::{name}", fake, lib=_LIBRARY)


def _gram_fake(x: Tensor, scale: float, bias: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]))


def _thin_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _batched_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def _batched_cholesky_fake(k: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    factor = k.new_empty(k.shape, dtype=torch.float64).mT  # column-major, as LAPACK has it
    return factor, k.new_empty((k.shape[0],), dtype=torch.int32)


def _batched_cholesky_solve_fake(y: Tensor, factor: Tensor) -> Tensor:
    return y.new_empty(y.mT.shape).mT


def _cholesky_fake(
    k: Tensor, ridge: Tensor, y: Tensor, float64: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if float64 else k.dtype
    factor = k.new_empty(k.shape, dtype=dtype).mT  # column-major, as LAPACK has it
    return factor, k.new_empty(y.shape, dtype=dtype), k.new_empty((), dtype=torch.int32)


def _factored(k: Tensor, lam: Tensor, retries: int, raises: bool, solver: Solver) -> Factor:
    if not raises:
        return factor_unread(k, lam, retries, solver)
    return (factor_one if k.ndim == 2 else factor_many)(k, lam, retries, solver)


def _by_columns(k: Tensor, raises: bool) -> bool:
    """Whether the factor is stored as LAPACK has it."""
    return k.ndim == 2 and raises and k.shape[0] > FLOAT64_UP_TO


def _ridge_factor_impl(
    k: Tensor, lam: Tensor, retries: int, raises: bool, own: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factor, ridge, count, pivot, inverted = _factored(k, lam, retries, raises, Solver(own, inverse))
    # As the shape rule below says, whoever computed it.
    factor = factor if _by_columns(k, raises) and not own else factor.contiguous()
    inverted = factor.new_empty(0) if inverted is None else inverted.contiguous()
    return factor, ridge, count, pivot, inverted


def _ridge_factor_fake(
    k: Tensor, lam: Tensor, retries: int, raises: bool, own: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factor = k.new_empty(k.shape, dtype=factor_dtype(k))
    inverted = factor.new_empty(k.shape if inverse else (0,))
    if _by_columns(k, raises) and not own:
        factor = factor.mT
    count = torch.empty_like(lam, dtype=torch.int64)
    pivot = torch.empty_like(lam, dtype=torch.int32)
    return factor, torch.empty_like(lam), count, pivot, inverted


def _factored_solve_impl(y: Tensor, factor: Tensor, inverse: Tensor | None, own: bool) -> Tensor:
    return cholesky_solve(y, factor, inverse, own).contiguous()


def _factored_solve_fake(y: Tensor, factor: Tensor, inverse: Tensor | None, own: bool) -> Tensor:
    return y.new_empty(y.shape)


def _traced(x: Tensor) -> bool:
    """Whether x has no values: the dispatcher, which costs as much as a small solve, knows why."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta


def ridge_factor(
    k: Tensor, lam: Tensor, retries: int, raises: bool = True, solver: Solver = SOLVERS["torch"]
) -> Factor:
    """Lower Cholesky factor of k + lam I; a failure is tried again with ten times the ridge.

    Args:
        k: symmetric [N?, M, M], one problem or N of them.
        lam: the ridge [N?].
        retries: how many more times at most.
        raises: look at the result, stop climbing when there is a factor and raise when there is
            none; otherwise nothing is read back from the device.
        solver: who factors, and whether the factor is inverted.

    Raises:
        NonFiniteError: k or lam holds NaN or infinity.
        NotPositiveDefiniteError: lam is negative, or no factor even with the largest ridge.
    """
    if _traced(k):
        found = Factor(*torch.ops.krrst_fast.ridge_factor(k, lam, retries, raises, *solver))
        return found if solver.inverse else found._replace(inverse=None)
    return _factored(k, lam, retries, raises, solver)


def factored_solve(y: Tensor, factor: Tensor, inverse: Tensor | None, own: bool) -> Tensor:
    """(factor factor^T)^-1 y [N?, M, P] in the precision of the factor, rounded to that of y."""
    if _traced(y):
        return torch.ops.krrst_fast.factored_solve(y, factor, inverse, own)
    return cholesky_solve(y, factor, inverse, own)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices or batches of them; in a traced graph, in full precision when it runs."""
    return torch.ops.krrst_fast.matmul(a, b) if torch.compiler.is_compiling() else a @ b


def _views_fake(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    return images.new_empty((index.shape[0], *images.shape[1:]), dtype=torch.float32)


_define("gram(Tensor x, float scale, float bias) -> Tensor", reference.gram, _gram_fake)
_define("thin_matmul(Tensor a, Tensor b) -> Tensor", reference.thin_matmul, _thin_matmul_fake)
_define(
    "batched_matmul(Tensor a, Tensor b) -> Tensor", reference.batched_matmul, _batched_matmul_fake
)
_define(
    "batched_cholesky(Tensor k, Tensor ridge) -> (Tensor, Tensor)",
    reference.batched_cholesky,
    _batched_cholesky_fake,
)
_define(
    "batched_cholesky_solve(Tensor y, Tensor factor) -> Tensor",
    reference.batched_cholesky_solve,
    _batched_cholesky_solve_fake,
)
_define(
    "cholesky(Tensor k, Tensor ridge, Tensor y, bool float64) -> (Tensor, Tensor, Tensor)",
    reference.cholesky,
    _cholesky_fake,
)
_define("matmul(Tensor a, Tensor b) -> Tensor", torch.matmul, _matmul_fake)
_define(
    "ridge_factor(Tensor k, Tensor lam, int retries, bool raises, bool own, bool inverse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ridge_factor_impl,
    _ridge_factor_fake,
)
_define(
    "factored_solve(Tensor y, Tensor factor, Tensor? inverse, bool own) -> Tensor",
    _factored_solve_impl,
    _factored_solve_fake,
)
_define(
    "views(Tensor images, Tensor index, Tensor offset, Tensor flip, int padding, float[] mean, "
    "float[] std) -> Tensor",
    reference.views,
    _views_fake,
)


def _load_extension() -> str:
    """Import the compiled operators; return where they are, or why there are none."""
    switch = os.environ.get("KRRST_FAST_EXTENSION", "auto")
    if switch == "0":
        return "not loaded: KRRST_FAST_EXTENSION=0"
    try:
        return str(importlib.import_module("krrst_fast._C").__file__)
    except ImportError as error:
        if switch == "1":
            raise
        warnings.warn(
            f"krrst_fast: no compiled operators ({error}); plain PyTorch computes",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"not loaded: {error}"


EXTENSION = _load_extension()
"""The file of the compiled operators, or "not loaded: <reason>"."""


def has_extension() -> bool:
    """Whether the compiled operators are loaded."""
    return not EXTENSION.startswith("not loaded")


def _load_cuda_extension() -> str:
    """As `_load_extension` for CUDA tensors; that most machines have none is no warning."""
    if os.environ.get("KRRST_FAST_EXTENSION", "auto") == "0":
        return "not loaded: KRRST_FAST_EXTENSION=0"
    try:
        return str(importlib.import_module("krrst_fast._C_cuda").__file__)
    except ImportError as error:
        return f"not loaded: {error}"


CUDA_EXTENSION = _load_cuda_extension()
"""The file of the operators compiled for CUDA, or "not loaded: <reason>"."""


def has_cuda_extension() -> bool:
    """Whether the operators compiled for CUDA are loaded."""
    return not CUDA_EXTENSION.startswith("not loaded")
