"""What an evaluation says: its numbers as table and dot plots, and one sentence about them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError
from krrst_fast.figures import Curve, DotRow, dot_plot

RIVAL, OURS = "random_target", "distilled"
LABELS = {
    "none": "No pre-training",
    "random_labels": "Random, labels",
    "random_target": "Random, targets",
    "distilled": "Distilled",
    "target": "Target network",
}
TASKS = {"probe": "Linear probe", "finetune": "Fine-tuning"}
WORDS = {"probe": "linear-probe accuracy", "finetune": "accuracy after fine-tuning"}
ROLES = {"random_target": "rival", "distilled": "accent", "target": "ink"}

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom: a handful of seeds needs them.
_T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16)
_T975_MORE = 2.145


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The sentence at the top: `figure` is the number in it, `lede` what stands below."""

    before: str
    figure: str = ""
    after: str = ""
    lede: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method under one test: accuracies in % by seed, and points of difference to the rival."""

    method: str
    by_seed: Mapping[int, float]
    mean: float
    std: float | None
    difference: float | None
    error: float | None
    differences: Mapping[int, float]

    @property
    def label(self) -> str:
        """The method in words."""
        return LABELS.get(self.method, self.method)

    @property
    def role(self) -> str:
        """The colour it is drawn in."""
        return ROLES.get(self.method, "muted")

    @property
    def interval(self) -> float | None:
        """Half the 95 % interval of the difference; None for a single seed."""
        if self.error is None or len(self.differences) < 2:
            return None
        return self.error * interval_factor(len(self.differences))


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One test of every method."""

    task: str
    outcomes: Sequence[Outcome]

    @property
    def title(self) -> str:
        """The test in words."""
        return TASKS[self.task]

    def outcome(self, method: str) -> Outcome | None:
        """The outcome of `method`, if it was run."""
        return next((o for o in self.outcomes if o.method == method), None)

    @property
    def plots(self) -> list[Curve]:
        """Accuracies, and where there is a rival the paired differences to it."""
        plots = [_accuracy_plot(self)]
        if any(o.differences for o in self.outcomes):
            plots.append(_difference_plot(self))
        return plots


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """One evaluation file, read."""

    name: str
    file: str
    num_images: int
    setting: str
    settings: Mapping[str, Any]
    measures: Sequence[Measure]

    @property
    def methods(self) -> list[str]:
        """Every method of the file, in its order."""
        return list(dict.fromkeys(o.method for m in self.measures for o in m.outcomes))

    @property
    def seeds(self) -> list[int]:
        """Every seed of the file."""
        outcomes = (o for m in self.measures for o in m.outcomes)
        return sorted({seed for outcome in outcomes for seed in outcome.by_seed})

    @property
    def verdicts(self) -> list[str]:
        """A line a test, where ours and the rival were both run."""
        ours = ((measure.title, measure.outcome(OURS)) for measure in self.measures)
        return [
            f"{title}: {signed(o.difference, o.error)} points over random images with targets"
            + (f", 95\u00a0% interval {_ends(o)}." if o.interval is not None else ", one seed.")
            for title, o in ours
            if o is not None and o.difference is not None
        ]


def interval_factor(seeds: int) -> float:
    """Standard errors in half a 95 % interval of the mean of `seeds` paired differences."""
    return _T975[seeds - 2] if seeds - 2 < len(_T975) else _T975_MORE


def view_of(values: Mapping[str, Any], path: Path) -> EvaluationView:
    """Read what `evaluate` wrote to `path`.

    Raises:
        DataError: it is something else.
    """
    try:
        rows = values["rows"]
        measures = [_measure(task, values["summary"], rows) for task in TASKS]
        return EvaluationView(
            name=str(values["name"]),
            file=f"evaluation/{path.name}",
            num_images=int(values["num_images"]),
            setting=_setting(values["config"]),
            settings=values["config"],
            measures=[measure for measure in measures if measure.outcomes],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a result of krrst evaluate ({error!r})") from None


def _measure(
    task: str, summaries: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> Measure:
    def by_seed(method: str) -> dict[int, float]:
        mine = [row for row in rows if row["method"] == method and row[task] is not None]
        return {int(row["seed"]): float(row[task]) for row in mine}

    rival, outcomes = by_seed(RIVAL), []
    for summary in summaries:
        method, found = summary["method"], summary[task]
        if found is None:
            continue
        ours, difference = by_seed(method), found["difference"]
        paired = sorted(ours.keys() & rival.keys()) if difference else []
        outcomes.append(
            Outcome(
                method=method,
                by_seed=ours,
                mean=float(found["mean"]),
                std=found["std"],
                difference=difference["mean"] if difference else None,
                error=difference["standard_error"] if difference else None,
                differences={seed: ours[seed] - rival[seed] for seed in paired},
            )
        )
    return Measure(task=task, outcomes=outcomes)


def _setting(config: Mapping[str, Any]) -> str:
    pretrain, probe, finetune = config["pretrain"], config["probe"], config["finetune"]
    text = f"Pre-training: {pretrain['steps']:,} SGD steps on a fresh {config['model']['kind']}. "
    solver = "ridge regression" if probe["solver"] == "ridge" else f"{probe['steps']:,} SGD steps"
    text += f"Linear probe: {solver}, {_labels(probe['labels_per_class'])}."
    if finetune["steps"]:
        text += f" Fine-tuning: {finetune['steps']:,} SGD steps, "
        text += f"{_labels(finetune['labels_per_class'])}."
    return text


def _labels(per_class: int | None) -> str:
    if per_class is None:
        return "all training labels"
    return f"{per_class} label{'s' if per_class > 1 else ''} a class"


def headline_of(evaluations: Sequence[EvaluationView]) -> Headline | None:
    """The sentence on the first evaluation that has both ours and the rival; None without one."""
    for evaluation in evaluations:
        for measure in evaluation.measures:
            headline = _sentence(evaluation, measure)
            if headline is not None:
                return headline
    return None


def _sentence(evaluation: EvaluationView, measure: Measure) -> Headline | None:
    ours = measure.outcome(OURS)
    if ours is None or ours.difference is None:
        return None
    count, seeds = evaluation.num_images, len(ours.differences)
    images = f"{count:,} distilled image{'s' if count != 1 else ''}"
    rivals = f"{count:,} random real one{'s' if count != 1 else ''} with the same target network"
    half = ours.interval
    by = signed(ours.difference, ours.error)
    if half is None or abs(ours.difference) <= half:
        claim = "does not measurably beat" if half is not None else "was compared once with"
        before = f"Pre-training on the {images} {claim} {rivals}: "
    else:
        claim = "beats" if ours.difference > 0 else "loses to"
        before = f"Pre-training on the {images} {claim} {rivals} by "
        by = plus_minus(abs(ours.difference), ours.error)
    paired = f"{seeds} paired seed{'s' if seeds != 1 else ''}"
    return Headline(
        before=before,
        figure=f"{by} points",
        after=f" of {WORDS[measure.task]} on {evaluation.name} ({paired})",
        lede=" ".join(_lede(ours, measure)),
    )


def _lede(ours: Outcome, measure: Measure) -> Iterator[str]:
    if ours.interval is None:
        yield "One seed gives no standard error: this says little."
    else:
        yield (
            "\u00b1 is the standard error of the mean paired difference; its 95\u00a0% interval is "
            f"{_ends(ours)} points. It is about this one distilled set: the seeds vary initial "
            "weights, labels and the rival\u2019s images."
        )
    floor, rival, ceiling = (measure.outcome(m) for m in ("none", RIVAL, "target"))
    if floor is None or rival is None or ceiling is None:
        return
    gap = ceiling.mean - floor.mean
    ends = f"no pre-training ({floor.mean:.1f} %) and the target network ({ceiling.mean:.1f} %)"
    if gap <= 0:
        yield f"The target network is itself no better: {ends}. There is nothing to distil."
        return
    yield (
        f"Of the {gap:.1f} points between {ends}, random images with targets give "
        f"{signed(rival.mean - floor.mean, None)} and the distilled images "
        f"{signed(ours.mean - floor.mean, None)}."
    )


def _ends(outcome: Outcome) -> str:
    middle, half = outcome.difference or 0.0, outcome.interval or 0.0
    return f"{signed(middle - half, None)} to {signed(middle + half, None)}"


def _accuracy_plot(measure: Measure) -> Curve:
    rows = [
        DotRow(
            label=o.label,
            values=o.by_seed,
            mean=o.mean,
            spread=o.std,
            role=o.role,
            note=plus_minus(o.mean, o.std) + " %",
        )
        for o in measure.outcomes
    ]
    linked = (LABELS[RIVAL], LABELS[OURS])
    title = f"{measure.title}, accuracy"
    caption = (
        "A dot is a seed; the diamond above is the mean, its bar one standard deviation to either "
        "side. Thin lines join the same seed."
    )
    svg = dot_plot(rows, title=title, unit="accuracy in %", linked=linked)
    return Curve(title=title, svg=svg, caption=caption)


def _difference_plot(measure: Measure) -> Curve:
    rows = [
        DotRow(
            label=o.label,
            values=o.differences,
            mean=o.difference or 0.0,
            spread=o.interval,
            role=o.role,
            note=signed(o.difference, o.error) + " points" if o.difference is not None else "",
        )
        for o in measure.outcomes
        if o.method == RIVAL or o.difference is not None
    ]
    title = f"{measure.title}, difference to random images with targets"
    caption = (
        "The same seeds, each minus its random rival: the draw of labels, which moves all methods "
        "together, drops out. The bar is the 95 % interval of the mean (Student's t)."
    )
    svg = dot_plot(rows, title=title, unit="points of accuracy", zero=True)
    return Curve(title=title, svg=svg, caption=caption)


def plus_minus(mean: float, spread: float | None) -> str:
    """ "84.4 ± 2.9", or the mean alone."""
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} \u00b1 {spread:.1f}"


def signed(difference: float, error: float | None) -> str:
    """ "+3.0 ± 0.8", with a real minus sign."""
    sign = "\u2212" if round(difference, 1) < 0 else "+"
    return sign + plus_minus(abs(difference), error)
