"""The table of contents of the compiled operators: schema, fallback, shape rule.

Every operator is defined here with `reference` as its implementation on every device; the extension
only adds faster ones for a device. They are not differentiable: they are the parts of which
`krrst_fast.ops` makes functions that are.
"""

import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError

RIDGE_FACTOR = 10.0
"""By how much a retry of `ridge_factor` raises the ridge."""

FLOAT64_UP_TO = 512
"""Grams of at most this many rows are factored in float64, whatever their own precision."""

_log = logging.getLogger("krrst_fast")

# The registrations live as long as this object.
_LIBRARY = torch.library.Library("krrst_fast", "DEF")


def _define(schema: str, fallback: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(f"krrst_fast::{name}", fake, lib=_LIBRARY)


def _gram_fake(x: Tensor, scale: float, bias: float) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]))


def _thin_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]))


def _batched_matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def _batched_cholesky_fake(k: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    factor = torch.empty_like(k, dtype=torch.float64)
    return factor, k.new_empty((k.shape[0],), dtype=torch.int32)


def _batched_cholesky_solve_fake(y: Tensor, factor: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def factor_dtype(k: Tensor) -> torch.dtype:
    """The precision k [M, M] is factored in: float64 as long as it costs nothing beside k."""
    return torch.float64 if k.shape[0] <= FLOAT64_UP_TO else k.dtype


def factored_solve(y: Tensor, factor: Tensor) -> Tensor:
    """(factor factor^T)^-1 y in the precision of the factor, rounded to that of y."""
    if y.dtype == factor.dtype:
        return torch.cholesky_solve(y, factor)
    return torch.cholesky_solve(y.to(factor.dtype), factor).to(y.dtype)


def _ridge_factor(k: Tensor, lam: Tensor, retries: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = factor_dtype(k)
    factor = torch.empty_like(k, dtype=dtype).mT
    info = torch.empty((), dtype=torch.int32, device=k.device)
    ridge = lam.clone()
    _require_ridge(lam)
    for attempt in range(retries + 1):
        factor.mT.copy_(k)
        factor.diagonal().add_(ridge)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        # NaN passes the test of a pivot in some builds of LAPACK
        if info.item() == 0 and math.isfinite(factor.diagonal().sum().item()):
            if attempt:
                _log.warning("ridge_factor: ridge raised %d times to %.3g", attempt, ridge.item())
            return factor, ridge, torch.full((), attempt, device=k.device)
        if attempt < retries:
            ridge = ridge * RIDGE_FACTOR
    if not bool(k.isfinite().all()):
        raise NonFiniteError("ridge_factor: the gram holds NaN or infinity")
    if lam.item() == 0:
        raise NotPositiveDefiniteError(
            "ridge_factor: the ridge is 0, and so the trace it follows: the features are zero, or "
            "their squares underflow; scale them up, or pass ridge_of='absolute'"
        )
    name = str(dtype).removeprefix("torch.")
    raise NotPositiveDefiniteError(
        f"ridge_factor: k + {ridge.item():.3g} * I [{len(k)}, {len(k)}] ({name}) has a "
        f"non-positive pivot at row {max(info.item() - 1, 0)} after raising the ridge {retries} "
        f"times from {lam.item():.3g}; pass a larger ridge or float64"
    )


def _require_ridge(lam: Tensor) -> None:
    value = lam.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"ridge_factor: the ridge is {value}: it, or the trace, is not finite")
    if value < 0:
        raise ValueError(f"ridge_factor: the ridge must be positive, got {value:.3g}")


def _ridge_factor_fake(k: Tensor, lam: Tensor, retries: int) -> tuple[Tensor, Tensor, Tensor]:
    count = lam.new_empty((), dtype=torch.int64)
    factor = torch.empty_like(k, dtype=factor_dtype(k)).mT
    return factor, torch.empty_like(lam), count


def ridge_factor(k: Tensor, lam: Tensor, retries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower Cholesky factor of k + lam I; a failure is tried again with ten times the ridge.

    Args:
        k: symmetric [M, M].
        lam: the ridge [].
        retries: how many more times at most.

    Returns:
        The factor [M, M] (column-major, as LAPACK wants it), the ridge that was used [], and how
        many times it was raised (int64 []).

    Raises:
        NonFiniteError: k or lam holds NaN or infinity.
        ValueError: lam is negative.
        NotPositiveDefiniteError: no factor even with the largest ridge.
    """
    # The dispatcher costs as much as a small factorisation: only where a graph is traced.
    if torch.compiler.is_compiling() or type(k) is not Tensor or k.device.type == "meta":
        return torch.ops.krrst_fast.ridge_factor(k, lam, retries)
    return _ridge_factor(k, lam, retries)


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
    "ridge_factor(Tensor k, Tensor lam, int retries) -> (Tensor, Tensor, Tensor)",
    _ridge_factor,
    _ridge_factor_fake,
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
