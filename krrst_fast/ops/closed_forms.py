"""The three closed forms of kernel ridge regression and their gradients.

With A = K_ss + lam I, alpha = A^-1 Y_s, W = F_s^T alpha and R = dLoss/dPrediction, the adjoint
solution is beta = A^-1 K_rs^T R = dLoss/dY_s, and dLoss/dlam = -<alpha, beta>. The forms differ in
which products carry F_s: "k" keeps K_rs, "w" keeps W, "primal" solves
(F_s^T F_s + lam I) W = F_s^T Y_s. docs/maths.md derives them.

A scale multiplies every product of features; the constant of the affine kernel enters as a rank-one
term, never as a column of ones. All tensors are those of one problem, or of a batch of N.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import Backend
from krrst_fast.cholesky import factored_solve, ridge_factor
from krrst_fast.ops.problem import Problem
from krrst_fast.ops.solver import Solver


class Solve(NamedTuple):
    """The part of a forward pass that the backward pass needs.

    Attributes:
        factor: Lower Cholesky factor, [M, M] or in primal form [D (+ 1), D (+ 1)].
        lam: The ridge that was added [].
        retries: How often the ridge was raised [].
        pivot: 0, or the number of the pivot that failed [].
        inverse: The inverse of the factor, if solves use it.
        base: lam at ridge = 1 [].
        coefficients: alpha [M, P], or in primal form W [D (+ 1), P].
        product: scale F_s F_r^T [M, B] in form k, F_s^T alpha [D, P] in form w, else None.
    """

    factor: Tensor
    lam: Tensor
    retries: Tensor
    pivot: Tensor
    inverse: Tensor | None
    base: Tensor
    coefficients: Tensor
    product: Tensor | None


class Readout(NamedTuple):
    """A prediction [N?, B, P] before it is multiplied out: scale left right + offset."""

    left: Tensor
    right: Tensor
    scale: float | Tensor
    offset: Tensor | None

    def prediction(self, backend: Backend) -> Tensor:
        """Multiply it out."""
        prediction = scale_(backend.matmul(self.left, self.right), self.scale)
        return prediction if self.offset is None else prediction.add_(self.offset)

    def mse(self, backend: Backend, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual to y [N?, B, P] and the mean of its square [N?]."""
        return backend.predicted_residual_mse(self.left, self.right, y, self.scale, self.offset)


class Gradients(NamedTuple):
    """Gradients of a scalar; None where none is needed."""

    f_syn: Tensor | None
    y_syn: Tensor | None
    f_real: Tensor | None
    lam: Tensor | None


class Needs(NamedTuple):
    """The gradients that are needed; `lam` also where the ridge depends on the features."""

    f_syn: bool
    y_syn: bool
    f_real: bool
    lam: bool


def separated(
    ridge: float | Tensor, ridge_of: str, detach_ridge: bool, scale: Any, bias: Any
) -> tuple[list[Tensor | None], list[Any]]:
    """Return the tensors among ridge, scale and bias, and the settings of a kernel without them."""
    tensors: list[Tensor | None] = [None, None, None]
    settings: list[Any] = [ridge, ridge_of, detach_ridge, scale, bias]
    for i, place in enumerate((0, 3, 4)):
        if isinstance(settings[place], Tensor):
            tensors[i], settings[place] = settings[place], None
    return tensors, settings


def assembled(kernel: Sequence[Any], *tensors: Tensor | None) -> Problem:
    """Return the problem whose kernel was `separated`.

    The tensors are F_s, Y_s, F_r, Y_r, ridge, scale and bias.
    """
    f_syn, y_syn, f_real, y_real, ridge, scale, bias = tensors
    assert f_syn is not None and y_syn is not None
    ridge_number, ridge_of, detach_ridge, scale_number, bias_number = kernel
    return Problem(
        *(f_syn, y_syn, f_real, y_real),
        ridge_number if ridge is None else ridge,
        ridge_of,
        detach_ridge,
        scale_number if scale is None else scale,
        bias_number if bias is None else bias,
    )


def ridge_base(ridge_of: str, trace: Tensor, rows: int | float | Tensor) -> Tensor:
    """Return the number that the ridge multiplies, from the trace of the Gram of so many rows.

    rows: Not 0: the number of rows, or the sum of their weights.
    """
    if ridge_of == "absolute":
        return torch.ones_like(trace)
    return trace if ridge_of == "trace" else trace / rows


def scale_(x: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply x by scale, in place; the value of a tensor is not read."""
    return x if isinstance(scale, float) and scale == 1.0 else x.mul_(scale)


def _scale_by_rows(x: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply by scale, in place if x is stored by rows, as readers of a gradient expect.

    A product with features in float16 may be stored by columns (`backends.triton.matmul`).
    """
    if x.ndim != 2 or torch.compiler.is_compiling() or x.is_contiguous():
        return scale_(x, scale)
    return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def _add_product_(backend: Backend, out: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Compute out += alpha * (a @ b)."""
    if torch.compiler.is_compiling() or b.dtype != out.dtype:
        return out.add_(backend.matmul(a, b), alpha=alpha)
    return (out.addmm_ if out.ndim == 2 else out.baddbmm_)(a, b, alpha=alpha)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1))


def _columns(backend: Backend, f: Tensor, y: Tensor) -> Tensor:
    """Return F^T y [D, P]; of a batch stored as y^T F, so that its readers go along rows."""
    return backend.matmul(f.mT, y) if f.ndim == 2 else backend.matmul(y.mT, f).mT


def _offset(problem: Problem, alpha: Tensor) -> Tensor | None:
    """Return what the constant of the kernel adds to every prediction [N?, 1, P]."""
    return scale_(alpha.sum(-2, keepdim=True), problem.bias) if problem.has_bias else None


def factor_and_solve(
    backend: Backend, solver: Solver, problem: Problem, gram: Tensor, y: Tensor
) -> Solve:
    """Factor the ridged Gram and solve for y; `product` is still to come."""
    trace = gram.trace() if gram.ndim == 2 else gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    base = ridge_base(problem.ridge_of, trace, max(problem.f_syn.shape[-2], 1))
    method = backend.cholesky_method(gram, y.shape[-1])
    factor = ridge_factor(
        gram, problem.ridge * base, solver.max_retries, solver.check == "raise", method
    )
    coefficients = factored_solve(y, factor.factor, factor.inverse, method)
    return Solve(*factor, base, coefficients, None)


def solve_adjoint(backend: Backend, solve: Solve, y: Tensor) -> Tensor:
    """Solve with the factor of the forward pass."""
    method = backend.cholesky_method(solve.factor, y.shape[-1])
    return factored_solve(y, solve.factor, solve.inverse, method)


def fit_dual(backend: Backend, solver: Solver, problem: Problem) -> Solve:
    """Compute alpha [M, P]."""
    k_ss = backend.gram(problem.f_syn, problem.scale, problem.bias)  # [M, M]
    return factor_and_solve(backend, solver, problem, k_ss, problem.y_syn)


def solve_k(backend: Backend, solver: Solver, problem: Problem) -> tuple[Readout, Solve]:
    """Predict [B, P] through K_rs [B, M]."""
    assert problem.f_real is not None
    solve = fit_dual(backend, solver, problem)
    # As K_sr [M, B]: MKL multiplies in this order up to 1.7 times as fast where M < B. Without the
    # bias, whose size would determine the size of the rounding errors.
    k_sr = scale_(backend.matmul(problem.f_syn, problem.f_real.mT), problem.scale)
    alpha = solve.coefficients
    return Readout(k_sr.mT, alpha, 1.0, _offset(problem, alpha)), solve._replace(product=k_sr)


def backward_k(
    backend: Backend, problem: Problem, solve: Solve, r: Tensor, needs: Needs, unit: float | Tensor
) -> Gradients:
    """Compute dF_s = scale (alpha R^T F_r - (beta alpha^T + alpha beta^T) F_s), and the others."""
    f_syn, f_real, slope = problem.f_syn, problem.f_real, problem.scale * unit
    alpha, k_sr = solve.coefficients, solve.product
    assert f_real is not None and k_sr is not None
    d_f_syn = d_f_real = beta = d_lam = None
    if needs.f_real:
        d_f_real = _scale_by_rows(backend.matmul(backend.matmul(r, alpha.mT), f_syn), slope)
    if needs.f_syn or needs.y_syn or needs.lam:
        adjoint = backend.matmul(k_sr, r)  # [M, P]
        if problem.has_bias:
            adjoint.add_(problem.bias * r.sum(-2, keepdim=True))
        beta = solve_adjoint(backend, solve, adjoint)  # [M, P]
        d_lam = -_inner(alpha, beta) if needs.lam else None
    if needs.f_syn:
        assert beta is not None
        outer = backend.matmul(beta, alpha.mT)  # [M, M]
        symmetric = outer + outer.mT
        del outer
        d_f_syn = backend.matmul(backend.matmul(alpha, r.mT), f_real)
        d_f_syn = _add_product_(backend, d_f_syn, symmetric, f_syn, -1.0)
        d_f_syn = _scale_by_rows(d_f_syn, slope)
    return Gradients(d_f_syn, beta, d_f_real, d_lam)


def solve_w(backend: Backend, solver: Solver, problem: Problem) -> tuple[Readout, Solve]:
    """Predict [B, P] through W = F_s^T alpha [D, P]."""
    assert problem.f_real is not None
    solve = fit_dual(backend, solver, problem)
    alpha = solve.coefficients
    w = _columns(backend, problem.f_syn, alpha)  # [D, P]
    readout = Readout(problem.f_real, w, problem.scale, _offset(problem, alpha))
    return readout, solve._replace(product=w)


def backward_w(
    backend: Backend, problem: Problem, solve: Solve, r: Tensor, needs: Needs, unit: float | Tensor
) -> Gradients:
    """Compute dF_s = scale [alpha, -beta] [dW - F_s^T beta, W]^T with dW = F_r^T R: one product."""
    f_syn, f_real, slope = problem.f_syn, problem.f_real, problem.scale * unit
    alpha, w = solve.coefficients, solve.product
    assert f_real is not None and w is not None
    d_f_syn = d_f_real = beta = d_lam = None
    if needs.f_real:
        d_f_real = scale_(backend.matmul(r, w.mT), slope)
    if needs.f_syn or needs.y_syn or needs.lam:
        dw = _columns(backend, f_real, r)  # [D, P]
        adjoint = scale_(backend.matmul(f_syn, dw), problem.scale)  # [M, P]
        if problem.has_bias:
            adjoint.add_(problem.bias * r.sum(-2, keepdim=True))
        beta = solve_adjoint(backend, solve, adjoint)  # [M, P]
        d_lam = -_inner(alpha, beta) if needs.lam else None
    if needs.f_syn:
        assert beta is not None
        dw.sub_(_columns(backend, f_syn, beta))
        d_f_syn = backend.closing_matmul(alpha, dw, beta, w, slope)
    return Gradients(d_f_syn, beta, d_f_real, d_lam)


def features_t(backend: Backend, problem: Problem, f: Tensor, y: Tensor) -> Tensor:
    """Compute Phi^T y [D (+ 1), P] for Phi = [sqrt(scale) F, sqrt(bias)]."""
    product = scale_(_columns(backend, f, y), problem.scale**0.5)
    if not problem.has_bias:
        return product
    return torch.cat((product, problem.bias**0.5 * y.sum(-2, keepdim=True)), -2)


def primal_readout(problem: Problem, f: Tensor, w: Tensor) -> Readout:
    """Return Phi w [N, P]."""
    offset = problem.bias**0.5 * w[..., -1:, :] if problem.has_bias else None
    return Readout(f, w[..., : f.shape[-1], :], problem.scale**0.5, offset)


def _primal_gram(backend: Backend, problem: Problem) -> Tensor:
    """Compute Phi^T Phi, the border of the constant last."""
    gram = backend.gram(problem.f_syn.mT, problem.scale, 0.0)  # [D, D]
    if not problem.has_bias:
        return gram
    *batch, m, d = problem.f_syn.shape
    bordered = gram.new_empty((*batch, d + 1, d + 1))
    bordered[..., :d, :d] = gram
    # Not the root of the product, which may lie outside of float32.
    border = problem.bias**0.5 * problem.f_syn.sum(-2, dtype=gram.dtype)
    border = problem.scale**0.5 * border
    bordered[..., d, :d] = border
    bordered[..., :d, d] = border
    bordered[..., d, d].fill_(m * problem.bias)
    return bordered


def fit_primal(backend: Backend, solver: Solver, problem: Problem) -> Solve:
    """Compute W = (Phi_s^T Phi_s + lam I)^-1 Phi_s^T Y_s [D (+ 1), P]."""
    gram = _primal_gram(backend, problem)
    target = features_t(backend, problem, problem.f_syn, problem.y_syn)
    return factor_and_solve(backend, solver, problem, gram, target)


def solve_primal(backend: Backend, solver: Solver, problem: Problem) -> tuple[Readout, Solve]:
    """Predict [B, P] through W."""
    assert problem.f_real is not None
    solve = fit_primal(backend, solver, problem)
    return primal_readout(problem, problem.f_real, solve.coefficients), solve


def backward_primal(
    backend: Backend, problem: Problem, solve: Solve, r: Tensor, needs: Needs, unit: float | Tensor
) -> Gradients:
    """Compute dPhi_s = (Y_s - Phi_s W) V^T - dY_s W^T, dY_s = Phi_s V with V = M^-1 Phi_r^T R."""
    f_syn, f_real, slope = problem.f_syn, problem.f_real, problem.scale**0.5 * unit
    assert f_real is not None
    w, d = solve.coefficients, f_syn.shape[-1]
    d_f_syn = d_f_real = d_y_syn = d_lam = None
    if needs.f_real:
        d_f_real = scale_(backend.matmul(r, w[..., :d, :].mT), slope)
    if needs.f_syn or needs.y_syn or needs.lam:
        v = solve_adjoint(backend, solve, features_t(backend, problem, f_real, r))
        d_y_syn = primal_readout(problem, f_syn, v).prediction(backend)  # [M, P]
        d_lam = -_inner(v, w) if needs.lam else None
    if needs.f_syn:
        assert d_y_syn is not None
        error = problem.y_syn - primal_readout(problem, f_syn, w).prediction(backend)  # [M, P]
        v, w = v[..., :d, :], w[..., :d, :]
        d_f_syn = backend.closing_matmul(error, v, d_y_syn, w, slope)
    return Gradients(d_f_syn, d_y_syn, d_f_real, d_lam)


SOLVE = {"k": solve_k, "w": solve_w, "primal": solve_primal}
BACKWARD = {"k": backward_k, "w": backward_w, "primal": backward_primal}
