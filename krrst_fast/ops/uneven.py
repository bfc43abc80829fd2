"""Rows of very different norms, which the primal form must not lose.

Its D x D Gram is a sum over rows: in it the large ones round the small ones away. The M x M Gram of
the dual forms has each row for itself.
"""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.ops.problem import Problem, in_trace
from krrst_fast.ops.solver import Solver
from krrst_fast.planner import Form

# Squared norms that differ by less cost the primal form in float32 at most two digits.
_EVEN = 32.0
# As much smaller, a row is lost to half of the digits of float64.
_LOST = 1e-8
# The dual forms factor M x M.
_MOST_ROWS = 4096


def exact_primal(problem: Problem, solver: Solver) -> tuple[Form, Problem]:
    """Return the form and the problem in which the primal form keeps every row.

    For uneven rows that is float64, and a dual form where float64 does not suffice or is not to be
    had. In a trace, where norms cannot be read, it is float64; a GPU, which would have to wait for
    the norms, computes in the precision that was asked for.
    """
    f = problem.f_syn
    single = solver.precision == "fast" or solver.backend == "triton"
    if not f.is_cpu:
        return "primal", problem
    if in_trace(f):
        return "primal", problem if single else _in_float64(problem)
    if f.numel() == 0:
        return "primal", problem
    least, most = (x.item() for x in torch.linalg.vector_norm(f.detach(), dim=-1).aminmax())
    square = problem.bias / problem.scale
    # A norm that is not finite is an error with its own message.
    if most**2 + square <= _EVEN * (least**2 + square) or not most < float("inf"):
        return "primal", problem
    dual = solver.form == "auto" and f.shape[-2] <= _MOST_ROWS and (single or _is_lost(f.detach()))
    return "w" if dual else "primal", problem if single else _in_float64(problem)


def _is_lost(f: Tensor) -> bool:
    """Return whether in a problem of f [N?, M, D] less than D rows matter beside the largest.

    Norms are those of columns of one norm, since a column has its digits for itself.
    """
    columns = torch.linalg.vector_norm(f, dim=-2, keepdim=True, dtype=torch.float64)
    squares = (f / columns.clamp(min=torch.finfo(torch.float64).tiny)).square().sum(-1)  # [N?, M]
    matter = (squares > _LOST * squares.amax(-1, keepdim=True)).sum(-1)
    return matter.min().item() < min(f.shape[-2:])


def _in_float64(problem: Problem) -> Problem:
    fields: list[Any] = [x.double() if isinstance(x, Tensor) else x for x in problem]
    return Problem(*fields)
