"""Parts that all kernels share: launches as values, and small device functions.

Triton compiles a separate binary for each class of an integer argument: 1, a multiple of 16, other.
That pays for strides and for the limits of masks along a row: only a known multiple of 16 allows
reads and writes of 16 bytes. The other integers, mostly counts of blocks, are listed in
`do_not_specialize`; otherwise each new size would need new binaries. tools/check_triton.py shows
the effect on registers and copies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HOPPER = 90
# Blocks of rows whose column maxima are computed separately.
ROW_BLOCKS = tl.constexpr(64)


class Tile(NamedTuple):
    """Rows, columns and depth of the block of a program; warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel with its arguments: `run` launches it, tools/check_triton.py compiles it.

    Attributes:
        kernel: The jitted function.
        programs: Number of programs.
        arguments: Arguments by name, in the order of the parameters.
        tile: Block of a program; a launch reads only its warps and stages.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile


def run(launches: Sequence[Launch], on: Tensor) -> None:
    """Launch all in order on the current stream of the device of `on`."""
    with torch.cuda.device_of(on):
        for launch in launches:
            launch.kernel[(launch.programs,)](
                **launch.arguments,
                num_warps=launch.tile.warps,
                num_stages=launch.tile.stages,
                enable_fp_fusion=True,
            )


def architecture(x: Tensor) -> int:
    """Return the compute capability of the device of x, 90 for 9.0; 90 for tensors on a CPU."""
    if not x.is_cuda:
        return HOPPER
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def per_problem(value: float | Tensor, problems: int) -> tuple[float | Tensor, int]:
    """Return a number, or a tensor [problems], with the stride between the values of problems."""
    if not isinstance(value, Tensor):
        return float(value), 0
    value = value.float().reshape(-1).expand(problems)
    return value, value.stride(0)


@triton.jit
def number(value, problem, stride, IS_TENSOR: tl.constexpr):
    """Return `value` itself, or the number of this problem that it points to."""
    if IS_TENSOR:
        return tl.load(value + problem * stride)
    else:
        return value


@triton.jit
def lower_tile(tile):
    """Return row and column of a tile of the lower triangle, numbered (0,0) (1,0) (1,1) ..."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The rounded square root may be one too large or one too small.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def banded_tile(tile, blocks, BAND: tl.constexpr):
    """Return row and column of a tile, numbered by bands of BAND rows, each column by column.

    Programs that run at the same time then read few rows and columns of blocks. A whole row of a
    large triangle would not fit into the L2 cache.
    """
    band = lower_tile(tile)[0] // BAND * BAND
    high = tl.minimum(blocks - band, BAND)
    place = tile - band * (band + 1) // 2
    row, column = lower_tile(tl.maximum(place - band * high, 0))
    square = place < band * high
    row = band + tl.where(square, place % high, row)
    return row, tl.where(square, place // high, band + column)


@triton.jit
def unit_of(absmax):
    """Return a power of two, 2^-113 to 2^100, that scales `absmax` to 2^14 .. 2^15; its inverse."""
    exponent = (absmax.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(268 - exponent, 14), 227)
    unit = (field << 23).to(tl.float32, bitcast=True)
    return unit, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def two_terms(x, unit):
    """Split unit * x into two float16 terms, hi + lo, which together hold 22 bits."""
    x = x * unit
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)
