"""Kernel ridge regression as a value: fit once, predict many times."""

import typing
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.ops.fit_tensors import fit_tensors
from krrst_fast.ops.fitted import KRRFit
from krrst_fast.ops.kernel import Kernel, KernelName, as_kernel
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.ops.stream import fit_stream


@torch.no_grad()
def krr_fit(
    f_syn: Tensor | Iterable[Any],
    y_syn: Tensor | np.ndarray | None = None,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    scale: float = 1.0,
    bias: float = 0.0,
    kernel: KernelName | Kernel = "linear",
    intercept: bool = False,
    weights: Tensor | np.ndarray | None = None,
    solver: Solver = DEFAULT,
) -> KRRFit:
    """Fit kernel ridge regression and keep the factor. No gradients are recorded.

    Rows that do not fit in memory can be NumPy arrays, as `np.memmap` and `np.load(mmap_mode="r")`
    make them, or come in chunks. Nothing of their size M x D is made: in memory are a Gram and
    blocks of rows or columns. Where M > D that is the D x D Gram in float64, and the fit has no
    `alpha` and no `loo_residuals`. Chunks are kept until there are more rows than columns.

    Args:
        f_syn: Features [..., M, D], float32, float64, or half precision (computed in float32).
            Leading dimensions are a batch of problems; they broadcast. Or an array [M, D], which
            gives tensors on the CPU. Or an iterable of chunks (F, Y) or (F, Y, weights), of tensors
            or arrays [m, D], [m, P], [m], which is read once; rows without weights have weight 1.
        y_syn: Targets [..., M, P], for an array an array; None for chunks.
        ridge: Positive number, or a tensor [...].
        ridge_of: What the ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal",
            or 1 ("absolute").
        scale: Positive factor of every kernel value.
        bias: Non-negative constant that is added to every kernel value.
        kernel: The name of a kernel, or a `Kernel`, as in `krrst_fast.krr_mse`.
        intercept: Fit a constant for each target, which the ridge does not penalise: features and
            targets are centred, the trace too is that of the centred Gram, and bias must be 0. Of
            the kernels "linear" and "cosine".
        weights: Weights of the rows of F_s [..., M], as in `krrst_fast.krr_mse`; None for chunks.
        solver: How the system is solved; the backend "reference" is refused, for arrays and chunks
            also precision="fast", and for chunks the forms "k" and "w".

    Raises:
        The errors of `krrst_fast.krr_mse`.
    """
    op = "krr_fit"
    kernel = as_kernel(op, kernel)
    how: dict[str, Any] = {"ridge": ridge, "ridge_of": ridge_of, "scale": scale, "bias": bias}
    how |= {"intercept": intercept, "weights": weights, "solver": solver}
    if isinstance(f_syn, Tensor):
        return fit_tensors(op, f_syn, typing.cast(Tensor, y_syn), kernel=kernel, **how)
    if kernel.name != "linear":
        need = "kernel must be 'linear' for arrays and chunks"
        raise ValueError(f"{op}: {need}, got {kernel.name!r}")
    return fit_stream(op, f_syn, y_syn, **how)
