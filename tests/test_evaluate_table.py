"""Means, deviations, paired differences and the table, against figures worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from krrst_fast.errors import ConfigError, DataError
from krrst_fast.evaluate.config import (
    EvaluateConfig,
    FinetuneConfig,
    Method,
    PretrainConfig,
    ProbeConfig,
)
from krrst_fast.evaluate.paired import (
    Sample,
    in_words,
    interval_factor,
    paired_difference,
    signed,
)
from krrst_fast.evaluate.table import Evaluation, Row

FIGURES: dict[Method, tuple[float, ...]] = {
    "none": (70.0, 74.0, 75.0),
    "random_target": (80.0, 84.0, 79.0),
    "distilled": (83.0, 85.0, 84.0),
}


def evaluation(seeds: int = 3, finetune: bool = False) -> Evaluation:
    methods = tuple(FIGURES)
    rows = [
        Row(
            method=method,
            seed=seed,
            scores={"probe-all": FIGURES[method][seed]}
            | ({"finetune": FIGURES[method][seed] + 10} if finetune else {}),
            pretrain_loss=None if method == "none" else 0.25,
            seconds=1.5,
            fingerprint="0",
        )
        for seed in range(seeds)
        for method in methods
    ]
    config = EvaluateConfig(run=Path("run"), store=Path("digits"), methods=methods, seeds=seeds)
    return Evaluation(
        name="digits",
        config=config,
        rows=tuple(rows),
        num_images=30,
        environment={"cpu": "any"},
        seconds=13.5,
    )


def test_summary_by_hand() -> None:
    summary = evaluation().summary("distilled", "probe-all")
    assert summary is not None and summary.difference is not None
    assert summary.mean == pytest.approx(84.0)
    assert summary.std == pytest.approx(1.0)
    # Differences 3, 1, 5: mean 3, standard deviation 2, standard error 2 / sqrt(3).
    assert summary.difference.mean == pytest.approx(3.0)
    assert summary.difference.standard_error == pytest.approx(2 / math.sqrt(3))
    assert summary.difference.count == 3


def test_rival_has_no_difference_and_absent_task_no_summary() -> None:
    result = evaluation()
    rival = result.summary("random_target", "probe-all")
    assert rival is not None and rival.difference is None
    assert result.summary("distilled", "finetune") is None
    assert result.summary("target", "probe-all") is None
    assert result.tasks() == ("probe-all",)


def test_paired_difference_takes_common_seeds_only() -> None:
    difference = paired_difference({0: 1.0, 1: 2.0, 5: 100.0}, {1: 1.5, 0: 2.5, 7: 0.0})
    assert difference is not None
    assert (difference.mean, difference.count) == (-0.5, 2)
    assert difference.standard_error == pytest.approx(1.0)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_one_seed_has_no_spread() -> None:
    summary = evaluation(seeds=1).summary("distilled", "probe-all")
    assert summary is not None and summary.difference is not None
    assert summary.std is None
    assert summary.difference.standard_error is None
    assert evaluation(seeds=1).verdicts() == [
        "probe-all: distilled - random_target = +3.0 points (1 paired seed)"
    ]


def test_table_text() -> None:
    lines = evaluation(finetune=True).table().splitlines()
    assert lines[4:] == [
        "method         probe-all    - random_target  finetune     - random_target",
        "-------------  -----------  ---------------  -----------  ---------------",
        "none           73.0 +- 2.6  -8.0 +- 2.0      83.0 +- 2.6  -8.0 +- 2.0",
        "random_target  81.0 +- 2.6  -                91.0 +- 2.6  -",
        "distilled      84.0 +- 1.0  +3.0 +- 1.2      94.0 +- 1.0  +3.0 +- 1.2",
        "",
        "probe-all: distilled - random_target = +3.0 +- 1.2 points "
        "(3 paired seeds, 95 % interval -2.0 to +8.0)",
        "finetune: distilled - random_target = +3.0 +- 1.2 points "
        "(3 paired seeds, 95 % interval -2.0 to +8.0)",
    ]


def test_table_without_the_rival_has_no_differences() -> None:
    full = evaluation()
    alone = replace(full, config=replace(full.config, methods=("none", "distilled")))
    alone = replace(alone, rows=tuple(row for row in full.rows if row.method != "random_target"))
    assert alone.table().splitlines()[3:] == [
        "method     probe-all",
        "---------  -----------",
        "none       73.0 +- 2.6",
        "distilled  84.0 +- 1.0",
        "",
        "probe-all: distilled - none, the best rival, = +11.0 +- 1.2 points "
        "(3 paired seeds, 95 % interval +6.0 to +16.0)",
    ]


def test_json_holds_every_figure() -> None:
    result = evaluation()
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert Evaluation.from_json(values, Path("digits.json")) == result
    distilled = values["summary"][2]
    assert distilled["method"] == "distilled"
    assert distilled["scores"]["probe-all"]["difference"]["mean"] == pytest.approx(3.0)
    assert set(distilled["scores"]) == {"probe-all"}
    assert (values["num_images"], values["seconds"], values["unit"]) == (30, 13.5, "per cent")


def test_a_file_of_something_else_is_named() -> None:
    good = json.loads(json.dumps(evaluation().to_json()))
    row = good["rows"][0]
    for change in (
        {"format_version": 3},
        {"rows": [{**row, "scores": {"probe-all": "high"}}]},
        {"rows": [{**row, "seed": None}]},
        {"rows": [{**row, "colour": 1}]},
        {"rows": 3},
        {"config": {}},
    ):
        with pytest.raises(DataError, match="odd.json: not a result of krrst evaluate") as raised:
            Evaluation.from_json({**good, **change}, Path("odd.json"))
        assert "\n" not in str(raised.value)
    for values in ({}, []):
        with pytest.raises(DataError, match="odd.json: not a result of krrst evaluate"):
            Evaluation.from_json(values, Path("odd.json"))


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
    assert signed(-0.25, 0.5) == "-0.2 +- 0.5"
    assert signed(-0.04) == "+0.0"
    assert signed(3.04, 0.75) == "+3.0 +- 0.8"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PretrainConfig(steps=0), "PretrainConfig: steps must be at least 1, got 0"),
        (lambda: PretrainConfig(momentum=1.0), "momentum must be in"),
        (lambda: ProbeConfig(labels=(0,)), "labels must be one or more of a number from 1"),
        (lambda: ProbeConfig(label_draws=2), "label_draws must be at least 1, and 1 where all"),
        (lambda: ProbeConfig(ridge=0.0), "ridge must be positive"),
        (lambda: FinetuneConfig(steps=-1), "FinetuneConfig: steps must be at least 0, got -1"),
        (
            lambda: EvaluateConfig(run=Path("r"), store=Path("s"), methods=()),
            "methods must be one or more of none, random_labels",
        ),
        (
            lambda: EvaluateConfig(run=Path("r"), store=Path("s"), methods=("none", "none")),
            "methods must be given once each",
        ),
        (lambda: EvaluateConfig(run=Path("r"), store=Path("s"), seeds=0), "seeds must be at least"),
        (
            lambda: EvaluateConfig(run=Path("r"), store=Path("s"), name="a/b"),
            "name must be a file name",
        ),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_seeds_of_one_set_are_not_independent() -> None:
    values, sets = {0: 1.0, 1: 3.0, 2: 5.0, 3: 1.0, 4: 3.0, 5: 5.0}, {0: 0, 1: 1, 2: 2, 3: 0, 4: 1}
    # As many values as sets: the second seed of a set tells nothing new here.
    by = Sample(values, {**sets, 5: 2})
    once = Sample({0: 1.0, 1: 3.0, 2: 5.0})
    assert by.independent == 3 and by.mean == once.mean
    assert by.standard_error == pytest.approx(once.standard_error)
    assert by.interval == pytest.approx(once.interval)
    assert in_words(by).startswith("+3.0 +- 1.2 points (6 paired seeds of 3 sets, 95 % interval")
    # One set, or a set for each seed: as without.
    for given in ({seed: 0 for seed in values}, {seed: seed for seed in values}):
        assert Sample(values, given).standard_error == Sample(values).standard_error


@pytest.mark.parametrize(("per_class", "labels"), [(None, "all"), (5, "5")])
def test_a_file_of_the_first_version_is_read(per_class: int | None, labels: str) -> None:
    made = evaluation(finetune=True)
    values = json.loads(json.dumps(made.to_json()))
    values["format_version"] = 1
    values["config"]["probe"]["labels_per_class"] = per_class
    for name in ("labels", "measures", "penalty"):
        del values["config"]["probe"][name]
    for name in ("label_counts", "notes"):
        values.pop(name, None)
    for row in values["rows"]:
        scores = row.pop("scores")
        row |= {"probe": scores["probe-all"], "outputs": None, "finetune": scores["finetune"]}
    read = Evaluation.from_json(values, Path("old.json"))
    assert read.tasks() == (f"probe-{labels}", "finetune")
    for method in FIGURES:
        assert read.accuracies(method, f"probe-{labels}") == made.accuracies(method, "probe-all")
        assert read.accuracies(method, "finetune") == made.accuracies(method, "finetune")
    assert read.sizes() == {"none": 0, "random_target": 30, "distilled": 30}
