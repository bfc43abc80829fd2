"""The planner: counted work, and the choice it leads to."""

import pytest

from krrst_fast import plan


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
