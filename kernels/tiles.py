"""The one table of block sizes: which a kernel takes for a size, a precision and an architecture.

Nothing is tuned at run time, so that the compile gate can compile every configuration there is, and
the same call computes the same bits on every GPU of an architecture.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.kernels.common import HOPPER, Tile

# By how float32 is multiplied ("half": the features are float16) and by architecture.
GRAM = {
    ("half", "hopper"): (Tile(64, 64, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    ("half", "ampere"): (Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 4)),
    ("tf32x3", "hopper"): (Tile(64, 64, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
    ("tf32x3", "ampere"): (Tile(64, 64, 16, 4, 4), Tile(64, 64, 16, 4, 4)),
    ("ieee", "hopper"): (Tile(32, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
    ("ieee", "ampere"): (Tile(32, 32, 16, 4, 3), Tile(32, 32, 16, 4, 3)),
}
_GRAM_LARGE = 384

# By the columns of the thin operand, those of its terms where they are side by side: up to 16, 64,
# more.
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
"""Rows of blocks of a gram that are computed together."""

FINISH = Tile(32, 32, 1, 4, 1)
"""Block in which the parts of a gram are added and mirrored; it divides every block of GRAM."""

# No block is longer than 256: further than that times this needs more than 31 bits.
_FURTHEST = 2**31 // 512
SUM = Tile(1, 1024, 1, 4, 1)
"""Block of numbers in which parts are added."""

VIEW = Tile(1, 1024, 1, 4, 1)
"""Pixels of one image."""

TERMS = Tile(128, 64, 1, 8, 1)
"""Block of a thin operand that is split into two terms."""

TERMS_AS_READ = 64
"""Up to so many columns the terms of a thin operand are split where they are read. Of a wider one
each row of blocks would split them anew, while the tensor cores wait."""

RESIDUAL = Tile(16, 64, 1, 4, 1)
"""Block of a residual."""

# Of the largest GPU of a generation.
_MULTIPROCESSORS = {"hopper": 132, "ampere": 108}
_SPLIT_DEPTH = 256
# What a part costs besides its terms, in terms: to start, to be written and read again. A guess.
_PART = 320
# Tensor cores truncate what they accumulate: after so many terms the sum goes to a float32 that
# ordinary instructions add up. In tf32x3 it does after each step anyway.
_RUN = 1280


class Depth(NamedTuple):
    """How the inner dimension of a product is cut: into splits, and these into runs."""

    splits: int
    split: int
    run: int


def kind_of(x: Tensor, input_precision: str) -> str:
    """The first half of the keys of the table."""
    return "half" if x.dtype == torch.float16 else input_precision


def generation(arch: int) -> str:
    """The second half of the keys of the table."""
    return "hopper" if arch >= HOPPER else "ampere"


def gram_tile(x: Tensor, kind: str, arch: int) -> Tile:
    """Of x [..., N, D]; the large block for many rows that are read 16 bytes at a time."""
    small, large = GRAM[kind, generation(arch)]
    return large if x.shape[-2] >= _GRAM_LARGE and aligned(x) else small


def thin_tile(a: Tensor, b: Tensor, kind: str, terms: str, arch: int) -> Tile:
    """Of a @ b; in float32 the widest block only for rows, those of a in pieces of 16 bytes."""
    tiles = THIN[kind, generation(arch)]
    wide = sum(b.shape[1] > edge for edge in _THIN_COLUMNS)
    fits = kind == "half" or (a.stride(1) == b.stride(1) == 1 and aligned(a))
    # With Triton 3.6 tensor cores wait after each step of the widest block of this one.
    fits = fits and terms != "exact"
    return tiles[min(wide, 2 if fits else 1)]


def closing_tile(matrices: Sequence[Tensor], kind: str, arch: int) -> Tile:
    """The large block where rows of all matrices are read 16 bytes at a time."""
    rows = all(x.stride(1) == 1 and aligned(x) for x in matrices)
    return CLOSING[kind, generation(arch)][rows]


def aligned(x: Tensor) -> bool:
    """Whether each row, or else each column, of the matrices of x is in pieces of 16 bytes."""
    strides = sorted(x.stride())
    return strides[0] <= 1 and not any(
        address % 16
        for address in (x.data_ptr(), *(stride * x.element_size() for stride in strides[1:]))
    )


def addressable(x: Tensor) -> Tensor:
    """x, or a copy if 32 bits cannot number what lies between two entries of a block.

    Programs and steps are counted in 64 bits; only inside a block in 32.
    """
    if max(x.stride()[-2:]) < _FURTHEST:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    if max(x.stride()[-2:]) >= _FURTHEST:
        raise ValueError(f"a kernel: rows must be shorter than {_FURTHEST}, got {tuple(x.shape)}")
    return x


@functools.lru_cache(1024)
def cut(depth: int, blocks: int, tile: Tile, arch: int) -> Depth:
    """The splits with which `blocks` blocks of output are computed soonest, by count of terms.

    A multiprocessor holds one program with a block of 128 by 128, or two with less: what matters is
    how often all of them start a program, and how full they are the last time.
    """
    at_once = _MULTIPROCESSORS[generation(arch)] * (1 if tile.rows * tile.columns >= 128**2 else 2)

    def split_of(splits: int) -> int:
        return _blocks(-(-depth // splits), tile.depth)

    def terms(splits: int) -> int:
        return -(-blocks * splits // at_once) * (split_of(splits) + _PART * (splits > 1))

    split = split_of(min(range(1, -(-depth // _SPLIT_DEPTH) + 1), key=terms, default=1))
    return Depth(max(-(-depth // split), 1), split, runs(split, tile.depth))


def runs(depth: int, block: int) -> int:
    """The length of the runs of so many terms."""
    return _blocks(-(-depth // -(-depth // _RUN)), block)


def _blocks(length: int, block: int) -> int:
    return max(-(-length // block), 1) * block
