"""The KRR loss with other kernels, against the formula, and scikit-learn's fit with one."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.bench_peers import fit_and_predict, quiet_import
from bench.common import features, solving, targets
from bench.suite import EVERYWHERE, PLAIN, Case, Comparison, Setting, compared
from krrst_fast import krr_fit, krr_mse


class Shape(NamedTuple):
    """M synthetic images, P target features, D features, B real images, and the kernel."""

    m: int
    p: int
    d: int
    b: int = 1024
    kernel: str = "rbf"


SHAPES = (
    *(Shape(1000, 10, 512, kernel=kernel) for kernel in ("rbf", "polynomial", "arccos")),
    Shape(100, 64, 512, 256),
)
RIDGE = 0.1


def matrix(x: Tensor, y: Tensor, kernel: str) -> Tensor:
    """Compute a kernel as research code does, by a product."""
    products, d = x @ y.mT, x.shape[-1]
    if kernel == "polynomial":
        return (products / d + 1) ** 3
    squares = x.square().sum(-1)[:, None], y.square().sum(-1)
    if kernel == "rbf":
        return torch.exp(-(squares[0] + squares[1] - 2 * products).clamp(min=0) / d)
    lengths = (squares[0] * squares[1]).sqrt()
    # Within the range in which the derivative of an arc-cosine is finite.
    angle = torch.acos((products / lengths).clamp(-1 + 1e-6, 1 - 1e-6))
    return lengths * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle)) / math.pi


def formula(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, *, kernel: str) -> Tensor:
    """Compute the loss by LU."""
    k_ss, k_rs = matrix(f_syn, f_syn, kernel), matrix(f_real, f_syn, kernel)
    lam = RIDGE * k_ss.trace().detach() / len(k_ss)
    system = k_ss + lam * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    return (k_rs @ torch.linalg.solve(system, y_syn) - y_real).square().mean()


class OfKernel(Comparison):
    """The loss and its gradients with another kernel."""

    against = "the formula, by a product, LU and autograd"
    params = (SHAPES, EVERYWHERE, PLAIN)

    def case(self, shape: Shape, how: Setting) -> Case:
        m, p, d, b, kernel = shape
        f_syn, f_real = features(m, b, columns=d)
        tensors = f_syn.requires_grad_(), targets(m, p).requires_grad_(), f_real, targets(b, p)
        loss: Any = partial(krr_mse, kernel=kernel, ridge=RIDGE, ridge_of="mean_diagonal")
        forward = flops.gram(m, d) + flops.product(b, d, m) + flops.product(b, m, p)
        # Each product is computed again for its derivative, which is another one.
        backward = 2 * flops.product(m, d, m) + 2 * flops.product(b, d, m)
        return compared(
            how.place(*tensors),
            ours=partial(loss, **how.keywords),
            plain=partial(formula, kernel=kernel),
            # In float64, where the formula too has lost digits.
            exact=partial(loss, **solving("torch")),
            flops=forward + backward + flops.solve(m, p) + 2 * m * m * p,
        )


class FitShape(NamedTuple):
    """A fit of N rows, P targets and D features; predictions of B rows."""

    n: int
    p: int
    d: int
    b: int


FIT = FitShape(2000, 10, 64, 2000)


class ScikitLearnRbf(Comparison):
    """Fit and predict with the rbf kernel, against scikit-learn."""

    against = "scikit-learn's KernelRidge, rbf"
    params = ((FIT, FitShape(256, 10, 64, 256)), ("cpp", "torch"), PLAIN)

    def case(self, shape: FitShape, how: Setting) -> Case:
        quiet_import("sklearn")
        n, p, d, b = shape
        x, new = features(n, b, columns=d, seed=self.seed)

        def ours(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
            settings: dict[str, Any] = {"ridge": RIDGE, "ridge_of": "absolute", "kernel": "rbf"}
            return krr_fit(x, y, **settings, **how.keywords).predict(new)

        def theirs(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
            model = quiet_import("sklearn.kernel_ridge").KernelRidge(alpha=RIDGE, kernel="rbf")
            return fit_and_predict(model, x, y, new)

        fit = flops.gram(n, d) + flops.solve(n, p)
        return compared(
            how.place(x, targets(n, p, seed=self.seed), new),
            ours=ours,
            plain=theirs,
            flops=fit + flops.product(b, d, n) + flops.product(b, n, p),
        )
