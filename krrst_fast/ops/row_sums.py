"""Sums over rows that are read once: the D x D Gram of the primal form.

Letters: D features, P targets, C rows of a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.ops.arrays import check_finite_rows, read_rows, row_blocks
from krrst_fast.ops.closed_forms import ridge_base
from krrst_fast.ops.in_place import add_gram_, mirror_
from krrst_fast.ops.solver import RidgeOf

Rows = tuple[Tensor, Tensor, Tensor | None]
"""Features [C, D], targets [C, P], and float64 weights [C]."""

# Rows that are collected before they are added: products with fewer are slow.
_LEAST_ROWS = 512
# Squared norms that are smaller by more lose, in a Gram in float64, half of their digits.
_LOST = 1e-8
_LOST_BITS = 27
_EXPONENTS = 1200  # more than the exponents of float64


class LinearKernel(NamedTuple):
    """The linear kernel and its ridge.

    Attributes:
        ridge: A number or a tensor [], or where a fit allows it [P] or 0.
        ridge_of, scale, bias: As for `krrst_fast.krr_fit`.
    """

    ridge: float | Tensor
    ridge_of: RidgeOf
    scale: float
    bias: float

    @property
    def is_plain(self) -> bool:
        """Whether there is one ridge for all targets, and it is not 0."""
        return self.ridge.ndim == 0 if isinstance(self.ridge, Tensor) else self.ridge != 0

    def lam(self, trace: Tensor, total: float) -> Tensor:
        """Return what is added to the diagonal, [] or [P], for rows of this total weight."""
        base = ridge_base(self.ridge_of, trace, total)
        ridge = self.ridge
        return base * (ridge.to(base) if isinstance(ridge, Tensor) else ridge)

    def is_weak(self, trace: float, total: float) -> bool:
        """Return whether the smallest ridge does not cover rounding of a Gram of this trace."""
        lam = self.lam(torch.tensor(trace, dtype=torch.float64), total).reshape(-1)
        lam = lam[lam > 0]
        return lam.numel() > 0 and lam.min().item() < _LOST * trace


class RowSums:
    """The rows as long as they are at most as many as their columns, and then sums over them.

    The Gram is summed in float64. With an intercept each block is centred by its own mean, and the
    distance of the means is one row more: nothing cancels, however large the means are. Without
    one, a feature that is 1 stands for the bias, which is known when the sums are used.

    Where rows are so uneven that the Gram would round away some that matter, its square root is
    kept up to date in its place, by QR factorisations: several times the time and the memory.

    Args:
        centred: Whether there is an intercept.
        keeps: Whether few rows are kept as they are.
        dtype: Precision that rows are rounded to; the sums are float64.
    """

    def __init__(self, *, centred: bool, keeps: bool, dtype: torch.dtype) -> None:
        self.centred, self.dtype = centred, dtype
        self._keeps = keeps
        self.rows, self.total, self.trace = 0, 0.0, 0.0
        self._waiting: list[Rows] = []
        self._mean: tuple[Tensor, Tensor] | None = None
        self._sizes = torch.zeros(2 * _EXPONENTS, dtype=torch.int64)
        self._rooted = False
        self._gram: Tensor | None = None  # [D + 1, D + 1], its lower triangle; or its root
        self._right: Tensor | None = None  # [D + 1, P], or what the root has in its place

    def add(
        self, op: str, names: tuple[str, str], rows: tuple, kernel: LinearKernel, raises: bool
    ) -> None:
        """Add rows that were checked: F and Y, tensors or arrays, and weights or None.

        Raises:
            NonFiniteError: A row holds NaN or infinity, and `raises`.
        """
        f, y, weights = rows
        self.rows += len(f)
        keeps = self._keeps and self._gram is None and _are_few(self.rows, f.shape[1])
        few = len(f) + sum(len(x) for x, _, _ in self._waiting) < _LEAST_ROWS
        if keeps or few:
            # Copies: the caller may use its memory again.
            kept, targets = (read_rows(x, 0, len(x)).clone() for x in (f, y))
            if raises:
                for name, x in zip(names, (kept, targets)):
                    check_finite_rows(op, name, x, 0)
            self._waiting.append((kept, targets, None if weights is None else weights.clone()))
            return
        self._add_waiting(kernel)
        for first, last, block in row_blocks(f, _LEAST_ROWS):
            targets = read_rows(y, first, last)
            if raises:
                for name, x in zip(names, (block, targets)):
                    check_finite_rows(op, name, x, first)
            self._add(block, targets, None if weights is None else weights[first:last], kernel)
            del block  # before the next one is read

    @property
    def kept(self) -> Rows | None:
        """All rows so far, while they are kept; weights are None if no row has one."""
        if not self._keeps_all:
            return None
        f, y, weights = zip(*self._waiting)
        if all(w is None for w in weights):
            return torch.cat(f), torch.cat(y), None
        return torch.cat(f), torch.cat(y), torch.cat([_of_rows(*pair) for pair in zip(f, weights)])

    @property
    def _keeps_all(self) -> bool:
        if not self._keeps or self._gram is not None or not self._waiting:
            return False
        return _are_few(self.rows, self._waiting[0][0].shape[1])

    def finish(self, kernel: LinearKernel) -> None:
        """Add the rows that wait to the sums."""
        self._add_waiting(kernel)

    def forget(self) -> None:
        """Free the memory of the rows that are kept."""
        self._waiting = []

    def mean(self) -> tuple[Tensor, Tensor]:
        """Return the means of features [D] and targets [P] of centred rows."""
        assert self._mean is not None
        return self._mean[0][:-1], self._mean[1]

    def system(self, kernel: LinearKernel, in_place: bool) -> tuple[Tensor, Tensor, bool]:
        """Return scale Phi^T Phi [N, N] and scale Phi^T Y [N, P], whose solution are the weights.

        Phi has the constant feature last, if there is a bias. Third is whether the first two are
        the square root of that, R with R^T R = scale Phi^T Phi, and what it makes of Y.

        Args:
            in_place: The sums may be overwritten, and are of no use then.
        """
        assert self._gram is not None and self._right is not None
        gram, right = self._gram, self._right
        if not in_place:
            gram, right = gram.clone(), right.clone()
        d, constant = gram.shape[1] - 1, (kernel.bias / kernel.scale) ** 0.5
        if kernel.bias:
            if self._rooted:
                gram[:, d] *= constant
            else:
                gram[d] *= constant
                gram[d, d] *= constant
                right[d] *= constant
        else:
            gram, right = (gram[:, :d], right) if self._rooted else (gram[:d, :d], right[:d])
        scale = kernel.scale**0.5 if self._rooted else kernel.scale
        return gram.mul_(scale), right.mul_(scale), self._rooted

    def _add_waiting(self, kernel: LinearKernel) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        f, y, weights = zip(*waiting)
        of_rows = torch.cat([_of_rows(*pair) for pair in zip(f, weights)])
        rows, targets = torch.cat(f), torch.cat(y)
        del waiting, f, y
        for first, last, block in row_blocks(rows, _LEAST_ROWS):
            self._add(block, targets[first:last], of_rows[first:last], kernel)

    def _add(self, f: Tensor, y: Tensor, weights: Tensor | None, kernel: LinearKernel) -> None:
        """Add a block of rows."""
        of_rows = _of_rows(f, weights)
        total = of_rows.sum().item()
        if total == 0:
            return
        # The last row and the last column are for what is known of all rows of the block.
        x, z = (self._exact(part, 1, more) for part, more in ((f, 1), (y, 0)))
        if self.centred:
            self._centre_(x, z, of_rows, total)
        else:
            x, z, root = x[:-1], z[:-1], of_rows.sqrt()[:, None]
            x[:, -1] = 1
            if weights is not None:
                x.mul_(root)
                z.mul_(root)
        self.total += total
        self._measure(x[:, :-1])
        if self._gram is None or self._right is None:
            self._gram = x.new_zeros(x.shape[1], x.shape[1])
            self._right = x.new_zeros(x.shape[1], y.shape[1])
        if self._is_lost(x.shape[1] - 1, kernel) != self._rooted:
            self._gram, self._right = self._converted(self._gram, self._right)
            self._rooted = not self._rooted
        if self._rooted:
            self._gram, self._right = _joined(self._gram, self._right, x, z)
        else:
            add_gram_(self._gram, x.mT)
            self._right.addmm_(x.mT, z)

    def _exact(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return x [C, .] in float64, with room for more rows and columns."""
        out = x.new_empty(len(x) + rows, x.shape[1] + columns, dtype=torch.float64)
        out[: len(x), : x.shape[1]] = x.to(self.dtype)
        return out

    def _centre_(self, x: Tensor, z: Tensor, weights: Tensor, total: float) -> None:
        """Subtract the means of the block and weigh; the last row is the distance of the means."""
        root, means = weights.sqrt()[:, None], []
        known, both = self.total, self.total + total
        x[:, -1] = 0
        for i, rows in enumerate((x, z)):
            mean = (weights / total) @ rows[:-1]
            rows[:-1].sub_(mean).mul_(root)
            before = mean if self._mean is None else self._mean[i]
            rows[-1] = (known / both * total) ** 0.5 * (mean - before)
            means.append(before + (mean - before) * (total / both))
        self._mean = means[0], means[1]

    def _measure(self, x: Tensor) -> None:
        """Count rows [C, D] by the size of their squared norms."""
        squares = torch.linalg.vector_norm(x, dim=-1).square()
        self.trace += squares.sum().item()
        squares = squares[(squares > 0) & squares.isfinite()].cpu()
        exponents = torch.frexp(squares).exponent.long() + _EXPONENTS
        self._sizes += torch.bincount(exponents, minlength=len(self._sizes))

    def _is_lost(self, d: int, kernel: LinearKernel) -> bool:
        """Return whether fewer than D rows matter beside the largest, and others may be needed."""
        some = self._sizes.nonzero()
        trace = kernel.scale * self.trace + kernel.bias * self.total
        if len(some) == 0 or not kernel.is_weak(trace, self.total):
            return False
        matter = int(self._sizes[max(0, int(some[-1]) - _LOST_BITS) :].sum())
        return matter < min(d, int(self._sizes.sum()))

    def _converted(self, gram: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the square root of the Gram and of its right side, or the Gram of the root."""
        if self._rooted:
            return gram.mT @ gram, gram.mT @ right
        values, vectors = torch.linalg.eigh(mirror_(gram))
        some = values > len(values) * 2.0**-52 * values[-1]
        root, basis = values[some].sqrt()[:, None], vectors[:, some].mT
        return root * basis, basis @ right / root


def _are_few(rows: int, columns: int) -> bool:
    """Return whether rows are kept; without columns there is nothing else to keep."""
    return rows <= columns or columns == 0


def _of_rows(f: Tensor, weights: Tensor | None) -> Tensor:
    """Return the weights [C], or ones, in float64."""
    return f.new_ones(len(f), dtype=torch.float64) if weights is None else weights


def _joined(root: Tensor, right: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root, and its right side, with rows x [C, D + 1] and targets z added."""
    rows, targets = torch.cat((root, x)), torch.cat((right, z))
    # From large to small, QR keeps the digits of each row.
    order = torch.linalg.vector_norm(rows, dim=-1).argsort(descending=True)
    q, root = torch.linalg.qr(rows[order])
    return root, q.mT @ targets[order]
