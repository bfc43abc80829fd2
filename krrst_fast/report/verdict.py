"""An evaluation on the page: table, dot plots, and one sentence about it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from krrst_fast.evaluate.config import OURS, RIVAL
from krrst_fast.evaluate.paired import Sample, Summary, ends, plus_minus, signed
from krrst_fast.evaluate.table import Evaluation
from krrst_fast.report.figures import ACCENT, INK, MUTED, RIVAL_BLUE, Curve, DotRow, dot_plot
from krrst_fast.runs.config import to_dict

LABELS = {
    "none": "No pre-training",
    "random_labels": "Random, labels",
    "random_target": "Random, targets",
    "random_early": "Random, targets, best stop",
    "kmeans": "k-means, targets",
    "herding": "Herding, targets",
    "k_centre": "k-centre, targets",
    "random_5x": "Random, 5 times as many",
    "random_20x": "Random, 20 times as many",
    "random_100x": "Random, 100 times as many",
    "distilled": "Distilled",
    "target": "Target network",
}
TITLES = {
    "probe": "Linear probe",
    "outputs": "Linear probe on the outputs",
    "knn": "Nearest neighbours",
    "finetune": "Fine-tuning",
    "kd": "Knowledge distillation",
}
WORDS = {
    "probe": "linear-probe accuracy",
    "outputs": "accuracy of a linear probe on the outputs",
    "knn": "nearest-neighbour accuracy",
    "finetune": "accuracy after fine-tuning",
    "kd": "accuracy after knowledge distillation",
}
FITTED = {"ridge": "ridge regression", "lbfgs": "logistic regression"}
ROLES = {"random_target": RIVAL_BLUE, "distilled": ACCENT, "target": INK}


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The sentence at the top; `figure` is the number in it, `lede` the text below."""

    before: str
    figure: str = ""
    after: str = ""
    lede: str = ""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One task with the summary of every method that was run."""

    task: str
    outcomes: Mapping[str, Summary]

    @property
    def title(self) -> str:
        """The task in words."""
        measure, _, labels = self.task.partition("-")
        return TITLES.get(measure, measure) + (f", {_labels(labels)}" if labels else "")

    @property
    def accuracy(self) -> str:
        """What is measured, in the middle of a sentence."""
        measure, _, labels = self.task.partition("-")
        return WORDS.get(measure, measure) + (f" with {_labels(labels)}" if labels else "")

    @property
    def plots(self) -> list[Curve]:
        """Accuracies, and the paired differences to the baseline where it was run."""
        plots = [_accuracy_plot(self)]
        if any(o.difference for o in self.outcomes.values()):
            plots.append(_difference_plot(self))
        return plots


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """An evaluation and its file, as a section of the page."""

    evaluation: Evaluation
    file: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings, nested."""
        return to_dict(self.evaluation.config)

    @property
    def setting(self) -> str:
        """The settings that matter, in words."""
        config = self.evaluation.config
        pretrain, probe, finetune = config.pretrain, config.probe, config.finetune
        text = f"Pre-training: {pretrain.steps:,} SGD steps on a fresh {config.model.kind}. "
        fitted = FITTED.get(probe.solver) or f"{probe.steps:,} SGD steps"
        text += f"Linear probe: {fitted}, {self.evaluation.labels_in_words()}."
        if finetune.steps:
            few = finetune.labels_per_class
            text += f" Fine-tuning: {finetune.steps:,} SGD steps, {_labels(str(few or 'all'))}"
            text += f", mean of {finetune.label_draws} draws." if finetune.label_draws > 1 else "."
            chosen = self.evaluation.chosen_rates()
            text += f" {chosen[0].upper()}{chosen[1:]}." if chosen else ""
        return text

    @property
    def explained(self) -> str:
        """The held-out R2 of each method, in words; empty where there is none."""
        found = self.evaluation.explained()
        if not found:
            return ""
        values = "; ".join(f"{label_of(method)} {r2:+.3f}" for method, r2 in found.items())
        return typographic(
            "Held-out R2: how much of the variance of the target's outputs the network's own "
            "outputs explain, on images of the source that no method saw; below 0 their mean "
            f"explains more. Mean over seeds: {values}. {self.evaluation.stopped()}".strip()
        )

    @property
    def measures(self) -> list[Measure]:
        """The tasks that were run, each with the outcome of every method."""
        return [
            Measure(
                task=task,
                outcomes={
                    method: found
                    for method in self.methods
                    if (found := self.evaluation.summary(method, task)) is not None
                },
            )
            for task in self.evaluation.tasks()
        ]

    @property
    def methods(self) -> Sequence[str]:
        """Every method and rival, in the order of the settings."""
        return self.evaluation.config.names

    @property
    def seeds(self) -> list[int]:
        """Every seed."""
        return sorted({row.seed for row in self.evaluation.rows})


def _labels(labels: str) -> str:
    """Return the labels of a task, "5", "1%" or "all", in words."""
    if labels == "all":
        return "all training labels"
    if labels.endswith("%"):
        return f"{labels.removesuffix('%')} % of the training labels"
    return f"{labels} label{'s' * (labels != '1')} a class"


def headline_of(evaluations: Sequence[EvaluationSection]) -> Headline | None:
    """Return the sentence on the first evaluation of distilled set and baseline, or None."""
    for section in evaluations:
        for measure in section.measures:
            headline = _sentence(section.evaluation, measure)
            if headline is not None:
                return headline
    return None


def _sentence(evaluation: Evaluation, measure: Measure) -> Headline | None:
    ours = measure.outcomes.get(OURS)
    if ours is None or ours.difference is None:
        return None
    by, count = ours.difference, evaluation.num_images
    images = f"{count:,} distilled image{'s' if count != 1 else ''}"
    rivals = f"{count:,} random real one{'s' if count != 1 else ''} with the same target network"
    figure = signed(by.mean, by.standard_error)
    if by.interval is None or abs(by.mean) <= by.interval:
        claim = "does not measurably beat" if by.count > 1 else "was compared once with"
        before = f"Pre-training on the {images} {claim} {rivals}: "
    else:
        claim = "beats" if by.mean > 0 else "loses to"
        before = f"Pre-training on the {images} {claim} {rivals} by "
        figure = plus_minus(abs(by.mean), by.standard_error)
    paired = f"{by.count} paired seed{'s' if by.count != 1 else ''}"
    return Headline(
        before=before,
        figure=typographic(f"{figure} points"),
        after=f" of {measure.accuracy} on {evaluation.name} ({paired})",
        lede=typographic(" ".join(_lede(by, measure))),
    )


def _lede(by: Sample, measure: Measure) -> Iterator[str]:
    if by.interval is None:
        yield "One seed gives no standard error: this says little."
    else:
        sets = len(set(by.sets.values()))
        yield (
            "+- is the standard error of the mean paired difference; its 95\u00a0% interval is "
            f"{ends(by)} points."
        )
        varied = "the seeds vary initial weights, labels and the rival\u2019s images."
        if sets > 1:
            yield f"It is about {sets} distilled sets, which the seeds take in turn: {varied}"
        else:
            yield f"It is about this one distilled set: {varied}"
    floor, rival, ours, ceiling = map(measure.outcomes.get, ("none", RIVAL, OURS, "target"))
    if floor is None or rival is None or ours is None or ceiling is None:
        return
    gap = ceiling.mean - floor.mean
    limits = f"no pre-training ({floor.mean:.1f} %) and the target network ({ceiling.mean:.1f} %)"
    if gap <= 0:
        yield f"The target network is itself no better: {limits}. There is nothing to distil."
        return
    yield (
        f"Of the {gap:.1f} points between {limits}, random images with targets give "
        f"{signed(rival.mean - floor.mean)} and the distilled images "
        f"{signed(ours.mean - floor.mean)}."
    )


def _accuracy_plot(measure: Measure) -> Curve:
    rows = [
        DotRow(label_of(method), o, o.std, ROLES.get(method, MUTED))
        for method, o in measure.outcomes.items()
    ]
    caption = (
        "A dot is a seed; the diamond above is the mean, its bar one standard deviation to either "
        "side. Thin lines join the same seed."
    )
    title = f"{measure.title}, accuracy"
    linked = (label_of(RIVAL), label_of(OURS))
    return dot_plot(rows, title=title, unit="accuracy in %", caption=caption, linked=linked)


def _difference_plot(measure: Measure) -> Curve:
    rows = [
        DotRow(label_of(method), by, by.interval, ROLES.get(method, MUTED))
        for method, o in measure.outcomes.items()
        if (by := o.difference) is not None
    ]
    caption = (
        "The same seeds, each minus its random rival: the draw of labels, which moves all methods "
        "together, drops out. The bar is the 95 % interval of the mean (Student's t)."
    )
    title = f"{measure.title}, difference to random images with targets"
    return dot_plot(rows, title=title, unit="points of accuracy", caption=caption, zero=True)


def label_of(method: str) -> str:
    """Return the name of a method on the page; a rival has its own."""
    return LABELS.get(method, method)


def typographic(text: str) -> str:
    """Return text with the typographic plus-minus sign and minus signs before digits."""
    return re.sub(r"(?<![\w)])-(?=\d)", "\u2212", text.replace("+-", "\u00b1"))
