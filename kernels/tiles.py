"""Block sizes of all kernels by size, precision and architecture.

Nothing is tuned at run time: tools/check_triton.py can compile every configuration, and the same
call computes the same bits on every GPU of an architecture.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.kernels.common import HOPPER, Tile

# (input precision, "half" for float16 features; architecture) -> (small, large) block.
GRAM = {
    ("half", "hopper"): (Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    ("half", "ampere"): (Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 4)),
    ("tf32x3", "hopper"): (Tile(64, 64, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
    ("tf32x3", "ampere"): (Tile(64, 64, 16, 4, 4), Tile(64, 64, 16, 4, 4)),
    ("ieee", "hopper"): (Tile(32, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
    ("ieee", "ampere"): (Tile(32, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
}
_GRAM_LARGE = 384

# Three blocks: for up to 16, up to 64 and more columns of the thin operand (with its interleaved
# terms).
THIN = {
    ("half", "hopper"): (
        *(Tile(64, 16, 128, 4, 4), Tile(128, 64, 64, 8, 3)),
        Tile(128, 128, 64, 8, 4),
    ),
    ("half", "ampere"): (
        *(Tile(64, 16, 64, 4, 4), Tile(128, 64, 32, 8, 4)),
        Tile(128, 64, 32, 8, 4),
    ),
    ("tf32x3", "hopper"): (
        *(Tile(64, 16, 64, 4, 4), Tile(64, 64, 32, 4, 4)),
        Tile(128, 64, 32, 8, 4),
    ),
    ("tf32x3", "ampere"): (
        *(Tile(64, 16, 32, 4, 4), Tile(64, 64, 16, 4, 4)),
        Tile(64, 64, 16, 4, 4),
    ),
}
_THIN_COLUMNS = (16, 64)

CLOSING = {
    ("terms", "hopper"): (Tile(128, 128, 64, 8, 4),),
    ("terms", "ampere"): (Tile(128, 128, 32, 8, 4),),
    ("fp16x3", "hopper"): (Tile(64, 64, 16, 4, 4), Tile(128, 128, 32, 8, 3)),
    ("fp16x3", "ampere"): (Tile(64, 64, 16, 4, 4), Tile(64, 64, 32, 4, 3)),
    ("tf32x3", "hopper"): (Tile(64, 64, 16, 4, 4), Tile(128, 64, 32, 8, 3)),
    ("tf32x3", "ampere"): (Tile(64, 64, 16, 4, 4), Tile(64, 64, 16, 4, 4)),
}

TABLES = {"gram": GRAM, "thin_matmul": THIN, "closing_matmul": CLOSING}

BAND = 8
"""Rows of blocks in a band of a Gram, see `common.banded_tile`."""

FINISH = Tile(32, 32, 1, 4, 1)
"""Block in which partial sums of a Gram are added and mirrored; it divides every GRAM block."""

# Blocks are at most 256 long: an offset within a block of longer strides would exceed 31 bits.
_FURTHEST = 2**31 // 512
SUM = Tile(1, 1024, 1, 4, 1)
"""Block of numbers in which partial sums are added."""

VIEW = Tile(1, 1024, 1, 4, 1)
"""Block of pixels of one image."""

TERMS = Tile(128, 64, 1, 8, 1)
"""Block of a thin operand that is split into two terms."""

TERMS_AS_READ = 64
"""Largest number of columns of a thin operand that is split into terms while it is read.

Every row of blocks splits the operand again, which for a wider one would stall the tensor cores."""

RESIDUAL = Tile(16, 64, 1, 4, 1)
"""Block of a residual."""

FUNCTION = Tile(16, 64, 1, 4, 1)
"""Block of a kernel as a function of inner products, in float64."""

# Number on the largest GPU of a generation.
_MULTIPROCESSORS = {"hopper": 132, "ampere": 108}
_SPLIT_DEPTH = 256
# Overhead of one split (start, write, read again) in units of one term of its sum. Not measured.
_PART = 320
# Tensor cores truncate their accumulator at every step of 16 terms: after this many terms the run
# is added to a float32 sum by ordinary instructions. A system of equations amplifies the errors of
# its Gram. One of 5000 x 8192 takes 0.57 ms on an H200 with runs of 1280 terms (error 2.4e-6), 0.61
# with 128 (2.3e-7), 0.65 with 64 (1.9e-7). In tf32x3 this happens after each step anyway.
_RUN = 128
RUN_OF_GRAM = 64


class Depth(NamedTuple):
    """Division of the inner dimension of a product: splits (split-K), and the runs of a split."""

    splits: int
    split: int
    run: int


def kind_of(x: Tensor, input_precision: str) -> str:
    """Return the input precision, or "half" for float16: the first key of the tables."""
    return "half" if x.dtype == torch.float16 else input_precision


def generation(arch: int) -> str:
    """Return the second key of the tables."""
    return "hopper" if arch >= HOPPER else "ampere"


def gram_tile(x: Tensor, kind: str, arch: int) -> Tile:
    """Return the block of the Gram of x [..., N, D]: large for many rows of aligned 16 bytes."""
    small, large = GRAM[kind, generation(arch)]
    return large if x.shape[-2] >= _GRAM_LARGE and aligned(x) else small


def thin_tile(a: Tensor, b: Tensor, kind: str, terms: str, arch: int) -> Tile:
    """Return the block of a @ b: in float32 the widest only for aligned, row-major operands."""
    tiles = THIN[kind, generation(arch)]
    wide = sum(b.shape[1] > edge for edge in _THIN_COLUMNS)
    fits = kind == "half" or (a.stride(1) == b.stride(1) == 1 and aligned(a))
    # With Triton 3.6 the widest block of a float16 b would wait after each tensor-core step.
    fits = fits and terms != "exact"
    return tiles[min(wide, 2 if fits else 1)]


def closing_tile(matrices: Sequence[Tensor], kind: str, arch: int) -> Tile:
    """Return the large block if rows of all matrices can be read 16 bytes at a time."""
    rows = all(x.stride(1) == 1 and aligned(x) for x in matrices)
    return CLOSING[kind, generation(arch)][rows]


def aligned(x: Tensor) -> bool:
    """Return whether every row, or every column, of x starts at a multiple of 16 bytes."""
    strides = sorted(x.stride())
    return strides[0] <= 1 and not any(
        address % 16
        for address in (x.data_ptr(), *(stride * x.element_size() for stride in strides[1:]))
    )


def addressable(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if offsets within a block would exceed 31 bits.

    Kernels compute the address of a block in 64 bits and offsets within it in 32.

    Raises:
        ValueError: A row is too long even in a contiguous copy.
    """
    if max(x.stride()[-2:]) < _FURTHEST:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    if max(x.stride()[-2:]) >= _FURTHEST:
        raise ValueError(f"a kernel: rows must be shorter than {_FURTHEST}, got {tuple(x.shape)}")
    return x


@functools.lru_cache(1024)
def cut(depth: int, blocks: int, tile: Tile, arch: int, longest_run: int = _RUN) -> Depth:
    """Return the division of the inner dimension with the smallest predicted time.

    A multiprocessor holds one program with a block of 128 x 128, or two with smaller blocks. The
    time is that of whole waves of programs, in terms of their sums.
    """
    at_once = _MULTIPROCESSORS[generation(arch)] * (1 if tile.rows * tile.columns >= 128**2 else 2)

    def split_of(splits: int) -> int:
        return _blocks(-(-depth // splits), tile.depth)

    def terms(splits: int) -> int:
        return -(-blocks * splits // at_once) * (split_of(splits) + _PART * (splits > 1))

    split = split_of(min(range(1, -(-depth // _SPLIT_DEPTH) + 1), key=terms, default=1))
    return Depth(max(-(-depth // split), 1), split, runs(split, tile.depth, longest_run))


def runs(depth: int, block: int, longest: int = _RUN) -> int:
    """Return the length of a run: `depth` in equal runs of at most so many terms, in blocks."""
    return _blocks(-(-depth // -(-depth // longest)), block)


def _blocks(length: int, block: int) -> int:
    return max(-(-length // block), 1) * block
