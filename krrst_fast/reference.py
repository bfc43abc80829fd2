"""Every operator in plain, differentiable PyTorch: the specification, the oracle and the baseline.

Letters: M synthetic images, B real images, D features, P target features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE_OF = ("trace", "mean_diagonal", "absolute")


def gram(x: Tensor, scale: float, bias: float) -> Tensor:
    """K[n, m] = scale * <x[n], x[m]> + bias for x [..., N, D].

    scale = bias = 1 is the linear kernel of the features with a constant 1 appended.
    """
    return scale * (x @ x.mT) + bias


def thin_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a [N, K] and a b [K, P] of few columns."""
    return a @ b


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a[i] @ b[i] for many small problems: a [N, I, K], b [N, K, J]."""
    return a @ b


def batched_cholesky(k: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of k[i] + ridge[i] I in float64, whatever the precision of k.

    k symmetric [N, M, M], ridge [N]. Returns the factors [N, M, M], zero above the diagonal, and
    for each problem 0 or the number, from 1, of its first pivot that is not positive (int32 [N]);
    what such a factor holds is not defined.
    """
    k = k.double()
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    factor, pivot = torch.linalg.cholesky_ex(k + ridge.double()[:, None, None] * eye)
    # NaN passes the test of a pivot in some builds of LAPACK
    finite = factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return factor.contiguous(), torch.where(finite, pivot, pivot.clamp(min=1))


def batched_cholesky_solve(y: Tensor, factor: Tensor) -> Tensor:
    """(factor[i] factor[i]^T)^-1 y[i] in float64, rounded to the precision of y [N, M, P]."""
    return torch.cholesky_solve(y.double(), factor).to(y.dtype)


def cholesky(k: Tensor, ridge: Tensor, y: Tensor, float64: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The Cholesky factor L of k + ridge I, and half the solution of a system with it, L^-1 y.

    k symmetric [M, M], ridge [], y [M, P] of the precision of k, in which all is computed, or in
    float64. Returns L, zero above the diagonal, L^-1 y [M, P] and 0 or the number, from 1, of the
    first pivot that is not positive (int32 []); what the other two then hold is not defined.
    """
    dtype = torch.float64 if float64 else k.dtype
    eye = torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    factor, pivot = torch.linalg.cholesky_ex(k.to(dtype) + ridge.to(dtype) * eye)
    half = torch.linalg.solve_triangular(factor, y.to(dtype), upper=False)
    # NaN passes the test of a pivot in some builds of LAPACK
    finite = factor.diagonal().sum().isfinite()
    return factor, half.contiguous(), torch.where(finite, pivot, pivot.clamp(min=1))


def absolute_ridge(k: Tensor, ridge: float | Tensor, ridge_of: str, detach_ridge: bool) -> Tensor:
    """The numbers [...] that are added to the diagonals of k [..., M, M].

    "trace": ridge * trace(k); "mean_diagonal": ridge * trace(k) / M; "absolute": ridge.
    `detach_ridge` takes trace(k) as a constant, as the KRR-ST paper's code does.
    """
    if ridge_of == "absolute":
        # A number is filled in: as a tensor it would be copied to a GPU, and the copy waits.
        return ridge.to(k) if isinstance(ridge, Tensor) else k.new_full((), ridge)
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    if detach_ridge:
        trace = trace.detach()
    return ridge * (trace if ridge_of == "trace" else trace / max(k.shape[-1], 1))


def ridge_solve(
    k: Tensor, y: Tensor, ridge: float | Tensor, ridge_of: str, detach_ridge: bool = False
) -> Tensor:
    """(k + lam I)^-1 y for k [..., M, M], y [..., M, P]; lam as in `absolute_ridge`."""
    lam = absolute_ridge(k, ridge, ridge_of, detach_ridge)[..., None, None]
    return torch.linalg.solve(k + lam * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device), y)


def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
    bias: float,
    scale: float,
) -> Tensor:
    """K_rs (K_ss + lam I)^-1 Y_s, the prediction [..., B, P] of kernel ridge regression.

    K_ss = scale F_s F_s^T + bias, K_rs = scale F_r F_s^T + bias. (arXiv 2310.06511, equation 4.)
    """
    k_ss = gram(f_syn, scale, bias)
    k_rs = scale * (f_real @ f_syn.mT) + bias
    return k_rs @ ridge_solve(k_ss, y_syn, ridge, ridge_of, detach_ridge)


def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
    bias: float,
    scale: float,
) -> Tensor:
    """mean((krr_predict - Y_r)^2) over the B * P entries of each problem: KRR-ST's outer loss."""
    prediction = krr_predict(
        f_syn,
        y_syn,
        f_real,
        ridge=ridge,
        ridge_of=ridge_of,
        detach_ridge=detach_ridge,
        bias=bias,
        scale=scale,
    )
    return (prediction - y_real).square().mean((-2, -1))


def round_features(f_syn: Tensor, f_real: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both feature matrices [..., N, D] rounded to float16, with a gradient as if they were not.

    They share a power of two per problem that brings the largest entry to the top of float16's
    range, so that the scale of the features does not matter and equal features stay equal. What is
    below 2^-29 of the largest entry loses digits, below 2^-40 it becomes 0.
    """
    with torch.no_grad():
        largest = _largest(f_syn)
        if f_real is not None:
            largest = torch.maximum(largest, _largest(f_real))
        unit = _unit(largest, 100)
    return _rounded(f_syn, unit), None if f_real is None else _rounded(f_real, unit)


def half_features(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The features [M, D], [B, D] of `round_features` times that power of two [], in float16.

    Each matrix is read twice and written once. The gradient is not that of these numbers but that
    of the rounded features: times the power of two, which lies in 2^-60 .. 2^60: its square is a
    float32.
    """
    ends = [torch.aminmax(f.detach()) for f in (f_syn, f_real) if f.numel()]
    peaks = [torch.maximum(-low, high) for low, high in ends] or [f_syn.new_zeros(())]
    unit = _unit(torch.stack(peaks).amax(), 60)
    halves = [torch.empty_like(f, dtype=torch.float16) for f in (f_syn, f_real)]
    for f, half in zip((f_syn, f_real), halves):
        torch.mul(f.detach(), unit, out=half)
    return halves[0], halves[1], unit


def _unit(largest: Tensor, most: int) -> Tensor:
    """The power of two for a largest entry."""
    exponent = torch.where(largest > 0, 15 - largest.log2().ceil(), largest)
    return torch.exp2(exponent.clamp(-most, most))


def _largest(f: Tensor) -> Tensor:
    if f.shape[-1] * f.shape[-2] == 0:
        return f.new_zeros((*f.shape[:-2], 1, 1))
    return f.abs().amax((-2, -1), keepdim=True)


def _rounded(f: Tensor, unit: Tensor) -> Tensor:
    with torch.no_grad():
        change = (f * unit).half().to(f.dtype) / unit - f
    return f + change  # exact: the two lie within a factor of two, or the sum is 0


def views(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """out[b] = (crop(pad(images[index[b]]), offset[b]) / 255 - mean) / std, flipped where flip[b].

    images uint8 [N, C, H, W], index [B], offset [B, 2] (dy, dx), flip [B]; pad puts `padding` zero
    pixels on every side, crop takes H x W from (dy, dx) on. Returns float32 [B, C, H, W].
    """
    _, _, height, width = images.shape
    padded = torch.nn.functional.pad(images[index], [padding] * 4)  # [B, C, H + 2p, W + 2p]
    rows = offset[:, 0, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(len(index), width)
    columns = offset[:, 1, None] + torch.where(flip[:, None], columns.flip(1), columns)  # [B, W]
    batch = torch.arange(len(index), device=images.device)[:, None, None]
    crop = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None]]  # [B, H, W, C]
    pixels = crop.permute(0, 3, 1, 2).contiguous().float()
    # By a number CUDA would multiply with its reciprocal, and half of the levels lose a bit.
    pixels = pixels / pixels.new_full((), 255)
    centre, scale = (_by_channel(v, pixels) for v in (mean, std))
    return (pixels - centre) / scale


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """[C, 1, 1], filled in where `like` is: a list would be copied to a GPU, and the copy waits."""
    filled = [like.new_full((1, 1), value) for value in values]
    return torch.stack(filled) if filled else like.new_empty(0, 1, 1)


def ridged_gram(
    x: Tensor, scale: float | Tensor, bias: float, ridge: float | Tensor, ridge_of: str
) -> tuple[Tensor, Tensor]:
    """K + lam I and trace(K) [...] for K = gram(x, scale, bias) of x [..., N, D].

    lam as in `absolute_ridge`; `scale` and `ridge` are numbers, or one for each problem [...].
    """
    scale = scale[..., None, None] if isinstance(scale, Tensor) else scale
    k = scale * (x @ x.mT) + bias
    lam = absolute_ridge(k, ridge, ridge_of, detach_ridge=False)
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return k + lam[..., None, None] * eye, k.diagonal(dim1=-2, dim2=-1).sum(-1)


def residual_mse(prediction: Tensor, y_real: Tensor) -> tuple[Tensor, Tensor]:
    """E = prediction - Y_r [B, P] and mean(E^2) []."""
    residual = prediction - y_real
    return residual, residual.square().mean()


def predicted_residual_mse(
    f_real: Tensor, w: Tensor, y_real: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`residual_mse` of the prediction scale F_r W + offset, for W [D, P] and an offset [1?, P]."""
    prediction = scale * (f_real @ w)
    return residual_mse(prediction if offset is None else prediction + offset, y_real)


def closing_matmul(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """scale (alpha v^T - beta w^T) [M, D], all that is left of dF_s in the forms "w" and "primal".

    alpha, beta [M, P]; v, w [D, P].
    """
    return scale * (alpha @ v.mT - beta @ w.mT)
