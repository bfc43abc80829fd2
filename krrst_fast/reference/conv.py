"""The convolutions of a ConvNet's blocks in plain PyTorch.

Letters: N images of H by W pixels with C channels, stored [N, H, W, C]; C' outputs of a 3x3 filter
bank w [C', C, 3, 3] of stride 1 and padding 1. T = N (H // 2) (W // 2) tiles of 2x2 outputs, of
which average pooling makes a pixel each. A mask holds four bits for each tile and channel, which
say where the ReLU let its input through: channel c in the low half of byte c, or, from the middle
on, in the high half.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight


def mask_bytes(channels: int) -> int:
    """Return the bytes of a mask for each tile: the first half of the channels, by sixteens."""
    return (channels + 31) // 32 * 16


def conv_bias(x: Tensor, w: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """Compute relu(w * x + bias + shortcut) [N, H, W, C'], or the same without ReLU."""
    z = _conv(x, w) + bias
    z = z if shortcut is None else z + shortcut
    return z.relu() if relu else z


def conv_relu_pool(x: Tensor, w: Tensor, bias: Tensor, needs_mask: bool) -> tuple[Tensor, Tensor]:
    """Compute the 2x2 averages of relu(w * x + bias) [N, H // 2, W // 2, C'], and the mask.

    The mask is uint8 [T, mask_bytes(C')], or [0, mask_bytes(C')] unless it is needed.
    """
    out, mask = _pooled(_conv(x, w) + bias)
    return out, mask if needs_mask else mask[:0]


def conv_relu_pool_backward(
    d_out: Tensor, mask: Tensor, w: Tensor, height: int, width: int
) -> Tensor:
    """Compute the gradient by x [N, H, W, C] from that by the averages."""
    return _back(_unpooled(d_out, mask, height, width), w)


def conv_norm_relu_pool(
    x: Tensor, w: Tensor, gain: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the 2x2 averages of relu(norm(w * x)) with a batch norm in training mode.

    Returns the averages [N, H // 2, W // 2, C'], z = w * x [N, H, W, C'], the mask, and the mean,
    the variance (divided by the number of pixels) and 1 / sqrt(variance + eps) of z [C'].
    """
    z = _conv(x, w)
    variance, mean = torch.var_mean(z, (0, 1, 2), correction=0)
    scale = torch.rsqrt(variance + eps)
    out, mask = _pooled((z - mean) * (scale * gain) + shift)
    return out, z, mask, mean, variance, scale


def conv_norm_relu_pool_backward(
    d_out: Tensor,
    x: Tensor,
    w: Tensor,
    gain: Tensor,
    z: Tensor,
    mask: Tensor,
    mean: Tensor,
    scale: Tensor,
    needs_d_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients by x [N, H, W, C] (empty unless needed), w, gain and shift [C']."""
    normalised = (z - mean) * scale
    d_norm = _unpooled(d_out, mask, z.shape[1], z.shape[2])
    d_gain, d_shift = (d_norm * normalised).sum((0, 1, 2)), d_norm.sum((0, 1, 2))
    pixels = z[..., 0].numel()
    d_z = (gain * scale) * (d_norm - d_shift / pixels - normalised * (d_gain / pixels))
    d_w = conv2d_weight(_first(x), list(w.shape), _first(d_z), padding=1)
    return _back(d_z, w) if needs_d_x else x.new_empty(0), d_w.contiguous(), d_gain, d_shift


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _conv(x: Tensor, w: Tensor) -> Tensor:
    return _last(F.conv2d(_first(x), w, padding=1))


def _back(d_z: Tensor, w: Tensor) -> Tensor:
    return _last(F.conv_transpose2d(_first(d_z), w, padding=1))


def _tiles(z: Tensor) -> Tensor:
    """Return the four values of each tile, [N, H // 2, W // 2, 4, C']."""
    n, h, w, c = z.shape
    whole = z[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
    return whole.transpose(2, 3).reshape(n, h // 2, w // 2, 4, c)


def _pooled(z: Tensor) -> tuple[Tensor, Tensor]:
    tiles = _tiles(z)
    bit = 2 ** torch.arange(4, device=z.device)[:, None]
    nibbles = ((tiles > 0) * bit).sum(-2).flatten(0, 2)  # [T, C']
    half = mask_bytes(z.shape[-1])
    nibbles = F.pad(nibbles, (0, 2 * half - z.shape[-1]))
    mask = (nibbles[:, :half] | nibbles[:, half:] << 4).to(torch.uint8)
    return tiles.relu().mean(-2).contiguous(), mask


def _unpooled(d_out: Tensor, mask: Tensor, height: int, width: int) -> Tensor:
    """Return the gradient by the inputs of the ReLU [N, H, W, C']."""
    n, h, w, c = d_out.shape
    nibbles = torch.cat((mask & 15, mask >> 4), -1)[:, :c].view(n, h, w, 1, c)
    bit = 2 ** torch.arange(4, device=mask.device)[:, None]
    d_tiles = torch.where((nibbles & bit) != 0, d_out[..., None, :] / 4, 0.0)
    d_z = d_tiles.view(n, h, w, 2, 2, c).transpose(2, 3).reshape(n, 2 * h, 2 * w, c)
    return F.pad(d_z, (0, 0, 0, width - 2 * w, 0, height - 2 * h))
