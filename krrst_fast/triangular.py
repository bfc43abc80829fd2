"""Solves with a triangular factor as products of blocks.

A triangular solve proceeds row by row: a GPU spends most of its time waiting. Here the diagonal
blocks are inverted once, and each solve is products with them and with what lies below them.
"""

import torch
from torch import Tensor

_SMALLEST, _LARGEST = 64, 512
"""Rows of a diagonal block. Of 64 rows the inverses come from a triangular solve, of more from
those of smaller blocks. Larger blocks than 512 took longer to invert than they saved (H200)."""


def inverse_shape(rows: int, whole: bool) -> tuple[int, int, int]:
    """Return the shape of the inverses of a factor: blocks, and rows of one, twice.

    whole: It is one block, as our CUDA kernel makes it.
    """
    if whole or rows <= _SMALLEST:
        return 1, rows, rows
    block = _SMALLEST
    while block < min(rows, _LARGEST):
        block *= 2
    return -(-rows // block), block, block


def inverses(factor: Tensor) -> Tensor:
    """Return the inverses of the diagonal blocks [N?, blocks, rows, rows], padded with ones.

    The inverse of two blocks and what lies below the first, [[A, 0], [C, B]], is that of A and of
    B, and -B^-1 C A^-1.
    """
    many, rows = factor if factor.ndim == 3 else factor[None], factor.shape[-1]
    blocks, block, _ = inverse_shape(rows, False)
    eye = torch.eye(block, dtype=factor.dtype, device=factor.device)
    diagonal = eye.repeat(len(many), blocks, 1, 1)
    whole = rows // max(block, 1) * block
    if whole:
        diagonal[:, : whole // block] = _diagonal(many[:, :whole, :whole], block)
    if rows > whole:
        diagonal[:, -1, : rows - whole, : rows - whole] = many[:, whole:, whole:]
    diagonal, size = diagonal.flatten(0, 1), min(block, _SMALLEST)
    first = _diagonal(diagonal, size).flatten(0, 1)
    inverse = torch.linalg.solve_triangular(first, eye[:size, :size].expand_as(first), upper=False)
    while size < block:
        upper, lower = inverse[0::2], inverse[1::2]
        below = _diagonal(diagonal, 2 * size)[..., size:, :size].flatten(0, 1)
        inverse = inverse.new_zeros(len(upper), 2 * size, 2 * size)
        inverse[:, :size, :size], inverse[:, size:, size:] = upper, lower
        inverse[:, size:, :size] = lower @ (below @ upper).neg_()
        size *= 2
    return inverse.view(*factor.shape[:-2], blocks, block, block)


def _diagonal(x: Tensor, block: int) -> Tensor:
    """Return the diagonal blocks of x [N, M, M] as [N, M / block, block, block]."""
    count = x.shape[-1] // max(block, 1)
    tiles = x.unflatten(2, (count, block)).unflatten(1, (count, block))
    return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def solve_twice(y: Tensor, factor: Tensor, inverse: Tensor) -> Tensor:
    """Solve (factor factor^T) x = y [N?, M, P] with the inverses of the diagonal blocks."""
    rows, block = factor.shape[-1], inverse.shape[-1]
    if inverse.shape[-3] == 1:
        inverse = inverse[..., 0, :rows, :rows]
        return inverse.mT @ (inverse @ y)
    x = y.clone(memory_format=torch.contiguous_format)
    subtract_ = torch.Tensor.addmm_ if y.ndim == 2 else torch.Tensor.baddbmm_
    starts = range(0, rows, block)

    def parts(number: int, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        end = min(start + block, rows)
        inverted = inverse[..., number, : end - start, : end - start]
        return inverted, factor[..., end:, start:end], x[..., start:end, :], x[..., end:, :]

    for number, start in enumerate(starts):
        inverted, below, here, rest = parts(number, start)
        here.copy_(inverted @ here)
        if rest.shape[-2]:
            subtract_(rest, below, here, alpha=-1)
    for number, start in reversed(list(enumerate(starts))):
        inverted, below, here, rest = parts(number, start)
        if rest.shape[-2]:
            subtract_(here, below.mT, rest, alpha=-1)
        here.copy_(inverted.mT @ here)
    return x
