"""What every kernel is launched by and made of: launches as values, and small device functions.

Triton compiles a kernel anew for each kind of an integer it is given: 1, a multiple of 16, another.
That is of use where it is part of an address, or of a mask along a row: only then 16 bytes can be
read or written at a time. Kernels name the others in `do_not_specialize`, mostly counts of blocks;
else each new size would need many new binaries. tools/check_triton.py finds what that costs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HOPPER = 90
# Row blocks in which the largest entry of a matrix is looked for.
PEAKS = tl.constexpr(64)


class Tile(NamedTuple):
    """Rows, columns and depth of the block that a program computes, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel with all it is launched with: `run` runs it, the compile gate compiles it.

    Attributes:
        kernel: the jitted function.
        programs: how many programs of it.
        arguments: by name, in the order of its parameters.
        tile: the block of a program, of which only warps and stages are read here.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    tile: Tile


def run(launches: Sequence[Launch], on: Tensor) -> None:
    """Launch them one after the other on the current stream of the device of `on`."""
    with torch.cuda.device_of(on):
        for launch in launches:
            launch.kernel[(launch.programs,)](
                **launch.arguments,
                num_warps=launch.tile.warps,
                num_stages=launch.tile.stages,
                enable_fp_fusion=True,
            )


def architecture(x: Tensor) -> int:
    """Compute capability of the GPU that holds x, as 90 for 9.0."""
    if not x.is_cuda:
        return HOPPER
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def per_problem(value: float | Tensor, problems: int) -> tuple[float | Tensor, int]:
    """A number, or a tensor [] or [problems] on the device, and the stride from one to the next."""
    if not isinstance(value, Tensor):
        return float(value), 0
    value = value.float().reshape(-1).expand(problems)
    return value, value.stride(0)


@triton.jit
def number(value, problem, stride, IS_TENSOR: tl.constexpr):
    """The number of a problem: `value` itself, or what it points to."""
    if IS_TENSOR:
        return tl.load(value + problem * stride)
    else:
        return value


@triton.jit
def lower_tile(tile):
    """Row and column of a tile of the lower triangle, counted row by row: (0,0) (1,0) (1,1) ..."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root of a large number may be off by one either way.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def banded_tile(tile, blocks, BAND: tl.constexpr):
    """The same tiles band by band of BAND rows, each column by column.

    Programs that run at a time then read few rows and columns of blocks: less than a row of the
    triangle would, where the blocks of one no longer fit into the L2 cache.
    """
    band = lower_tile(tile)[0] // BAND * BAND
    high = tl.minimum(blocks - band, BAND)
    here = tile - band * (band + 1) // 2
    row, column = lower_tile(tl.maximum(here - band * high, 0))
    below = here < band * high
    return band + tl.where(below, here % high, row), tl.where(below, here // high, band + column)


@triton.jit
def unit_of(peak):
    """The power of two, 2^-113 to 2^100, that brings `peak` to 2^14 .. 2^15, and its inverse."""
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(268 - exponent, 14), 227)
    unit = (field << 23).to(tl.float32, bitcast=True)
    return unit, ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def two_terms(x, unit):
    """hi + lo = unit * x to 22 bits, both float16."""
    x = x * unit
    hi = x.to(tl.float16)
    return hi, (x - hi.to(tl.float32)).to(tl.float16)
