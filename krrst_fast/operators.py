"""The compiled operators: schema, fallback and shape rule of each; loading of the extension.

Every operator is defined with `reference` as its implementation on every device; the extension adds
faster ones for a device. They are not differentiable: `krrst_fast.ops` makes differentiable
functions of them.
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
from krrst_fast.cholesky import FLOAT64_UP_TO, Method, factor_dtype, factored, solve
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference import kernels
from krrst_fast.triangular import inverse_shape

# The registrations live as long as this object.
_LIBRARY = torch.library.Library("krrst_fast", "DEF")


def define(schema: str, fallback: Callable, fake: Callable) -> None:
    """Define an operator: its schema, what computes it on every device, and its shape rule."""
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


def _by_columns(k: Tensor, raises: bool, own_up_to: int) -> bool:
    """Return whether the factor is stored as LAPACK stores it."""
    return k.ndim == 2 and raises and k.shape[0] > FLOAT64_UP_TO and k.shape[0] > own_up_to


def _ridge_factor(
    k: Tensor,
    lam: Tensor,
    retries: int,
    raises: bool,
    own_up_to: int,
    inverse: bool,
    substitution: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    method = Method(own_up_to, inverse, substitution)
    factor, ridge, count, pivot, inverted = factored(k, lam, retries, raises, method)
    # The layout that the shape rule below promises, whichever implementation computed.
    factor = factor if _by_columns(k, raises, own_up_to) else factor.contiguous()
    inverted = factor.new_empty(0) if inverted is None else inverted.contiguous()
    return factor, ridge, count, pivot, inverted


def _ridge_factor_fake(
    k: Tensor,
    lam: Tensor,
    retries: int,
    raises: bool,
    own_up_to: int,
    inverse: bool,
    substitution: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factor = k.new_empty(k.shape, dtype=factor_dtype(k))
    whole = k.ndim == 2 and FLOAT64_UP_TO < k.shape[0] <= own_up_to
    blocks = (*k.shape[:-2], *inverse_shape(k.shape[-1], whole))
    inverted = factor.new_empty(blocks if inverse else (0,))
    if _by_columns(k, raises, own_up_to):
        factor = factor.mT
    count = torch.empty_like(lam, dtype=torch.int64)
    pivot = torch.empty_like(lam, dtype=torch.int32)
    return factor, torch.empty_like(lam), count, pivot, inverted


def _factored_solve(
    y: Tensor,
    factor: Tensor,
    inverse: Tensor | None,
    own_up_to: int,
    inverted: bool,
    substitution: bool,
) -> Tensor:
    method = Method(own_up_to, inverted, substitution)
    return solve(y, factor, inverse, method).contiguous()


def _factored_solve_fake(
    y: Tensor,
    factor: Tensor,
    inverse: Tensor | None,
    own_up_to: int,
    inverted: bool,
    substitution: bool,
) -> Tensor:
    return y.new_empty(y.shape)


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


def _kernel_values_fake(products: Tensor, *rest: Any) -> Tensor:
    return products.new_empty(products.shape)


def _kernel_slopes_fake(products: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *many, rows, columns = products.shape
    values = products.new_empty(products.shape if rest[-1] else (0,))
    own, column = (products.new_empty((*many, size)) for size in (rows, columns))
    numbers = (
        products.new_empty(size, dtype=dtype)
        for size, dtype in ((many, torch.float64), ((), torch.int64))
    )
    return values, products.new_empty(products.shape), own, column, *numbers


def _krr_forward(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor | None, *kernel: Any
) -> tuple[Tensor, ...]:
    loss, readout, factor, *rest, product, met = reference.krr_forward(
        f_syn, y_syn, f_real, y_real, *kernel
    )
    # The layouts that the shape rule below promises.
    by_columns = factor.mT.contiguous().mT
    if kernel[-1] == "w":
        product = product.mT.contiguous().mT
    rest = [x.contiguous() for x in rest]
    return loss, readout.contiguous(), by_columns, *rest, product.contiguous(), met


def _krr_forward_fake(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor | None,
    ridge: Tensor | None,
    ridge_number: float,
    ridge_of: str,
    retries: int,
    scale: float,
    bias: float,
    form: str,
) -> tuple[Tensor, ...]:
    *many, m, d = f_syn.shape
    b, p = f_real.shape[-2], y_syn.shape[-1]
    n = d + (bias != 0) if form == "primal" else m
    factor = f_syn.new_empty((*many, n, n), dtype=torch.float64).mT
    product = f_syn.new_empty((*many, m, b) if form == "k" else (0,))
    if form == "w":
        product = f_syn.new_empty((*many, p, d)).mT
    numbers = [f_syn.new_empty(many, dtype=x) for x in (None, torch.int64, torch.int32, None)]
    coefficients = f_syn.new_empty((*many, n, p))
    loss = f_syn.new_empty((0,) if y_real is None else many)
    met = f_syn.new_empty((), dtype=torch.int64)
    readout = f_syn.new_empty((*many, b, p))
    return loss, readout, factor, *numbers, coefficients, product, met


def _krr_backward_fake(
    gradient: Tensor, f_syn: Tensor, y_syn: Tensor, f_real: Tensor, *rest: Any
) -> list[Tensor]:
    shapes: list[Sequence[int]] = [x.shape for x in (f_syn, y_syn, f_real)]
    shapes += [(*f_real.shape[:-1], y_syn.shape[-1]), f_syn.shape[:-2]]
    return [f_syn.new_empty(shape) for i, shape in enumerate(shapes) if rest[-1] >> i & 1]


define("gram(Tensor x, float scale, float bias) -> Tensor", reference.gram, _gram_fake)
define("thin_matmul(Tensor a, Tensor b) -> Tensor", reference.thin_matmul, _thin_matmul_fake)
define(
    "batched_matmul(Tensor a, Tensor b) -> Tensor", reference.batched_matmul, _batched_matmul_fake
)
define(
    "batched_cholesky(Tensor k, Tensor ridge) -> (Tensor, Tensor)",
    reference.batched_cholesky,
    _batched_cholesky_fake,
)
define(
    "batched_cholesky_solve(Tensor y, Tensor factor) -> Tensor",
    reference.batched_cholesky_solve,
    _batched_cholesky_solve_fake,
)
define(
    "cholesky(Tensor k, Tensor ridge, Tensor y, bool float64) -> (Tensor, Tensor, Tensor)",
    reference.cholesky,
    _cholesky_fake,
)
define("matmul(Tensor a, Tensor b) -> Tensor", torch.matmul, _matmul_fake)
define(
    "ridge_factor(Tensor k, Tensor lam, int retries, bool raises, int own_up_to, bool inverse, "
    "bool substitution) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ridge_factor,
    _ridge_factor_fake,
)
define(
    "factored_solve(Tensor y, Tensor factor, Tensor? inverse, int own_up_to, bool inverted, "
    "bool substitution) -> Tensor",
    _factored_solve,
    _factored_solve_fake,
)
define(
    "views(Tensor images, Tensor index, Tensor offset, Tensor flip, int padding, float[] mean, "
    "float[] std) -> Tensor",
    reference.views,
    _views_fake,
)

define(
    "krr_forward(Tensor f_syn, Tensor y_syn, Tensor f_real, Tensor? y_real, Tensor? ridge, "
    "float ridge_number, str ridge_of, int retries, float scale, float bias, str form) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _krr_forward,
    _krr_forward_fake,
)
define(
    "krr_backward(Tensor gradient, Tensor f_syn, Tensor y_syn, Tensor f_real, Tensor? residual, "
    "Tensor factor, Tensor count, Tensor base, Tensor coefficients, Tensor product, "
    "Tensor? ridge, float ridge_number, str ridge_of, bool detach_ridge, float scale, float bias, "
    "str form, int needs) -> Tensor[]",
    reference.krr_backward,
    _krr_backward_fake,
)

define(
    "kernel_values(Tensor products, Tensor x, Tensor y, Tensor squares_x, Tensor squares_y, "
    "Tensor gamma, int same, str kernel, int degree, float coef0) -> Tensor",
    kernels.kernel_values,
    _kernel_values_fake,
)
define(
    "kernel_slopes(Tensor products, Tensor x, Tensor y, Tensor squares_x, Tensor squares_y, "
    "Tensor gamma, int same, Tensor weight, str kernel, int degree, float coef0, "
    "bool needs_values) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.kernel_slopes,
    _kernel_slopes_fake,
)

# Without tensors, and so without shape rules. The compiled implementations take the place of these.
_LIBRARY.define("isa() -> str")
_LIBRARY.define("isas() -> str[]")
_LIBRARY.impl("isa", lambda: "none", "CompositeImplicitAutograd")
_LIBRARY.impl("isas", lambda: [], "CompositeImplicitAutograd")


def _load_extension() -> str:
    """Import the compiled operators; return their file, or "not loaded: " and the reason."""
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


HAS_EXTENSION = not EXTENSION.startswith("not loaded")
"""Whether the compiled operators are loaded."""


def _load_cuda_extension() -> str:
    """Do the same for CUDA tensors, without a warning: most machines have no such extension."""
    if os.environ.get("KRRST_FAST_EXTENSION", "auto") == "0":
        return "not loaded: KRRST_FAST_EXTENSION=0"
    try:
        return str(importlib.import_module("krrst_fast._C_cuda").__file__)
    except ImportError as error:
        return f"not loaded: {error}"


CUDA_EXTENSION = _load_cuda_extension()
"""The file of the operators compiled for CUDA, or "not loaded: <reason>"."""


HAS_CUDA_EXTENSION = not CUDA_EXTENSION.startswith("not loaded")
"""Whether the operators compiled for CUDA are loaded."""
