"""The verdict: the sentence says no more than the paired differences do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krrst_fast.verdict import EvaluationView, headline_of, interval_factor, signed, view_of

RIVAL = [81.0, 79.5, 84.0, 82.5, 80.5]


def evaluation(probe: dict[str, list[float]]) -> EvaluationView:
    """An evaluation file of probes alone, its summary by the formulas of the sample."""
    summary: list[dict[str, Any]] = []
    for method, values in probe.items():
        difference = np.array(values) - np.array(probe["random_target"])
        count = len(values)
        spread = count > 1
        error = difference.std(ddof=1) / count**0.5 if spread else None
        found = {
            "mean": np.mean(values),
            "std": np.std(values, ddof=1) if spread else None,
            "count": count,
            "difference": {"mean": difference.mean(), "standard_error": error, "count": count},
        }
        if method == "random_target":
            found["difference"] = None
        summary.append({"method": method, "probe": found, "finetune": None})
    rows = [
        {"method": method, "seed": seed, "probe": value, "finetune": None}
        for method, values in probe.items()
        for seed, value in enumerate(values)
    ]
    config = {
        "model": {"kind": "convnet"},
        "pretrain": {"steps": 300},
        "probe": {"solver": "ridge", "steps": 1, "labels_per_class": 2},
        "finetune": {"steps": 0, "labels_per_class": None},
    }
    values = {"name": "digits", "num_images": 7, "rows": rows, "summary": summary}
    return view_of({**values, "config": config}, Path("digits.json"))


@pytest.mark.parametrize(
    ("ours", "claim"),
    [
        ([81.2, 79.1, 84.4, 82.2, 80.8], "does not measurably beat"),
        ([79.0, 77.0, 82.5, 80.0, 78.5], "loses to"),
        ([82.0], "was compared once with"),
    ],
)
def test_headline_is_honest(ours: list[float], claim: str) -> None:
    rival = RIVAL[: len(ours)]
    headline = headline_of([evaluation({"random_target": rival, "distilled": ours})])
    difference = np.mean(np.array(ours) - np.array(rival))
    assert headline is not None and claim in headline.before
    assert f"{abs(difference):.1f}" in headline.figure


def test_interval_is_students() -> None:
    """Against the quantiles of samples of t = mean / standard error, drawn from normal values."""
    draw = np.random.default_rng(0)
    for seeds in (2, 3, 5, 10):
        samples = draw.normal(size=(200_000, seeds))
        t = samples.mean(1) / (samples.std(1, ddof=1) / seeds**0.5)
        inside = np.mean(np.abs(t) <= interval_factor(seeds))
        assert abs(inside - 0.95) < 0.003, (seeds, inside)
    assert 2.0 < interval_factor(500) < interval_factor(14)


def test_signs() -> None:
    assert signed(-0.25, 0.5) == "−0.2 ± 0.5"
    assert signed(-0.04, None) == "+0.0"
    assert signed(3.04, 0.75) == "+3.0 ± 0.8"


def test_lede_places_the_images_between_floor_and_ceiling() -> None:
    probe = {
        "none": [76.0, 78.0],
        "random_target": [80.0, 82.0],
        "distilled": [83.0, 84.5],
        "target": [85.0, 87.0],
    }
    headline = headline_of([evaluation(probe)])
    assert headline is not None
    assert "Of the 9.0 points between no pre-training (77.0 %)" in headline.lede
    assert "random images with targets give +4.0 and the distilled images +6.8" in headline.lede
    # Differences 3 and 2.5: mean 2.75, standard error 0.25, one degree of freedom.
    assert "interval is \u22120.4 to +5.9 points" in headline.lede
    assert "does not measurably beat" in headline.before
    headline = headline_of([evaluation({**probe, "target": [75.0, 76.0]})])
    assert headline is not None and "There is nothing to distil." in headline.lede


def test_without_the_rival_there_is_no_headline() -> None:
    view = evaluation({"random_target": RIVAL, "none": RIVAL})
    assert headline_of([view]) is None
    assert view.verdicts == []
    assert headline_of([]) is None
