"""The result of an evaluation: rows, their summary, and the text table."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from krrst_fast.errors import ConfigError, DataError
from krrst_fast.evaluate.config import OURS, RIVAL, EvaluateConfig
from krrst_fast.evaluate.paired import (
    Sample,
    Summary,
    in_words,
    paired_difference,
    plus_minus,
    signed,
)
from krrst_fast.runs.config import from_dict, to_dict

FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one method with one seed."""

    method: str
    seed: int
    scores: dict[str, float]
    """Accuracy in per cent of the test images by task: a measure and its labels, such as "probe-5",
    "outputs-1%" and "knn-all" (settings `probe.measures` and `probe.labels`); "finetune"; "kd"."""
    pretrain_loss: float | None
    """Loss of the last pre-training step; None without pre-training."""
    seconds: float
    """Without a pre-training that another row of a suite has done."""
    fingerprint: str
    """Digest of all settings and data that the row depends on."""
    num_images: int | None = None
    """Images that were pre-trained on; None without pre-training."""
    set_index: int | None = None
    """Which of the sets of this method, counted from 0; None where it has none of its own."""
    r2: float | None = None
    """Share of the variance of the target's outputs on held-out images of the source that the
    network's outputs explain: 1 - MSE / variance, below 0 where their mean explains more."""
    pretrain_steps: int | None = None
    """Steps of the pre-training that were best, where their number was chosen."""
    pretrain_lr: float | None = None
    """Rate of the pre-training on the target's outputs."""
    teacher_accuracy: float | None = None
    """In per cent of the test images: of the teacher of knowledge distillation."""
    finetune_lr: float | None = None
    """Rate of the fine-tuning, chosen where there are several; None without fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`; its file holds `to_json`."""

    name: str
    config: EvaluateConfig
    rows: tuple[Row, ...]
    num_images: int
    """M, the images of a distilled set and of the rivals of its size."""
    environment: Mapping[str, Any]
    seconds: float
    """The sum over the rows, however often the evaluation was stopped."""
    label_counts: Mapping[str, int] = field(default_factory=dict)
    """Labelled images in all for each of `probe.labels`, as text; empty in files of version 1."""
    notes: tuple[str, ...] = ()
    """What of the data the accuracies are to be read with: `notes.data_notes`."""

    def accuracies(self, method: str, task: str) -> dict[int, float]:
        """Return the accuracy by seed, in per cent; empty where the method was not run."""
        return {
            row.seed: row.scores[task]
            for row in self.rows
            if row.method == method and task in row.scores
        }

    def summary(self, method: str, task: str) -> Summary | None:
        """Return mean, standard deviation and paired difference to the baseline, or None."""
        ours = self.accuracies(method, task)
        if not ours:
            return None
        rival = {} if method == RIVAL else self.accuracies(RIVAL, task)
        return Summary(ours, difference=paired_difference(ours, rival, self._sets(method, RIVAL)))

    def _sets(self, *methods: str) -> dict[int, tuple[tuple[str, int | None], ...]]:
        """Return which of their sets two methods took, by seed."""
        found: dict[int, tuple[tuple[str, int | None], ...]] = {}
        for row in self.rows:
            if row.method in methods:
                found[row.seed] = (*found.get(row.seed, ()), (row.method, row.set_index))
        return found

    def tasks(self) -> tuple[str, ...]:
        """Return the tasks that were run, in the order of the row that has most of them."""
        rows = sorted(self.rows, key=lambda row: -len(row.scores))
        return tuple(dict.fromkeys(task for row in rows for task in row.scores))

    def sizes(self) -> dict[str, int]:
        """Return how many images each method pre-trained on; 0 without pre-training."""
        return {row.method: row.num_images or 0 for row in self.rows}

    def best_rival(self, task: str) -> tuple[str, Sample] | None:
        """Return the best rival with no more images on a task, and distilled - rival, paired.

        It is the one with the highest mean over the seeds that both have, no pre-training among
        them: chosen by the figures it is compared by, which favours it.
        """
        ours, sizes = self.accuracies(OURS, task), self.sizes()
        found: list[tuple[str, Sample]] = []
        for method in self.config.names:
            if method in (OURS, "target") or sizes.get(method, 0) > self.num_images:
                continue
            by = paired_difference(ours, self.accuracies(method, task), self._sets(OURS, method))
            if by is not None:
                found.append((method, by))
        return min(found, key=lambda item: item[1].mean, default=None)

    def explained(self) -> dict[str, float]:
        """Return the held-out R2 of each method that has one, a mean over the seeds."""
        found: dict[str, list[float]] = {}
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

    def chosen_rates(self) -> str:
        """Return in words at which rates each method was fine-tuned, where they were chosen."""
        if len(self.config.finetune.rates) == 1:
            return ""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if row.finetune_lr is not None:
                found.setdefault(row.method, []).append(f"{row.finetune_lr:g}")
        told = ", ".join(f"{method} {' '.join(rates)}" for method, rates in found.items())
        grid = " ".join(f"{rate:g}" for rate in self.config.finetune.rates)
        return f"finetune: rates chosen of {grid}, by seed: {told}" if found else ""

    def verdicts(self) -> list[str]:
        """Return a line for each task: the set minus the baseline, and minus the best rival."""
        lines = []
        for task in self.tasks():
            baseline = self.summary(OURS, task)
            said: dict[str, str] = {}
            if baseline is not None and baseline.difference is not None:
                said[RIVAL] = f"{OURS} - {RIVAL} = {in_words(baseline.difference)}"
            best = self.best_rival(task)
            if best is not None and best[0] not in said:
                said[best[0]] = f"{OURS} - {best[0]}, the best rival, = {in_words(best[1])}"
            if said:
                lines.append(f"{task}: {'; '.join(said.values())}")
        return lines

    def table(self) -> str:
        """Return an aligned text table, one row a method, and the verdicts below it."""
        header = ["method"]
        header += ["images"] if self._sizes_differ else []
        header += ["held-out R2"] if self.explained() else []
        for task in self.tasks():
            header += [task, f"- {RIVAL}"] if self._has_rival else [task]
        lines = [header] + [self._cells(method) for method in self.config.names]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines
        ]
        text.insert(1, "  ".join("-" * width for width in widths))
        notes = [
            *self.verdicts(),
            *filter(None, [self._notes(), self.stopped(), self.chosen_rates()]),
        ]
        notes += self.notes
        return "\n".join([self._title(), "", *text, "", *filter(None, notes)]).rstrip()

    def _notes(self) -> str:
        words = []
        if any(task.startswith("outputs-") for task in self.tasks()):
            words.append("outputs: a probe on the network's outputs instead of its features")
        if taught := [row for row in self.rows if row.teacher_accuracy is not None]:
            words.append(
                "kd: a student sees its method's images alone (without pre-training noise), taught "
                f"by one {self.config.kd.teacher.kind} of {taught[0].teacher_accuracy:.1f} per cent"
            )
        if any(task.startswith("knn-") for task in self.tasks()):
            words.append("knn: the nearest neighbours of the features")
        if self.explained():
            words.append("held-out R2: of its outputs as the target's, on images no method saw")
        return "; ".join(words)

    def _cells(self, method: str) -> list[str]:
        cells = [method]
        if self._sizes_differ:
            cells.append(str(self.sizes().get(method) or "-"))
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
        return RIVAL in self.config.methods and len(self.config.names) > 1

    @property
    def _sizes_differ(self) -> bool:
        return bool(set(self.sizes().values()) - {0, self.num_images})

    def _title(self) -> str:
        config = self.config
        sets = "this distilled set"
        if len(config.runs) > 1:
            sets = f"{len(config.runs)} distilled sets in turn, whose luck they include (seeds of\n"
            sets += "one set are a cluster)"
        paired = f";\ndifferences are paired by seed, +- their standard error, of {sets}"
        return (
            f"{self.name}: accuracy in per cent, mean +- standard deviation over "
            f"{config.seeds} seed{'s' * (config.seeds > 1)}\n"
            f"{self.num_images} images, {config.pretrain.steps} pre-training steps"
            f"{self._lowered()}, {config.probe.solver} probe with {self.labels_in_words()}"
            f"{paired * self._has_rival}"
        )

    def labels_in_words(self) -> str:
        """Return "labels 5 a class (50), 1% (500), all (50,000), few of 10 draws"."""
        config, words = self.config.probe, []
        for labels in config.labels:
            count = self.label_counts.get(str(labels))
            word = f"{labels} a class" if isinstance(labels, int) else labels
            words.append(word if count is None else f"{word} ({count:,})")
        draws = f", mean of {config.label_draws} draws" if config.label_draws > 1 else ""
        return f"labels {', '.join(words)}{draws}"

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
            "label_counts": dict(self.label_counts),
            "seconds": self.seconds,
            "summary": [
                {
                    "method": method,
                    "num_images": self.sizes().get(method, 0),
                    "r2": self.explained().get(method),
                    "scores": {
                        task: _plain(summary)
                        for task in self.tasks()
                        if (summary := self.summary(method, task)) is not None
                    },
                }
                for method in self.config.names
            ],
            "verdicts": self.verdicts(),
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "config": to_dict(self.config),
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, values: Any, path: Path) -> "Evaluation":
        """Return the evaluation that `to_json` wrote to `path`, this version's or an earlier one.

        Raises:
            DataError: The values are something else.
        """
        try:
            if values["format_version"] == 1:
                values = _from_version_1(values)
            if values["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {values['format_version']!r}")
            return cls(
                name=str(values["name"]),
                config=from_dict(EvaluateConfig, values["config"]),
                rows=tuple(from_dict(Row, row) for row in values["rows"]),
                num_images=int(values["num_images"]),
                environment=dict(values["environment"]),
                seconds=float(values["seconds"]),
                label_counts={str(k): int(v) for k, v in values["label_counts"].items()},
                notes=tuple(map(str, values.get("notes", ()))),
            )
        except (AttributeError, ConfigError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a result of krrst evaluate ({error!r})") from None


def _plain(summary: Summary) -> dict[str, Any]:
    by = summary.difference
    plain: dict[str, Any] = {name: getattr(summary, name) for name in ("mean", "std", "count")}
    names = ("mean", "standard_error", "interval", "count")
    return plain | {"difference": by and {name: getattr(by, name) for name in names}}


def _from_version_1(values: dict[str, Any]) -> dict[str, Any]:
    """Return what version 1 wrote, one number of labels with a column a task, as version 2."""
    probe = dict(values["config"]["probe"])
    labels = probe.pop("labels_per_class")
    labels = "all" if labels is None else labels
    names = {"probe": f"probe-{labels}", "outputs": f"outputs-{labels}", "finetune": "finetune"}
    rows = []
    for row in values["rows"]:
        given = {task: row.get(old) for old, task in names.items()}
        rest = {key: value for key, value in row.items() if key not in names}
        untrained = row["method"] in ("none", "target")
        size = {} if untrained else {"num_images": values["num_images"]}
        scores = {task: score for task, score in given.items() if score is not None}
        rows.append({**rest, **size, "scores": scores})
    config = {**values["config"], "probe": {**probe, "labels": [labels]}}
    return {**values, "format_version": 2, "config": config, "rows": rows, "label_counts": {}}
