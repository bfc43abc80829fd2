"""Arithmetic that the computations need: two a multiply-add, and of a Gram only one half."""

from krrst_fast import plan


def krr(m: int, b: int, d: int, p: int) -> float:
    """Count the forward and backward pass of the KRR loss in its cheapest closed form."""
    chosen = plan(m=m, b=b, d=d, p=p)
    return chosen.flops[chosen.form]


def gram(n: int, d: int) -> float:
    """Count half of an N x N product over D."""
    return n * n * d


def product(i: int, k: int, j: int) -> float:
    """Count the product of an I x K and a K x J matrix."""
    return 2 * i * k * j


def solve(m: int, p: int) -> float:
    """Count the Cholesky factor of M x M and two triangular solves with P right-hand sides."""
    return m**3 / 3 + 2 * m * m * p


def fit(m: int, d: int, p: int) -> float:
    """Count the way from the features to W [D, P], by the smaller of the two systems."""
    if m > d:
        return gram(d, m) + product(d, m, p) + solve(d, p)
    return gram(m, d) + solve(m, p) + product(d, m, p)
