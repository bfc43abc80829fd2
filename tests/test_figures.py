"""Figures: what is drawn stands where its numbers say."""

import re

import numpy as np
import pytest

from krrst_fast import figures


def test_dots_stand_at_their_values() -> None:
    rows = [
        figures.DotRow(label="a", values={0: 10.0, 1: 20.0}, mean=15.0, spread=2.5),
        figures.DotRow(label="b", values={0: 30.0}, mean=30.0, spread=None),
    ]
    svg = figures.dot_plot(rows, title="t", unit="u")
    x = [float(value) for value in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert abs((x[1] - x[0]) - (x[2] - x[1])) < 0.21
    ticks = [
        (float(v), float(t)) for v, t in re.findall(r'"tick" x="([\d.]+)" y="\d+">([\d.]+)<', svg)
    ]
    a, b = np.polyfit([t for _, t in ticks], [v for v, _ in ticks], 1)
    assert np.allclose(x, [a * v + b for v in (10, 20, 30)], atol=0.3)


def test_running_median_and_thinning_keep_the_shape() -> None:
    x = np.arange(5000, dtype=np.float64)
    y = np.where(x % 100 == 0, 50.0, 1.0 + x / 5000)
    places, medians = figures.running_median(x, y)
    middle = slice(10, -10)
    assert len(places) == 300
    assert np.allclose(medians[middle], 1.0 + places[middle] / 5000, atol=0.01)
    kept_x, kept_y = figures.thinned(x, y)
    assert len(kept_x) <= figures.DRAWN_POINTS
    assert kept_y.max() == 50.0 and kept_y.min() == y.min()
    assert (np.diff(kept_x) > 0).all()
    few = figures.thinned(x[:50], y[:50])
    assert (few[0] == x[:50]).all() and (few[1] == y[:50]).all()


def test_losses_are_binned_by_age() -> None:
    age = np.array([0, 1, 1, 2, 3, 4, 7, 8, 11], dtype=np.float64)
    bins = figures.age_bins(age, age * 10)
    assert [label for label, _ in bins] == ["0", "1", "2–3", "4–7", "8–11"]
    assert [values.tolist() for _, values in bins] == [[0], [10, 10], [20, 30], [40, 70], [80, 110]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0213, "0.0213"), (1.0, "1"), (12345.6, "12,346"), (2e5, "2×10⁵"), (1e-6, "10⁻⁶"), (0, "0")],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert figures.number(value) == text
