"""The planner: counted work, and the choice it leads to."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from krrst_fast import Solver, krr_mse, plan
from krrst_fast.backends import cpp
from krrst_fast.planner import FORMS, Form, sizes
from krrst_fast.planner.peaks import peak_bytes as peak_bytes_of

sys.path.append(str(Path(__file__).resolve().parent.parent))
peak_bytes = import_module("bench.common").peak_bytes


def test_counts_of_the_paper_setting() -> None:
    # M = 1000, B = 1024, D = 8192, P = 512: a symmetric gram is 8.19 GFLOP, K_rs 16.8, and so on.
    flops = plan(m=1000, b=1024, d=8192, p=512).flops
    gram, k_rs = 1000**2 * 8192, 2 * 1024 * 1000 * 8192
    solve = 1000**3 / 3 + 4 * 1000**2 * 512
    k = gram + k_rs + 6 * 1024 * 1000 * 512 + 2 * 1000**2 * 512 + k_rs + 2 * gram + solve
    assert flops["k"] == pytest.approx(k, rel=1e-12)
    assert round(flops["w"] / 1e9, 1) == 69.7


@pytest.mark.parametrize(
    "m,d,p,form",
    [
        (1000, 8192, 512, "k"),
        (1000, 8192, 10, "w"),
        (2000, 8192, 512, "w"),
        (10, 25088, 2048, "k"),
        (5000, 512, 512, "primal"),
        (10000, 8192, 512, "primal"),
    ],
)
def test_the_cheapest_form_is_taken(m: int, d: int, p: int, form: str) -> None:
    choice = plan(m=m, b=1024, d=d, p=p)
    assert choice.form == form
    assert choice.flops[form] == min(choice.flops.values())


def test_no_primal_form_where_it_is_less_accurate() -> None:
    assert plan(m=100, b=1, d=100, p=1).form != "primal"


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="plan: d must not be negative, got -1"):
        plan(m=1, b=1, d=-1, p=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m,b,d,p", [(600, 64, 100, 9), (600, 300, 700, 100), (300, 200, 900, 300)])
def test_the_bytes_are_those_of_the_allocator(
    m: int, b: int, d: int, p: int, dtype: torch.dtype, form: Form
) -> None:
    shapes = ((m, d), (m, p), (b, d), (b, p))
    tensors = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    leaves = [x.requires_grad_() for x in tensors[:2]]
    settings = {"solver": Solver(form=form), "ridge": 1e-2}

    def measured() -> float:
        return peak_bytes(lambda: torch.autograd.grad(krr_mse(*tensors, **settings), leaves))

    counted = plan(m=m, b=b, d=d, p=p, itemsize=dtype.itemsize).bytes[form]
    if sizes.suits_whole(form, 1, m, d, b, p):
        assert measured() < counted  # scratch memory of the operators is in no tensor
    else:
        assert counted == pytest.approx(measured(), rel=0.1)
    by_steps = peak_bytes_of(form, m, b, d, p, dtype.itemsize, whole=False)
    with cpp.by_steps():
        assert by_steps == pytest.approx(measured(), rel=0.1)


def test_problems_side_by_side_cost_as_much_as_one_after_the_other() -> None:
    one, many = (plan(m=25, b=75, d=640, p=5, problems=n) for n in (1, 40))
    assert many.form == one.form == "w"
    assert many.flops["w"] == 40 * one.flops["w"] and many.bytes["w"] == 40 * one.bytes["w"]
