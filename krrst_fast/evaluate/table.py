"""The result of an evaluation: rows, means, paired differences, and the text table."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from krrst_fast.errors import ConfigError, DataError
from krrst_fast.evaluate.config import EvaluateConfig, Method
from krrst_fast.runs.config import from_dict, to_dict

FORMAT_VERSION = 1
RIVAL: Method = "random_target"
"""The baseline: as many real images, with the same target and the same training."""

Task = Literal["probe", "outputs", "finetune"]
TASKS: tuple[Task, ...] = ("probe", "outputs", "finetune")

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom.
_T975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16)
_T975_MORE = 2.145


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one method with one seed; accuracies are in per cent of the test images."""

    method: Method
    seed: int
    probe: float
    finetune: float | None
    pretrain_loss: float | None
    """Loss of the last pre-training step; None without pre-training."""
    seconds: float
    fingerprint: str
    """Digest of all settings and data that the row depends on."""
    outputs: float | None = None
    """Accuracy of a probe on the network's outputs, where they stand for the target's."""
    r2: float | None = None
    """Share of the variance of the target's outputs on held-out images of the source that the
    network's outputs explain: 1 - MSE / variance, below 0 where their mean explains more."""
    pretrain_steps: int | None = None
    """Steps of the pre-training that were best, where their number was chosen."""
    pretrain_lr: float | None = None
    """Rate of the pre-training on the target's outputs."""


@dataclass(frozen=True)
class Sample:
    """Accuracies, or paired differences of accuracies, in points by seed; at least one."""

    by_seed: Mapping[int, float]

    @property
    def count(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for a single seed."""
        return statistics.stdev(self.by_seed.values()) if self.count > 1 else None

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None for a single seed."""
        return None if self.std is None else self.std / math.sqrt(self.count)

    @property
    def interval(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None for a single seed."""
        error = self.standard_error
        return None if error is None else error * interval_factor(self.count)


@dataclass(frozen=True)
class Summary(Sample):
    """One method on one task: its accuracies, and the differences to the baseline."""

    difference: Sample | None = None
    """None for the baseline itself, and where the baseline was not run with a seed of these."""


def interval_factor(seeds: int) -> float:
    """Return the standard errors in half of a 95 % interval of the mean over `seeds` values."""
    return _T975[seeds - 2] if seeds - 2 < len(_T975) else _T975_MORE


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Sample | None:
    """Return ours - theirs for the seeds that both have; None where they share no seed."""
    seeds = sorted(ours.keys() & theirs.keys())
    return Sample({seed: ours[seed] - theirs[seed] for seed in seeds}) if seeds else None


def plus_minus(mean: float, spread: float | None) -> str:
    """Return "84.4 +- 2.9", or the mean alone."""
    return f"{mean:.1f}" + ("" if spread is None else f" +- {spread:.1f}")


def signed(mean: float, error: float | None = None) -> str:
    """Return "+3.0 +- 0.8" or "-0.2"; what rounds to zero is "+0.0"."""
    return ("-" if round(mean, 1) < 0 else "+") + plus_minus(abs(mean), error)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`; its file holds `to_json`."""

    name: str
    config: EvaluateConfig
    rows: tuple[Row, ...]
    num_images: int
    """M, the images of the distilled set and of the random subsets."""
    environment: Mapping[str, Any]
    seconds: float
    """The sum over the rows, however often the evaluation was stopped."""
    notes: tuple[str, ...] = ()
    """What of the data the accuracies are to be read with: `notes.data_notes`."""

    def accuracies(self, method: Method, task: Task) -> dict[int, float]:
        """Return the accuracy by seed, in per cent; empty where the method was not run."""
        values = {row.seed: getattr(row, task) for row in self.rows if row.method == method}
        return {seed: value for seed, value in values.items() if value is not None}

    def summary(self, method: Method, task: Task) -> Summary | None:
        """Return mean, standard deviation and paired difference to the baseline, or None."""
        ours = self.accuracies(method, task)
        if not ours:
            return None
        rival = {} if method == RIVAL else self.accuracies(RIVAL, task)
        return Summary(ours, paired_difference(ours, rival))

    def tasks(self) -> tuple[Task, ...]:
        """Return the tasks that were run."""
        return tuple(
            task for task in TASKS if any(getattr(row, task) is not None for row in self.rows)
        )

    def explained(self) -> dict[Method, float]:
        """Return the held-out R2 of each method that has one, a mean over the seeds."""
        found: dict[Method, list[float]] = {}
        for row in self.rows:
            if row.r2 is not None:
                found.setdefault(row.method, []).append(row.r2)
        return {method: statistics.fmean(values) for method, values in found.items()}

    def stopped(self) -> str:
        """Return in words after how many steps pre-training was best, where that was chosen."""
        chosen = [row for row in self.rows if row.pretrain_steps is not None]
        steps = ", ".join(str(row.pretrain_steps) for row in chosen)
        seeds = ", ".join(str(row.seed) for row in chosen)
        return f"random_early: best after {steps} steps (seeds {seeds})" if chosen else ""

    def verdicts(self) -> list[str]:
        """Return a line for each task: the difference of the distilled set to the baseline."""
        lines = []
        for task in self.tasks():
            summary = self.summary("distilled", task)
            if summary is not None and summary.difference is not None:
                lines.append(f"{task}: distilled - {RIVAL} = {in_words(summary.difference)}")
        return lines

    def table(self) -> str:
        """Return an aligned text table, one row a method, and the verdicts below it."""
        header = ["method", "held-out R2"] if self.explained() else ["method"]
        for task in self.tasks():
            header += [task, f"- {RIVAL}"] if self._has_rival else [task]
        lines = [header] + [self._cells(method) for method in self.config.methods]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        notes = [*self.verdicts(), *filter(None, [self._explained_in_words(), self.stopped()])]
        notes += self.notes
        return "\n".join([self._title(), "", *text, "", *notes]).rstrip()

    def _explained_in_words(self) -> str:
        words = []
        if "outputs" in self.tasks():
            words.append("outputs: a probe on the network's outputs instead of its features")
        if self.explained():
            words.append("held-out R2: of its outputs as the target's, on images no method saw")
        return "; ".join(words)

    def _cells(self, method: Method) -> list[str]:
        cells: list[str] = [method]
        if explained := self.explained():
            cells.append(f"{explained[method]:+.3f}" if method in explained else "-")
        for task in self.tasks():
            summary = self.summary(method, task)
            if summary is None:
                cells += ["-", "-"] if self._has_rival else ["-"]
                continue
            cells.append(plus_minus(summary.mean, summary.std))
            if self._has_rival:
                by = summary.difference
                cells.append("-" if by is None else signed(by.mean, by.standard_error))
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
            f"{self.num_images} images, {self.config.pretrain.steps} pre-training steps"
            f"{self._lowered()}, "
            f"{self.config.probe.solver} probe with {given}{paired * self._has_rival}"
        )

    def _lowered(self) -> str:
        rates = [row.pretrain_lr for row in self.rows if row.pretrain_lr is not None]
        if not rates or min(rates) == self.config.pretrain.lr:
            return ""
        return f" at rate {min(rates):g}, lowered from {self.config.pretrain.lr:g}"

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "unit": "per cent",
            "rival": RIVAL,
            "num_images": self.num_images,
            "seconds": self.seconds,
            "summary": [
                {
                    "method": method,
                    "r2": self.explained().get(method),
                    **{task: self._plain(method, task) for task in TASKS},
                }
                for method in self.config.methods
            ],
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "config": to_dict(self.config),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, values: Any, path: Path) -> "Evaluation":
        """Return the evaluation that `to_json` wrote to `path`.

        Raises:
            DataError: The values are something else.
        """
        try:
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {values['format_version']!r}")
            return cls(
                name=str(values["name"]),
                config=from_dict(EvaluateConfig, values["config"]),
                rows=tuple(from_dict(Row, row) for row in values["rows"]),
                num_images=int(values["num_images"]),
                environment=dict(values["environment"]),
                seconds=float(values["seconds"]),
                notes=tuple(map(str, values.get("notes", ()))),
            )
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a result of krrst evaluate ({error!r})") from None

    def _plain(self, method: Method, task: Task) -> dict[str, Any] | None:
        summary = self.summary(method, task)
        if summary is None:
            return None
        by = summary.difference
        plain: dict[str, Any] = {name: getattr(summary, name) for name in ("mean", "std", "count")}
        names = ("mean", "standard_error", "interval", "count")
        return plain | {"difference": by and {name: getattr(by, name) for name in names}}


def in_words(difference: Sample) -> str:
    """Return "+3.0 +- 0.8 points (5 paired seeds, 95 % interval +0.8 to +5.2)"."""
    seeds = f"{difference.count} paired seed{'s' if difference.count > 1 else ''}"
    if difference.interval is not None:
        seeds += f", 95 % interval {ends(difference)}"
    return f"{signed(difference.mean, difference.standard_error)} points ({seeds})"


def ends(difference: Sample) -> str:
    """Return the ends of the 95 % interval of the mean, "+0.8 to +5.2"."""
    half = difference.interval or 0.0
    return f"{signed(difference.mean - half)} to {signed(difference.mean + half)}"
