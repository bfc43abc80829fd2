"""Random views of uint8 images: gather, crop, flip and normalise in one pass.

A program reads one block of pixels of one image in all channels and writes them as float32. Pixels
outside of the image are 0 before normalisation. An index outside of the store gives an image of
NaN. Divisions round to nearest as PyTorch's do, so that all backends give the same bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.common import Launch, run


@triton.jit(
    do_not_specialize=[
        "count",
        "blocks",
        "padding",
        "stride_image",
        "stride_channel",
        "stride_row",
        "stride_index",
        "stride_offset_view",
        "stride_offset_axis",
        "stride_flip",
    ]
)
def _views_kernel(
    images_ptr,
    index_ptr,
    offset_ptr,
    flip_ptr,
    out_ptr,
    mean,
    std,
    count,
    height,
    width,
    blocks,
    padding,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    stride_index,
    stride_offset_view,
    stride_offset_axis,
    stride_flip,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    view = (pid // blocks).to(tl.int64)
    pixel = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    size = height * width
    image = tl.load(index_ptr + view * stride_index).to(tl.int64)
    top = tl.load(offset_ptr + view * stride_offset_view).to(tl.int64)
    left = tl.load(offset_ptr + view * stride_offset_view + stride_offset_axis).to(tl.int64)
    flipped = tl.load(flip_ptr + view * stride_flip) != 0

    column = pixel % width
    column = tl.where(flipped, width - 1 - column, column) + left - padding
    row = pixel // width + top - padding
    # A check of the indices on the CPU would have to wait for the GPU.
    known = (image >= 0) & (image < count)
    row = tl.where(known, row, -1)
    inside = (pixel < size) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    images_ptr += image * stride_image + row * stride_row + column * stride_column
    out_ptr += view * CHANNELS * size + pixel
    for channel in tl.static_range(CHANNELS):
        value = tl.load(images_ptr + channel * stride_channel, mask=inside, other=0)
        value = tl.div_rn(value.to(tl.float32), tl.full((BLOCK,), 255.0, tl.float32))
        scale = tl.full((BLOCK,), 0.0, tl.float32) + std[channel]
        value = tl.div_rn(value - mean[channel], scale)
        value = tl.where(known, value, float("nan"))
        tl.store(out_ptr + channel * size, value, mask=pixel < size)


def views_launches(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> tuple[Tensor, list[Launch]]:
    """Return what `views` returns, not yet computed, and the launch that computes it."""
    _, channels, height, width = images.shape
    out = torch.empty(len(index), channels, height, width, device=images.device)
    if out.numel() == 0:
        return out, []
    blocks = triton.cdiv(height * width, tiles.VIEW.columns)
    arguments = {
        "images_ptr": images,
        "index_ptr": index,
        "offset_ptr": offset,
        "flip_ptr": flip,
        "out_ptr": out,
        "mean": tuple(map(float, mean)),
        "std": tuple(map(float, std)),
        "count": images.shape[0],
        "height": height,
        "width": width,
        "blocks": blocks,
        "padding": padding,
        "stride_image": images.stride(0),
        "stride_channel": images.stride(1),
        "stride_row": images.stride(2),
        "stride_column": images.stride(3),
        "stride_index": index.stride(0),
        "stride_offset_view": offset.stride(0),
        "stride_offset_axis": offset.stride(1),
        "stride_flip": flip.stride(0),
        "CHANNELS": channels,
        "BLOCK": tiles.VIEW.columns,
    }
    return out, [Launch(_views_kernel, len(index) * blocks, arguments, tiles.VIEW)]


def views(
    images: Tensor,
    index: Tensor,
    offset: Tensor,
    flip: Tensor,
    padding: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Compute `reference.views` of tensors of any strides; index and offset of any integer type."""
    out, launches = views_launches(images, index, offset, flip, padding, mean, std)
    run(launches, images)
    return out
