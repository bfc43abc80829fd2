"""The sizes from which on an implementation on the CPU is faster than another; no torch.

`backends.cpp` chooses by them, and `planner.peaks` counts what the choice needs.
"""

from typing import Literal

Form = Literal["k", "w", "primal"]

FLOAT64_UP_TO = 512
"""Grams of at most this many rows are factored in float64, whatever their own precision."""

# Measured against MKL on one core, for a [rows, depth] that is read once from memory: stored by
# rows, the thin product is faster below 16 columns; stored by columns, which MKL reads slowly, it
# is faster below 256 columns if it is deep.
_ROW_MAJOR_COLUMNS = 16
_COLUMN_MAJOR_COLUMNS = 256
_DEEP = 64
_THIN_NUMBERS = 4096
# Multiplications of the forward pass of one problem, measured on one core and two for M to 400, B
# to 1024, D to 8192, P to 2048, with AVX2 and AVX-512. A whole pass in one operator is 1.0 to 2.4
# times as fast as its steps up to the first; from there MKL's larger products decide (0.9 at
# somewhat more with AVX2, 0.8 at ten times as many). Of
# more problems than a few, each step pays for one call in all, and streams its operands better:
# the whole pass is half as fast at 3e4 multiplications a problem, and as fast at 5e5.
_WHOLE = 2**26
_FEW_PROBLEMS = 64
_WHOLE_OF_MANY = 2**19


def suits_whole(form: str, problems: int, m: int, d: int, b: int, p: int) -> bool:
    """Return whether one C++ operator for each pass is faster than one for each step."""
    order = d if form == "primal" else m
    if not 0 < order < FLOAT64_UP_TO or m == 0 or d == 0:
        return False
    if form == "w":
        work = m * m * d + (m + b) * d * p
    elif form == "k":
        work = (m + b) * m * (d + p)
    else:
        work = m * d * d + (m + b) * d * p
    return work <= _WHOLE and (problems <= _FEW_PROBLEMS or work >= _WHOLE_OF_MANY)


def suits_thin(rows: int, depth: int, columns: int, by_columns: bool) -> bool:
    """Return whether the operator for thin products is faster; by_columns: of the first factor."""
    if not (columns > 1 and 2 * columns < rows and rows * depth >= _THIN_NUMBERS):
        return False
    most = _COLUMN_MAJOR_COLUMNS if by_columns and depth >= _DEEP else _ROW_MAJOR_COLUMNS
    return columns < most
