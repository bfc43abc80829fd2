"""The verdict: the sentence says no more than the paired differences do."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from krrst_fast.evaluate import EvaluateConfig, Evaluation, Row
from krrst_fast.report.verdict import EvaluationSection, headline_of, typographic

RIVAL = [81.0, 79.5, 84.0, 82.5, 80.5]


def evaluation(probe: dict[str, list[float]], sets: int = 1) -> EvaluationSection:
    """Probes alone, read back from what is written; `sets` distilled ones take turns."""
    rows = [
        Row(
            method=method,
            seed=seed,
            scores={"probe-all": value},
            pretrain_loss=None,
            seconds=1.0,
            fingerprint="",
            set_index=seed % sets if method == "distilled" else None,
        )
        for method, values in probe.items()
        for seed, value in enumerate(values)
    ]
    config = EvaluateConfig(run=Path("run"), store=Path("store"), methods=tuple(probe))
    made = Evaluation(
        name="digits", config=config, rows=tuple(rows), num_images=7, environment={}, seconds=1.0
    )
    written = json.loads(json.dumps(made.to_json()))
    read = Evaluation.from_json(written, Path("digits.json"))
    assert read == made
    return EvaluationSection(evaluation=read, file="digits.json")


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


def test_headline_says_how_many_sets_it_is_about() -> None:
    probe = {"random_target": RIVAL, "distilled": [83.0, 81.5, 86.0, 84.5, 82.5]}
    for sets, words in ((1, "this one distilled set"), (2, "2 distilled sets, which the seeds")):
        headline = headline_of([evaluation(probe, sets)])
        assert headline is not None and f"It is about {words}" in headline.lede


def test_signs_on_the_page() -> None:
    text = "\u2212 1-2: -0.2 +- 0.5, from -3.1 to +0.0 of random-images"
    assert (
        typographic(text)
        == "\u2212 1-2: \u22120.2 \u00b1 0.5, from \u22123.1 to +0.0 of random-images"
    )


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
    assert view.evaluation.verdicts() == []
    assert headline_of([]) is None


def test_the_held_out_r2_is_a_mean_over_seeds() -> None:
    section = evaluation({"random_target": RIVAL[:2], "distilled": RIVAL[:2]})
    assert section.explained == ""
    values = {("random_target", 0): -0.25, ("random_target", 1): -0.27, ("distilled", 0): 0.125}
    rows = tuple(
        replace(row, r2=values.get((row.method, row.seed))) for row in section.evaluation.rows
    )
    section = replace(section, evaluation=replace(section.evaluation, rows=rows))
    assert section.explained.endswith(": Random, targets \u22120.260; Distilled +0.125.")
