"""Figures: what is drawn stands where its numbers say."""

from typing import Any

import numpy as np
import pytest

from krrst_fast.evaluate.table import Sample
from krrst_fast.report import figures


def test_dots_stand_at_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        figures.DotRow("a", Sample({0: 10.0, 1: 20.0}), 2.5, figures.ACCENT),
        figures.DotRow("b", Sample({0: 30.0}), None, figures.MUTED),
    ]
    drawn: list[Any] = []

    def kept(title: str, draw: Any, caption: str, height: float) -> str:
        from matplotlib.figure import Figure

        drawn.append(Figure())
        draw(drawn[0])
        return title

    with monkeypatch.context() as patch:
        patch.setattr(figures, "_curve", kept)
        figures.dot_plot(rows, title="t", unit="u", caption="c", zero=True, linked=("a", "b"))
    lines = [line.get_xydata().tolist() for line in drawn[0].axes[0].lines]
    assert [[10.0, 0.2], [20.0, 0.2]] in lines and [[30.0, 1.2]] in lines, "dots"
    assert [[15.0, -0.15]] in lines and [[30.0, 0.85]] in lines, "means"
    assert [[10.0, 0.2], [30.0, 1.2]] in lines, "the same seed is joined"
    (bar,) = drawn[0].axes[0].collections[0].get_segments()
    assert bar.tolist() == [[12.5, -0.15], [17.5, -0.15]]
    svg = figures.dot_plot(rows, title="t", unit="points", caption="c").svg
    assert ">points<" in svg and "var(--accent)" in svg and "#00000" not in svg


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
