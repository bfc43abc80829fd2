"""The compiled operators of the convolutions in networks: schema, fallback and shape rule of each.

`krrst_fast.models.blocks` makes networks of them. Images are [N, H, W, C], contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.operators import HAS_EXTENSION, define
from krrst_fast.reference import conv

__all__ = ["HAS_EXTENSION", "OPS"]


def _conv3x3_fake(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:3], w.shape[0]))


def _conv_relu_pool_fake(
    x: Tensor, w: Tensor, bias: Tensor, needs_mask: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // 2, x.shape[2] // 2)
    tiles = shape[0] * shape[1] * shape[2] if needs_mask else 0
    mask = x.new_empty((tiles, conv.mask_bytes(w.shape[0])), dtype=torch.uint8)
    return x.new_empty((*shape, w.shape[0])), mask


def _conv_relu_pool_backward_fake(
    d_out: Tensor, mask: Tensor, w: Tensor, height: int, width: int
) -> Tensor:
    return d_out.new_empty((d_out.shape[0], height, width, w.shape[1]))


def _channel_moments_fake(z: Tensor) -> tuple[Tensor, Tensor]:
    mean, squares = (z.new_empty(z.shape[-1], dtype=torch.float64) for _ in range(2))
    return mean, squares


def _scale_relu_pool_fake(z: Tensor, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return _conv_relu_pool_fake(z, factor, shift, True)


def _norm_relu_pool_sums_fake(d_out: Tensor, *rest: Tensor) -> Tensor:
    return d_out.new_empty((2, d_out.shape[-1]), dtype=torch.float64)


def _conv_norm_backward_fake(
    d_out: Tensor, mask: Tensor, x: Tensor, w: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    needs_d_x, needs_d_w = rest[-2:]
    return x.new_empty(x.shape if needs_d_x else 0), w.new_empty(tuple(w.shape) if needs_d_w else 0)


define(
    "conv3x3(Tensor x, Tensor w, Tensor? bias, Tensor? shortcut, bool relu) -> Tensor",
    conv.conv3x3,
    _conv3x3_fake,
)
define(
    "conv_relu_pool(Tensor x, Tensor w, Tensor bias, bool needs_mask) -> (Tensor, Tensor)",
    conv.conv_relu_pool,
    _conv_relu_pool_fake,
)
define(
    "conv_relu_pool_backward(Tensor d_out, Tensor mask, Tensor w, int height, int width) -> Tensor",
    conv.conv_relu_pool_backward,
    _conv_relu_pool_backward_fake,
)
define("channel_moments(Tensor z) -> (Tensor, Tensor)", conv.channel_moments, _channel_moments_fake)
define(
    "scale_relu_pool(Tensor z, Tensor factor, Tensor shift) -> (Tensor, Tensor)",
    conv.scale_relu_pool,
    _scale_relu_pool_fake,
)
define(
    "norm_relu_pool_sums(Tensor d_out, Tensor mask, Tensor z, Tensor mean, Tensor scale) -> Tensor",
    conv.norm_relu_pool_sums,
    _norm_relu_pool_sums_fake,
)
define(
    "conv_norm_backward(Tensor d_out, Tensor mask, Tensor x, Tensor w, Tensor z, "
    "Tensor mean, Tensor scale, Tensor gain, Tensor means, bool needs_d_x, "
    "bool needs_d_w) -> (Tensor, Tensor)",
    conv.conv_norm_backward,
    _conv_norm_backward_fake,
)

OPS = torch.ops.krrst_fast
"""Where the operators are."""
