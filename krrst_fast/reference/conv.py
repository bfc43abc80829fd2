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


def conv3x3(
    x: Tensor, w: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """Compute relu(w * x + bias + shortcut) [N, H, W, C'], or the same without ReLU."""
    z = _conv(x, w)
    z = z if bias is None else z + bias
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


def channel_moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean of z [N, H, W, C'] over pixels, and the sum of squared distances to it.

    Both are [C'], in float64.
    """
    z = z.double()
    mean = z.mean((0, 1, 2))
    return mean, (z - mean).square().sum((0, 1, 2))


def scale_relu_pool(z: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the 2x2 averages of relu(factor z + shift) [N, H // 2, W // 2, C'], and the mask.

    A batch norm is gain (z - mean) scale + shift, where scale is 1 / deviation [C'].
    """
    return _pooled(factor * z + shift)


def norm_relu_pool_sums(
    d_out: Tensor, mask: Tensor, z: Tensor, mean: Tensor, scale: Tensor
) -> Tensor:
    """Compute the gradients by the shift and the gain of a batch norm [2, C'], in float64.

    They are sums over all pixels of the gradient by the normalised z, and of its product with that.
    """
    d_norm = _unpooled(d_out, mask, z.shape[1], z.shape[2]).double()
    normalised = (z.double() - mean.double()) * scale.double()
    return torch.stack((d_norm.sum((0, 1, 2)), (d_norm * normalised).sum((0, 1, 2))))


def conv_norm_backward(
    d_out: Tensor,
    mask: Tensor,
    x: Tensor,
    w: Tensor,
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    gain: Tensor,
    means: Tensor,
    needs_d_x: bool,
    needs_d_w: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients by x [N, H, W, C] and by w, each empty unless it is needed.

    `means` [2, C'] are the sums of `norm_relu_pool_sums` over all images, divided by all pixels.
    """
    d_norm = _unpooled(d_out, mask, z.shape[1], z.shape[2])
    d_z = (gain * scale) * (d_norm - means[0] - (z - mean) * scale * means[1])
    d_x = _back(d_z, w) if needs_d_x else x.new_empty(0)
    if not needs_d_w:
        return d_x, x.new_empty(0)
    return d_x, conv2d_weight(_first(x), list(w.shape), _first(d_z), padding=1).contiguous()


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
