"""Every operator in plain, differentiable PyTorch: specification, oracle and baseline.

Letters: M synthetic images, B real images, D features, P target features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RIDGE_OF = ("trace", "mean_diagonal", "absolute")


def gram(x: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Compute K[n, m] = scale * <x[n], x[m]> + bias for x [..., N, D].

    scale = bias = 1 is the linear kernel of the features with a constant 1 appended.
    """
    return scale * (x @ x.mT) + bias


def thin_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b for a [N, K] and a b [K, P] of few columns."""
    return a @ b


def batched_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a[i] @ b[i] for a batch of small matrices: a [N, I, K], b [N, K, J]."""
    return a @ b


def batched_cholesky(k: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the lower Cholesky factors of k[i] + ridge[i] I in float64.

    k symmetric [N, M, M] of any precision, ridge [N]. Returns the factors [N, M, M], zero above the
    diagonal, and for each problem 0, or the number, from 1, of its first pivot that is not positive
    (int32 [N]); the content of such a factor is undefined.
    """
    k = k.double()
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    factor, pivot = torch.linalg.cholesky_ex(k + ridge.double()[:, None, None] * eye)
    # Some builds of LAPACK take a NaN pivot for a positive one.
    finite = factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return factor.contiguous(), torch.where(finite, pivot, pivot.clamp(min=1))


def batched_cholesky_solve(y: Tensor, factor: Tensor) -> Tensor:
    """Solve factor[i] factor[i]^T x = y[i] in float64, rounded to the precision of y [N, M, P]."""
    return torch.cholesky_solve(y.double(), factor).to(y.dtype)


def cholesky(k: Tensor, ridge: Tensor, y: Tensor, float64: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Cholesky factor L of k + ridge I, and half the solution of a system, L^-1 y.

    k symmetric [M, M], ridge [], y [M, P] of the precision of k, in which all is computed, or in
    float64. Returns L, zero above the diagonal, L^-1 y [M, P] and 0 or the number, from 1, of the
    first pivot that is not positive (int32 []); the content of the other two is then undefined.
    """
    dtype = torch.float64 if float64 else k.dtype
    eye = torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    factor, pivot = torch.linalg.cholesky_ex(k.to(dtype) + ridge.to(dtype) * eye)
    half = torch.linalg.solve_triangular(factor, y.to(dtype), upper=False)
    # Some builds of LAPACK take a NaN pivot for a positive one.
    finite = factor.diagonal().sum().isfinite()
    return factor, half.contiguous(), torch.where(finite, pivot, pivot.clamp(min=1))


def absolute_ridge(k: Tensor, ridge: float | Tensor, ridge_of: str, detach_ridge: bool) -> Tensor:
    """Return the numbers [...] that are added to the diagonals of k [..., M, M].

    "trace": ridge * trace(k); "mean_diagonal": ridge * trace(k) / M; "absolute": ridge.
    `detach_ridge` treats trace(k) as a constant, as the code of the KRR-ST paper does.
    """
    if ridge_of == "absolute":
        # Filled in on the device: copying a number to a GPU would wait.
        return ridge.to(k) if isinstance(ridge, Tensor) else k.new_full((), ridge)
    trace = k.diagonal(dim1=-2, dim2=-1).sum(-1)
    if detach_ridge:
        trace = trace.detach()
    return ridge * (trace if ridge_of == "trace" else trace / max(k.shape[-1], 1))


def ridge_solve(
    k: Tensor, y: Tensor, ridge: float | Tensor, ridge_of: str, detach_ridge: bool = False
) -> Tensor:
    """Compute (k + lam I)^-1 y for k [..., M, M], y [..., M, P]; lam as in `absolute_ridge`."""
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
    """Predict K_rs (K_ss + lam I)^-1 Y_s [..., B, P] by kernel ridge regression.

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
    """Compute mean((krr_predict - Y_r)^2) over B x P for each problem: the outer loss of KRR-ST."""
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
    """Round both feature matrices [..., N, D] to float16; the gradient passes unchanged.

    A power of two per problem, shared by the two, brings the largest entry to the top of the range
    of float16, so that the scale of the features does not matter and equal features stay equal.
    Entries below 2^-29 of the largest lose digits, and below 2^-40 they become 0.
    """
    with torch.no_grad():
        largest = _largest(f_syn)
        if f_real is not None:
            largest = torch.maximum(largest, _largest(f_real))
        unit = _unit(largest, 100)
    return _rounded(f_syn, unit), None if f_real is None else _rounded(f_real, unit)


def half_features(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features [M, D], [B, D] of `round_features` times the power of two [], in float16.

    Each matrix is read twice and written once. The gradient to the features is that to these
    numbers times the power of two, which lies in 2^-60 .. 2^60, so that float32 holds its square.
    """
    ends = [torch.aminmax(f.detach()) for f in (f_syn, f_real) if f.numel()]
    absmax = [torch.maximum(-low, high) for low, high in ends] or [f_syn.new_zeros(())]
    unit = _unit(torch.stack(absmax).amax(), 60)
    halves = [torch.empty_like(f, dtype=torch.float16) for f in (f_syn, f_real)]
    for f, half in zip((f_syn, f_real), halves):
        torch.mul(f.detach(), unit, out=half)
    return halves[0], halves[1], unit


def _unit(largest: Tensor, most: int) -> Tensor:
    """Return the power of two for a largest entry."""
    exponent = torch.where(largest > 0, 15 - largest.log2().ceil(), largest)
    return torch.exp2(exponent.clamp(-most, most))


def _largest(f: Tensor) -> Tensor:
    if f.shape[-1] * f.shape[-2] == 0:
        return f.new_zeros((*f.shape[:-2], 1, 1))
    return f.abs().amax((-2, -1), keepdim=True)


def _rounded(f: Tensor, unit: Tensor) -> Tensor:
    with torch.no_grad():
        change = (f * unit).half().to(f.dtype) / unit - f
    return f + change  # exact: both lie within a factor of two, or the sum is 0


def views(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Compute (crop(pad(images[index[b]]), offset[b]) / 255 - mean) / std, flipped where flip[b].

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
    # A tensor: CUDA multiplies by the reciprocal of a number, and half of the levels lose a bit.
    pixels = pixels / pixels.new_full((), 255)
    centre, scale = (_by_channel(v, pixels) for v in (mean, std))
    return (pixels - centre) / scale


def _by_channel(values: Sequence[float], like: Tensor) -> Tensor:
    """Return [C, 1, 1], filled in on the device: copying a list to a GPU would wait."""
    filled = [like.new_full((1, 1), value) for value in values]
    return torch.stack(filled) if filled else like.new_empty(0, 1, 1)


def predicted_residual_mse(
    f_real: Tensor, w: Tensor, y_real: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute E = scale F_r W + offset - Y_r [B, P] and mean(E^2) [].

    W [D, P], offset [1?, P].
    """
    prediction = scale * (f_real @ w)
    residual = (prediction if offset is None else prediction + offset) - y_real
    return residual, residual.square().mean()


def closing_matmul(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """Compute scale (alpha v^T - beta w^T) [M, D], the last product of dF_s in "w" and "primal".

    alpha, beta [M, P]; v, w [D, P].
    """
    return scale * (alpha @ v.mT - beta @ w.mT)


def krr_forward(
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
    """Compute the forward pass of a closed form, one problem [., .] or a batch [N, ., .].

    The ridge is a tensor [N?] or else `ridge_number`; a failed factorisation is repeated with ten
    times the ridge, at most `retries` times.

    Returns:
        loss: mean((prediction - Y_r)^2) [N?], and for a prediction an empty tensor [0].
        readout: prediction - Y_r, or without Y_r the prediction [N?, B, P].
        factor: Lower factor of the system in float64 [N?, M, M], in form "primal" D (+ 1) square;
            NaN where the factorisation failed or the ridge is not positive.
        lam, count, pivot, base: What was added to the diagonal, how often it was raised (int64),
            0 or the number of the failed pivot (int32), and lam at ridge = 1 [N?].
        coefficients: alpha [N?, M, P], in form "primal" W [N?, D (+ 1), P].
        product: In form "k" scale F_s F_r^T [N?, M, B], in form "w" F_s^T alpha [N?, D, P].
        met: The sum of 1 where a factorisation failed, 2 where the loss or a prediction is not
            finite, and 4 where a ridge was raised, in any problem (int64 []).
    """
    phi_syn, phi_real = f_syn, f_real
    if form == "primal":
        phi_syn, phi_real = (_with_constant(f, scale, bias) for f in (f_syn, f_real))
        system, target = phi_syn.mT @ phi_syn, phi_syn.mT @ y_syn
    else:
        system, target = gram(f_syn, scale, bias), y_syn
    base = system.diagonal(dim1=-2, dim2=-1).sum(-1)
    if ridge_of != "trace":
        base = torch.ones_like(base) if ridge_of == "absolute" else base / max(f_syn.shape[-2], 1)
    lam = base * (ridge_number if ridge is None else ridge)
    factor, lam, count, pivot = _raised_factor(system.double(), lam, retries)
    coefficients = torch.cholesky_solve(target.double(), factor).to(f_syn.dtype)
    offset = bias * coefficients.sum(-2, keepdim=True)
    product = f_syn.new_empty(0)
    if form == "k":
        product = scale * (f_syn @ f_real.mT)
        readout = product.mT @ coefficients + offset
    elif form == "w":
        product = f_syn.mT @ coefficients
        readout = scale * (f_real @ product) + offset
    else:
        readout = phi_real @ coefficients
    loss = f_syn.new_empty(0)
    if y_real is not None:
        readout = readout - y_real
        loss = readout.square().mean((-2, -1))
    result = readout if y_real is None else loss
    met = 1 * (pivot != 0).any() + 2 * ~result.isfinite().all() + 4 * (count > 0).any()
    return loss, readout, factor, lam, count, pivot, base, coefficients, product, met


def _with_constant(f: Tensor, scale: float, bias: float) -> Tensor:
    """Return Phi = [sqrt(scale) F, sqrt(bias)], without a column where the bias is 0."""
    phi = scale**0.5 * f
    if bias == 0:
        return phi
    return torch.cat((phi, phi.new_full((*phi.shape[:-1], 1), bias**0.5)), -1)


def _raised_factor(
    system: Tensor, lam: Tensor, retries: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the factors of system + lam I [N?, M, M], lam, how often it was raised and pivots."""
    count, eye = torch.zeros_like(lam, dtype=torch.int64), torch.eye(system.shape[-1]).to(system)
    for attempt in range(retries + 1):
        factor, pivot = torch.linalg.cholesky_ex(system + lam.double()[..., None, None] * eye)
        finite = factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
        pivot = torch.where(finite, pivot, pivot.clamp(min=1))
        if attempt < retries:
            lam, count = torch.where(pivot != 0, 10 * lam, lam), count + (pivot != 0)
    pivot = torch.where(lam > 0, pivot, pivot.clamp(min=1))
    return factor.masked_fill((pivot != 0)[..., None, None], torch.nan), lam, count, pivot


def krr_backward(
    gradient: Tensor,
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    residual: Tensor | None,
    factor: Tensor,
    count: Tensor,
    base: Tensor,
    coefficients: Tensor,
    product: Tensor,
    ridge: Tensor | None,
    ridge_number: float,
    ridge_of: str,
    detach_ridge: bool,
    scale: float,
    bias: float,
    form: str,
    needs: int,
) -> list[Tensor]:
    """Compute the gradients of what `krr_forward` returned.

    Args:
        gradient: The gradient to the loss [N?], or without a residual to the prediction [N?, B, P].
        needs: The sum of 1, 2, 4, 8 and 16 for the gradients to F_s, Y_s, F_r, Y_r and the ridge.

    Returns:
        The needed gradients, in this order.
    """
    phi_syn, phi_real, root = f_syn, f_real, scale
    if form == "primal":
        phi_syn, phi_real = (_with_constant(f, scale, bias) for f in (f_syn, f_real))
        root = scale**0.5
    d, r = f_syn.shape[-1], gradient
    if residual is not None:
        count_real = residual.shape[-1] * residual.shape[-2]
        r = residual * (gradient * (2.0 / count_real))[..., None, None]
    if form == "primal":
        adjoint = phi_real.mT @ r
    else:
        adjoint = scale * (f_syn @ (f_real.mT @ r)) + bias * r.sum(-2, keepdim=True)
    solution = torch.cholesky_solve(adjoint.double(), factor).to(r.dtype)
    if form == "primal":
        beta, alpha = phi_syn @ solution, y_syn - phi_syn @ coefficients
        v, w = solution[..., :d, :], coefficients[..., :d, :]
    else:
        beta, alpha, w = solution, coefficients, f_syn.mT @ coefficients
        v = f_real.mT @ r - f_syn.mT @ beta
    d_f_syn = root * (alpha @ v.mT - beta @ w.mT)
    raised = -(coefficients * solution).sum((-2, -1)) * 10.0**count
    if ridge_of != "absolute" and not detach_ridge:
        slope = raised * (ridge_number if ridge is None else ridge) * (2 * scale)
        slope = slope / (max(f_syn.shape[-2], 1) if ridge_of == "mean_diagonal" else 1)
        d_f_syn = d_f_syn + slope[..., None, None] * f_syn
    found = d_f_syn, beta, root * (r @ w.mT), -r, raised * base
    return [x.to(r.dtype).contiguous() for i, x in enumerate(found) if needs >> i & 1]
