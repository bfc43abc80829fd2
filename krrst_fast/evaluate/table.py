"""The figures of an evaluation: rows, means, paired differences, and the text table."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from krrst_fast.config import to_dict
from krrst_fast.evaluate.config import EvaluateConfig, Method

FORMAT_VERSION = 1
RIVAL: Method = "random_target"
"""The fair rival: as many real images, the same target, the same training."""

Task = Literal["probe", "finetune"]
TASKS: tuple[Task, ...] = ("probe", "finetune")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method with one seed. Accuracies are per cent of the test images."""

    method: Method
    seed: int
    probe: float
    finetune: float | None
    pretrain_loss: float | None
    """Loss of the last pre-training step; None without pre-training."""
    seconds: float
    fingerprint: str
    """Of all settings and data the row depends on."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean over seeds of a method's accuracy less the rival's with the same seed."""

    mean: float
    standard_error: float | None
    """Standard deviation of the differences / sqrt(count); None for a single seed."""
    count: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method on one task, over the seeds, in points of accuracy."""

    mean: float
    std: float | None
    """Of the sample (n - 1); None for a single seed."""
    count: int
    difference: Difference | None
    """To the rival; None for the rival itself, and where it was not run."""


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The mean of ours - theirs over the seeds that both have, with its standard error."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    spread = statistics.stdev(differences) if len(seeds) > 1 else None
    return Difference(
        mean=statistics.fmean(differences),
        standard_error=None if spread is None else spread / math.sqrt(len(seeds)),
        count=len(seeds),
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found; `to_json` is what its file holds."""

    name: str
    config: EvaluateConfig
    rows: tuple[Row, ...]
    num_images: int
    """M, the images of the distilled set and of the random subsets."""
    environment: Mapping[str, Any]
    seconds: float
    """The sum over the rows: what the figures cost, however often the evaluation was stopped."""

    def accuracies(self, method: Method, task: Task) -> dict[int, float]:
        """Accuracy by seed, in per cent; empty where the method was not run on the task."""
        values = {row.seed: getattr(row, task) for row in self.rows if row.method == method}
        return {seed: value for seed, value in values.items() if value is not None}

    def summary(self, method: Method, task: Task) -> Summary | None:
        """Mean, standard deviation and the paired difference to the rival, or None if not run."""
        ours = self.accuracies(method, task)
        if not ours:
            return None
        values = list(ours.values())
        rival = {} if method == RIVAL else self.accuracies(RIVAL, task)
        return Summary(
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            count=len(values),
            difference=paired_difference(ours, rival),
        )

    def tasks(self) -> tuple[Task, ...]:
        """The tasks that were run."""
        return tuple(
            task for task in TASKS if any(getattr(row, task) is not None for row in self.rows)
        )

    def verdicts(self) -> list[str]:
        """One line a task: by how much the distilled set beats the rival."""
        lines = []
        for task in self.tasks():
            summary = self.summary("distilled", task)
            if summary is not None and summary.difference is not None:
                difference = summary.difference
                seeds = f"{difference.count} paired seed{'s' if difference.count > 1 else ''}"
                lines.append(f"{task}: distilled - {RIVAL} = {_signed(difference)} ({seeds})")
        return lines

    def table(self) -> str:
        """An aligned text table, one row a method, and the verdicts below it."""
        header = ["method"]
        for task in self.tasks():
            header += [task, f"- {RIVAL}"] if self._has_rival else [task]
        lines = [header] + [self._cells(method) for method in self.config.methods]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self._title(), "", *text, "", *self.verdicts()]).rstrip()

    def _cells(self, method: Method) -> list[str]:
        cells: list[str] = [method]
        for task in self.tasks():
            summary = self.summary(method, task)
            if summary is None:
                cells += ["-", "-"] if self._has_rival else ["-"]
                continue
            std = "" if summary.std is None else f" +- {summary.std:.1f}"
            cells.append(f"{summary.mean:.1f}{std}")
            if self._has_rival:
                cells.append("-" if summary.difference is None else _signed(summary.difference))
        return cells

    @property
    def _has_rival(self) -> bool:
        return RIVAL in self.config.methods and len(self.config.methods) > 1

    def _title(self) -> str:
        labels = self.config.probe.labels_per_class
        given = "all labels" if labels is None else f"{labels} label{'s' * (labels > 1)} per class"
        draws = self.config.probe.label_draws
        given += f" (mean of {draws} draws)" if draws > 1 else ""
        paired = ";\ndifferences are paired by seed, +- their standard error, of this distilled set"
        return (
            f"{self.name}: accuracy in per cent, mean +- standard deviation over "
            f"{self.config.seeds} seed{'s' * (self.config.seeds > 1)}\n"
            f"{self.num_images} images, {self.config.pretrain.steps} pre-training steps, "
            f"{self.config.probe.solver} probe with {given}{paired * self._has_rival}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "unit": "per cent",
            "rival": RIVAL,
            "num_images": self.num_images,
            "seconds": self.seconds,
            "summary": [
                {"method": method, **{task: self._plain(method, task) for task in TASKS}}
                for method in self.config.methods
            ],
            "verdicts": self.verdicts(),
            "rows": [asdict(row) for row in self.rows],
            "config": to_dict(self.config),
            "environment": dict(self.environment),
        }

    def _plain(self, method: Method, task: Task) -> dict[str, Any] | None:
        summary = self.summary(method, task)
        return None if summary is None else asdict(summary)


def rows_from_json(values: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows as `asdict` wrote them."""
    return [Row(**value) for value in values]


def _signed(difference: Difference) -> str:
    error = difference.standard_error
    return f"{difference.mean:+.1f}" + ("" if error is None else f" +- {error:.1f}")
