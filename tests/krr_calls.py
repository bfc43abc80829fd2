"""Drawn calls of the KRR ops for tests/test_krr_fuzz.py, and what the formula says of each."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from krrst_fast import Kernel
from krrst_fast.reference.kernels import OF_PRODUCTS, kernel_matrix

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = ("normal", "duplicates", "equal", "zero", "tiny", "denormal", "huge", "nan", "inf")
LAYOUTS = ("rows", "columns", "sliced", "offset", "negated", "parameter", "expanded", "sparse")
RIDGES_OF = ("trace", "mean_diagonal", "absolute")


class Call(NamedTuple):
    """Arguments of one call, and what is known of them.

    Attributes:
        tensors: f_syn, y_syn, f_real, y_real, and weights, ridge where given.
        options: the other keywords.
        good: nothing in it is against the rules.
        tame: numbers of ordinary size: the formula can be evaluated.
    """

    tensors: dict[str, Any]
    options: dict[str, Any]
    good: bool
    tame: bool


def _numbers(kind: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=draw)
    if kind == "duplicates" and len(shape) > 1:
        x = x[..., :1, :].expand(shape).clone()
    size = {"equal": 0, "zero": 0, "tiny": 1e-30, "denormal": 1e-42, "huge": 1e30}.get(kind, 1)
    x = x * size + (kind == "equal")
    if kind in ("nan", "inf") and x.numel():
        x.view(-1)[int(torch.randint(x.numel(), (), generator=draw))] = float(kind)
    return x


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout; "expanded" repeats the first row."""
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "sliced":
        return torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]
    if layout == "offset":
        return torch.cat((torch.full_like(x, math.nan), x))[len(x) :]
    if layout == "negated":
        return torch._neg_view(-x)
    if layout == "parameter":
        return torch.nn.Parameter(x)
    if layout == "expanded" and x.shape[-2]:
        return x[..., :1, :].expand(x.shape)
    return x.to_sparse() if layout == "sparse" else x


ANYTHING: tuple[Any, ...] = (
    *(None, "w", "fast", "", -1, 0, 1, 2.5, 1e-3, math.nan, math.inf, 10**400, True, [], {}, 1j),
    *(object(), [1.0], np.ones(2), np.float64(0.5), torch.tensor(0.5), torch.ones(2)),
    *(torch.ones(2, 3), torch.ones(0), torch.tensor(1), torch.tensor(True), torch.tensor(1j)),
    *(torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(math.inf), torch.ones(()).double()),
    *(torch.ones((), device="meta"), torch.ones(2).to_sparse(), torch.ones(3).half()),
)

POLYNOMIAL = Kernel("polynomial", gamma=torch.tensor(0.3), degree=2, coef0=0.0)

OPTIONS: dict[str, st.SearchStrategy] = {
    "ridge_of": st.sampled_from(RIDGES_OF),
    "bias": st.sampled_from((0.0, 1.0, 0.3, 1)),
    "scale": st.sampled_from((1.0, 2.0, 0.1)),
    "kernel": st.sampled_from(("linear", *OF_PRODUCTS, "cosine", POLYNOMIAL)),
    "form": st.sampled_from(("auto", "k", "w", "primal")),
    "backend": st.sampled_from(("auto", "torch")),
    "precision": st.sampled_from((None, "float64", "float32", "fast")),
    "max_retries": st.sampled_from((None, 0, 2)),
    "check": st.sampled_from(("raise", "flag")),
    "detach_ridge": st.booleans(),
}

LEADING = ((), (), (), (1,), (2,), (3, 1), (1, 2), (0,))


@st.composite
def calls(draw: st.DrawFn, allowed: tuple[str, ...]) -> Call:
    """A good call with options of `allowed`, then up to three changes."""
    m, b, d, p = (draw(st.sampled_from((1, 2, 3, 5))) for _ in range(4))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    cores = {"f_syn": (m, d), "y_syn": (m, p), "f_real": (b, d), "y_real": (b, p)}
    if "weights" in allowed and draw(st.integers(0, 2)) == 0:
        cores["weights"] = (m,)
    batch = draw(st.sampled_from(LEADING))
    dtypes = draw(st.sampled_from(((torch.float64,), (torch.float32,), FLOATS[:1] + FLOATS[2:])))
    device = draw(st.sampled_from(("cpu",) * 9 + ("meta",)))
    change = draw(st.sampled_from(("",) * 8 + ("shape", "shape", "dtype", "device", "none")))
    changed = draw(st.sampled_from(tuple(cores)))
    good = change == "" and 0 not in batch
    tensors: dict[str, Any] = {}
    tame = True
    for name, core in cores.items():
        shape = (*(batch if draw(st.booleans()) else ()), *core)
        dtype = draw(st.sampled_from(dtypes))
        if name == changed and change == "shape":
            shape = draw(st.lists(st.integers(0, 3), max_size=4).map(tuple))
        odd = name == changed and draw(st.booleans())
        kind = draw(st.sampled_from(NUMBERS)) if odd else "normal"
        x = _numbers(kind, shape, numbers)
        x = x.abs() + 0.1 if name == "weights" else x
        tame = tame and kind in ("normal", "duplicates", "equal")
        layout = draw(st.sampled_from(("rows",) * 3 + LAYOUTS[: None if odd else -1]))
        if x.ndim < 2 and layout != "sparse":
            layout = "rows"
        if name == changed and change == "dtype":
            dtype = draw(st.sampled_from((*FLOATS, torch.int64, torch.bool, torch.complex64)))
        x = _laid_out(x.to(dtype), layout) if dtype in FLOATS else x.to(dtype)
        good = good and layout != "sparse"
        where = "meta" if name == changed and change == "device" else device
        tensors[name] = x.to(where) if where != "cpu" else x
    options = {
        name: draw(strategy)
        for name, strategy in OPTIONS.items()
        if name in allowed and draw(st.integers(0, 2)) == 0
    }
    kernel = options.get("kernel", "linear")
    of_products = kernel is POLYNOMIAL or kernel in OF_PRODUCTS
    good = good and not (of_products and options.get("form") in ("w", "primal"))
    options["ridge"] = draw(st.sampled_from((1e-6, 1e-3, 0.5, 1)))
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from(((), batch)))
        ridge = torch.rand(shape, dtype=torch.float64, generator=numbers) + 0.01
        options["ridge"] = ridge.to(dtypes[0])
    if change == "none":
        tensors[changed] = draw(st.sampled_from((None, [[1.0]], 1.0, np.ones((2, 2)), "f")))
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from((*allowed, "solver", "rigde", "")))
        target = tensors if name == "weights" else options
        target[name], good = draw(st.sampled_from(ANYTHING)), False
    return Call(tensors, options, good, tame)


class Exact(NamedTuple):
    """The formula in float64, how wrong a prediction may be, and what else follows from it."""

    prediction: Tensor
    allowed: Tensor
    alpha: Tensor
    left_out: Tensor


def exact(call: Call, single: bool) -> Exact | None:
    """The formula, or None where the numbers do not allow to state a bound.

    With phi the rows in the space of the kernel, and kappa = (trace + lam) / lam, which is at
    least the condition number: alpha is wrong by 64 eps kappa |alpha|, a prediction by
    64 eps (kappa |phi_r| |phi_s| |alpha| + |phi_r| |phi_s| |y| / lam).
    """
    used = ("f_syn", "y_syn", "f_real", "weights")
    given = {k: x for k, x in call.tensors.items() if k in used and isinstance(x, Tensor)}
    tensors = {k: x.detach().double() for k, x in given.items()}
    scale, bias = (call.options.get(k, v) for k, v in (("scale", 1.0), ("bias", 0.0)))

    kernel = call.options.get("kernel", "linear")
    kernel = kernel if isinstance(kernel, Kernel) else Kernel(kernel)

    def values(x: Tensor, y: Tensor) -> Tensor:
        gamma = 1 / x.shape[-1] if kernel.gamma is None else float(kernel.gamma)
        return scale * kernel_matrix(x, y, kernel.name, gamma, kernel.degree, kernel.coef0) + bias

    syn, y, real = tensors["f_syn"], tensors["y_syn"], tensors["f_real"]
    weights = tensors.get("weights", torch.ones(syn.shape[-2]).double())
    root = weights.sqrt()[..., None]
    k = root * values(syn, syn) * root.mT
    base = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    trace, ridge_of = base, call.options.get("ridge_of", "trace")
    if ridge_of != "trace":
        base = base / weights.sum(-1) if ridge_of == "mean_diagonal" else torch.ones_like(base)
    lam = torch.as_tensor(call.options["ridge"], dtype=torch.float64) * base
    rounding = 2.0**-10 if call.options.get("precision") == "fast" else 2.0**-23
    eps = rounding if single or rounding > 1e-4 else 2.0**-52
    kappa = (trace + lam) / lam
    if not bool((eps * kappa * len(k) < 1e-3).all()) or kappa.numel() == 0:
        return None
    inverse = torch.linalg.inv(k + lam[..., None, None] * torch.eye(k.shape[-1]).double())
    solved = inverse @ (root * y)
    alpha = root * solved
    prediction = values(real, syn) @ alpha

    def size(x: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(x)

    def length(k: Tensor) -> Tensor:
        """The norm of the rows in the space of the kernel."""
        return k.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()

    grams, w = length(values(real, real)) * length(k), root.amax((-2, -1)).clamp(min=1)
    allowed = grams * (kappa * size(solved) + size(root * y) / lam) * w + size(prediction)
    left_out = solved / inverse.diagonal(dim1=-2, dim2=-1)[..., None] / root
    return Exact(prediction, 64 * eps * allowed, alpha, left_out)
