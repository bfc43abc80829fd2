"""The three closed forms of kernel ridge regression and their gradients.

With A = K_ss + lam I, alpha = A^-1 Y_s, W = F_s^T alpha and R = dLoss/dPrediction, the adjoint
solution is beta = A^-1 K_rs^T R = dLoss/dY_s, and dLoss/dlam = -<alpha, beta>. The forms differ in
which products carry F_s: "k" keeps K_rs, "w" keeps W, "primal" solves
(F_s^T F_s + lam I) W = F_s^T Y_s.
A scale multiplies every product of features; the constant of the affine kernel enters as a rank-one
term, never as a column of ones.

All tensors are those of one problem, or of N of them with a first dimension N. Features may be in
float16 with a power of two of their own: then the scale is that of these features, and the
gradients are those of the features before.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import Backend
from krrst_fast.factor import residual
from krrst_fast.library import factored_solve, ridge_factor
from krrst_fast.plain import predicted, scaled


class Inputs(NamedTuple):
    """F_s [N?, M, D], Y_s [N?, M, P], F_r [N?, B, D]."""

    f_syn: Tensor
    y_syn: Tensor
    f_real: Tensor


class Solve(NamedTuple):
    """What one forward pass leaves for the backward pass.

    Attributes:
        factor: lower Cholesky factor, [M, M] or in primal form [D (+ 1), D (+ 1)].
        lam: the ridge that was added [].
        retries: how often the ridge was raised [].
        pivot: 0, or which pivot failed [].
        inverse: of the factor, if solves go through it.
        base: lam at ridge = 1 [].
        coefficients: alpha [M, P], or in primal form W [D (+ 1), P].
        product: scale F_s F_r^T [M, B] in form k, F_s^T alpha [D, P] in form w, else None.
        gram: what was factored, without its ridge, if solves are refined.
    """

    factor: Tensor
    lam: Tensor
    retries: Tensor
    pivot: Tensor
    inverse: Tensor | None
    base: Tensor
    coefficients: Tensor
    product: Tensor | None
    gram: Tensor | None


class Readout(NamedTuple):
    """A prediction [N?, B, P] that is still to be multiplied: scale left right + offset."""

    left: Tensor
    right: Tensor
    scale: float | Tensor
    offset: Tensor | None

    def prediction(self, ops: Backend) -> Tensor:
        return predicted(ops.matmul, *self)

    def mse(self, ops: Backend, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the prediction is off by [N?, B, P], and the mean of its square [N?]."""
        return ops.mse(self.left, self.right, y, self.scale, self.offset)


class Gradients(NamedTuple):
    """Gradients of a scalar; None where none was asked for."""

    f_syn: Tensor | None
    y_syn: Tensor | None
    f_real: Tensor | None
    lam: Tensor | None


class Needs(NamedTuple):
    """Which gradients are wanted; `lam` also when the ridge follows the trace of the features."""

    f_syn: bool
    y_syn: bool
    f_real: bool
    lam: bool

    @property
    def adjoint(self) -> bool:
        return self.f_syn or self.y_syn or self.lam


class Kernel(NamedTuple):
    """scale * <x, y> + bias, the ridge on its gram, and how that is solved.

    Attributes:
        unit: what features in float16 were multiplied by, and their gradients are.
    """

    scale: float | Tensor
    bias: float
    ridge: float | Tensor
    ridge_of: str
    retries: int
    raises: bool
    refine: int
    unit: float | Tensor = 1.0

    @property
    def slope(self) -> float | Tensor:
        """What a gradient to the features is multiplied by."""
        return self.scale * self.unit

    @property
    def root_slope(self) -> float | Tensor:
        """The same where each of the features has a root of the scale."""
        return self.scale**0.5 * self.unit

    def base(self, trace: Tensor, m: int) -> Tensor:
        """What the ridge multiplies."""
        if self.ridge_of == "absolute":
            return torch.ones_like(trace)
        return trace if self.ridge_of == "trace" else trace / max(m, 1)


def _trace(x: Tensor) -> Tensor:
    return x.trace() if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1))


def _add_product(ops: Backend, out: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """out + alpha a b, in place."""
    if torch.compiler.is_compiling() or b.dtype != out.dtype:
        return out.add_(ops.matmul(a, b), alpha=alpha)
    return (out.addmm_ if out.ndim == 2 else out.baddbmm_)(a, b, alpha=alpha)


def _by_rows(x: Tensor, scale: float | Tensor) -> Tensor:
    """scale x, in place if x is stored by rows, as whoever goes on from a gradient reads it.

    A product with features in float16 may come by columns (`gpu.matmul`).
    """
    if x.ndim != 2 or torch.compiler.is_compiling() or x.is_contiguous():
        return scaled(x, scale)
    return torch.mul(x, scale, out=torch.empty_like(x, memory_format=torch.contiguous_format))


def _columns(ops: Backend, f: Tensor, y: Tensor) -> Tensor:
    """F^T y [D, P]; of many problems stored as y^T F, so that all that read it go along rows."""
    return ops.matmul(f.mT, y) if f.ndim == 2 else ops.matmul(y.mT, f).mT


def _offset(kernel: Kernel, alpha: Tensor) -> Tensor | None:
    """What the constant of the kernel adds to every prediction [N?, 1, P]."""
    return scaled(alpha.sum(-2, keepdim=True), kernel.bias) if kernel.bias else None


def solved(ops: Backend, solve: Solve, y: Tensor, refine: int) -> Tensor:
    """(gram + lam I)^-1 y, improved by `refine` steps whose residual is taken in float64."""
    own = ops.solver(solve.factor, y.shape[-1]).own
    x = factored_solve(y, solve.factor, solve.inverse, own)
    if solve.gram is None:
        return x
    wide = x.double()
    for _ in range(refine):
        step = residual(solve.gram, solve.lam, wide, y)
        step = step.to(solve.factor.dtype)
        wide = wide + factored_solve(step, solve.factor, solve.inverse, own)
    return wide.to(y.dtype)


def refines(steps: int, y: Tensor, factor: Tensor) -> bool:
    """A factor in float64 leaves nothing to refine in a solution that is rounded to float32."""
    return steps > 0 and not (y.dtype == torch.float32 and factor.dtype == torch.float64)


def factored(ops: Backend, kernel: Kernel, gram: Tensor, y: Tensor, rows: int) -> Solve:
    """Factor a gram of `rows` images and solve with it; the product is still to come."""
    base = kernel.base(_trace(gram), rows)
    solver = ops.solver(gram, y.shape[-1])
    factor = ridge_factor(gram, kernel.ridge * base, kernel.retries, kernel.raises, solver)
    kept = gram if refines(kernel.refine, y, factor.factor) else None
    solve = Solve(*factor, base, y, None, kept)
    return solve._replace(coefficients=solved(ops, solve, y, kernel.refine))


def fit_dual(ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor) -> Solve:
    """alpha [M, P], before anything is predicted."""
    k_ss = ops.gram(f_syn, kernel.scale, kernel.bias)  # [M, M]
    return factored(ops, kernel, k_ss, y_syn, f_syn.shape[-2])


def solve_k(ops: Backend, kernel: Kernel, inputs: Inputs) -> tuple[Readout, Solve]:
    """Prediction [B, P] through K_rs [B, M]."""
    f_syn, y_syn, f_real = inputs
    solve = fit_dual(ops, kernel, f_syn, y_syn)
    # As K_sr [M, B]: MKL multiplies in this order up to 1.7 times as fast where M < B.
    # Without the bias, whose size would set the size of its rounding.
    k_sr = scaled(ops.matmul(f_syn, f_real.mT), kernel.scale)
    alpha = solve.coefficients
    return Readout(k_sr.mT, alpha, 1.0, _offset(kernel, alpha)), solve._replace(product=k_sr)


def backward_k(
    ops: Backend, kernel: Kernel, solve: Solve, inputs: Inputs, r: Tensor, needs: Needs
) -> Gradients:
    """dF_s = scale (alpha R^T F_r - (beta alpha^T + alpha beta^T) F_s)."""
    f_syn, _, f_real = inputs
    alpha, k_sr = solve.coefficients, solve.product
    assert k_sr is not None
    d_f_syn = d_f_real = beta = d_lam = None
    if needs.f_real:
        d_f_real = _by_rows(ops.matmul(ops.matmul(r, alpha.mT), f_syn), kernel.slope)
    if needs.adjoint:
        adjoint = ops.matmul(k_sr, r)  # [M, P]
        if kernel.bias:
            adjoint.add_(r.sum(-2, keepdim=True), alpha=kernel.bias)
        beta = solved(ops, solve, adjoint, kernel.refine)  # [M, P]
        d_lam = -_inner(alpha, beta) if needs.lam else None
    if needs.f_syn:
        assert beta is not None
        outer = ops.matmul(beta, alpha.mT)  # [M, M]
        symmetric = outer + outer.mT
        del outer
        d_f_syn = ops.matmul(ops.matmul(alpha, r.mT), f_real)
        d_f_syn = _by_rows(_add_product(ops, d_f_syn, symmetric, f_syn, -1.0), kernel.slope)
    return Gradients(d_f_syn, beta, d_f_real, d_lam)


def solve_w(ops: Backend, kernel: Kernel, inputs: Inputs) -> tuple[Readout, Solve]:
    """Prediction [B, P] through W = F_s^T alpha [D, P]."""
    f_syn, y_syn, f_real = inputs
    solve = fit_dual(ops, kernel, f_syn, y_syn)
    alpha = solve.coefficients
    w = _columns(ops, f_syn, alpha)  # [D, P]
    readout = Readout(f_real, w, kernel.scale, _offset(kernel, alpha))
    return readout, solve._replace(product=w)


def backward_w(
    ops: Backend, kernel: Kernel, solve: Solve, inputs: Inputs, r: Tensor, needs: Needs
) -> Gradients:
    """dF_s = scale [alpha, -beta] [dW - F_s^T beta, W]^T with dW = F_r^T R: one product."""
    f_syn, _, f_real = inputs
    alpha, w = solve.coefficients, solve.product
    assert w is not None
    d_f_syn = d_f_real = beta = d_lam = None
    if needs.f_real:
        d_f_real = scaled(ops.matmul(r, w.mT), kernel.slope)
    if needs.adjoint:
        dw = _columns(ops, f_real, r)  # [D, P]
        adjoint = scaled(ops.matmul(f_syn, dw), kernel.scale)  # [M, P]
        if kernel.bias:
            adjoint.add_(r.sum(-2, keepdim=True), alpha=kernel.bias)
        beta = solved(ops, solve, adjoint, kernel.refine)  # [M, P]
        d_lam = -_inner(alpha, beta) if needs.lam else None
    if needs.f_syn:
        assert beta is not None
        dw.sub_(_columns(ops, f_syn, beta))
        d_f_syn = ops.closing(alpha, dw, beta, w, kernel.slope)
    return Gradients(d_f_syn, beta, d_f_real, d_lam)


def features_t(ops: Backend, kernel: Kernel, f: Tensor, y: Tensor) -> Tensor:
    """Phi^T y [D (+ 1), P] for Phi = [sqrt(scale) F, sqrt(bias)]."""
    product = scaled(_columns(ops, f, y), kernel.scale**0.5)
    if not kernel.bias:
        return product
    return torch.cat((product, kernel.bias**0.5 * y.sum(-2, keepdim=True)), -2)


def _readout(kernel: Kernel, f: Tensor, w: Tensor) -> Readout:
    """Phi w [N, P]."""
    offset = kernel.bias**0.5 * w[..., -1:, :] if kernel.bias else None
    return Readout(f, w[..., : f.shape[-1], :], kernel.scale**0.5, offset)


def features(ops: Backend, kernel: Kernel, f: Tensor, w: Tensor) -> Tensor:
    """Phi w [N, P]."""
    return _readout(kernel, f, w).prediction(ops)


def _primal_gram(ops: Backend, kernel: Kernel, f_syn: Tensor) -> Tensor:
    """Phi^T Phi, the border of the constant last."""
    gram = ops.gram(f_syn.mT, kernel.scale, 0.0)  # [D, D]
    if not kernel.bias:
        return gram
    *batch, m, d = f_syn.shape
    bordered = gram.new_empty((*batch, d + 1, d + 1))
    bordered[..., :d, :d] = gram
    # Not the root of the product, which may lie outside of float32.
    border = kernel.scale**0.5 * (kernel.bias**0.5 * f_syn.sum(-2, dtype=gram.dtype))
    bordered[..., d, :d] = border
    bordered[..., :d, d] = border
    bordered[..., d, d].fill_(m * kernel.bias)
    return bordered


def fit_primal(ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor) -> Solve:
    """W = (Phi_s^T Phi_s + lam I)^-1 Phi_s^T Y_s [D (+ 1), P], before anything is predicted."""
    gram = _primal_gram(ops, kernel, f_syn)
    return factored(ops, kernel, gram, features_t(ops, kernel, f_syn, y_syn), f_syn.shape[-2])


def solve_primal(ops: Backend, kernel: Kernel, inputs: Inputs) -> tuple[Readout, Solve]:
    """Prediction [B, P] through W."""
    f_syn, y_syn, f_real = inputs
    solve = fit_primal(ops, kernel, f_syn, y_syn)
    return _readout(kernel, f_real, solve.coefficients), solve


def backward_primal(
    ops: Backend, kernel: Kernel, solve: Solve, inputs: Inputs, r: Tensor, needs: Needs
) -> Gradients:
    """With V = M^-1 Phi_r^T R: dY_s = Phi_s V, dPhi_s = (Y_s - Phi_s W) V^T - (Phi_s V) W^T."""
    f_syn, y_syn, f_real = inputs
    w, d = solve.coefficients, f_syn.shape[-1]
    d_f_syn = d_f_real = d_y_syn = d_lam = None
    if needs.f_real:
        d_f_real = scaled(ops.matmul(r, w[..., :d, :].mT), kernel.root_slope)
    if needs.adjoint:
        v = solved(ops, solve, features_t(ops, kernel, f_real, r), kernel.refine)
        d_y_syn = features(ops, kernel, f_syn, v)  # [M, P]
        d_lam = -_inner(v, w) if needs.lam else None
    if needs.f_syn:
        assert d_y_syn is not None
        error = y_syn - features(ops, kernel, f_syn, w)  # [M, P]
        v, w = v[..., :d, :], w[..., :d, :]
        d_f_syn = ops.closing(error, v, d_y_syn, w, kernel.root_slope)
    return Gradients(d_f_syn, d_y_syn, d_f_real, d_lam)


SOLVE = {"k": solve_k, "w": solve_w, "primal": solve_primal}
BACKWARD = {"k": backward_k, "w": backward_w, "primal": backward_primal}
