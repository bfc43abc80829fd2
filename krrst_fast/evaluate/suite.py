"""Suites: the same measurements on several labelled stores and students, cell by cell."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from krrst_fast.errors import ConfigError, KrrstError, NonFiniteError, NotPositiveDefiniteError
from krrst_fast.evaluate.config import (
    Common,
    EvaluateConfig,
    FinetuneConfig,
    Method,
    PretrainConfig,
    ProbeConfig,
)
from krrst_fast.evaluate.paired import Sample, plus_minus, signed
from krrst_fast.evaluate.run import check, evaluate
from krrst_fast.evaluate.table import Evaluation
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import require
from krrst_fast.runs.files import write_text

SuiteName = Literal["paper", "recipe"]
CONVNET = re.compile(r"convnet((?:-[1-9]\d*)+)")
"""A convnet by its widths: convnet-16-32-64."""
R2 = "held-out R2"
RATES = (0.003, 0.01, 0.03, 0.1)
_REAL: tuple[Method, ...] = ("random_target", "kmeans", "random_early")


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(Common):
    """A table of evaluations: every store with every student."""

    suite: SuiteName
    """Whose settings: "paper" (all labels, 4,000 steps of pre-training, 10,000 of fine-tuning) or
    "recipe" (few labels, a few hundred steps: minutes on a CPU)."""
    stores: tuple[Path, ...]
    """The labelled stores; each is a group of columns."""
    students: tuple[str, ...] = ("convnet-128-256-512",)
    """The networks that are pre-trained; each is a table. A kind of --model.kind (the convnet has
    the paper's widths), a convnet by its widths (convnet-16-32-64), or your own, file.py:Class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("stores", "students"):
            values = getattr(self, field)
            require(0 < len(values) == len(set(values)), self, field, "one or more, given once")
        names = [path.resolve().name for path in self.stores]
        require(len(set(names)) == len(names), self, "stores", "folders of different names")
        models = [model_of(student) for student in self.students]
        require(len(set(models)) == len(models), self, "students", "different networks")

    def cells(self) -> Iterator[EvaluateConfig]:
        """Yield the evaluations, student by student."""
        shared = {field.name: getattr(self, field.name) for field in fields(Common)}
        for student in self.students:
            for store in self.stores:
                name = f"{self.suite}-{store.resolve().name}-{_slug(student)}"
                yield EvaluateConfig(**shared, store=store, model=model_of(student), name=name)


SUITES: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "methods": ("none", "random_labels", *_REAL, "distilled"),
        "finetune": FinetuneConfig(lr=RATES),
    },
    "recipe": {
        "students": ("convnet-16-32-64",),
        "methods": ("none", *_REAL, "distilled", "random_20x"),
        "seeds": 4,
        # 1,000 epochs, as in the paper.
        "pretrain": PretrainConfig(steps=1000),
        "probe": ProbeConfig(solver="ridge", labels=(5, 50), label_draws=5),
        "finetune": FinetuneConfig(steps=200, batch_size=64, lr=RATES, labels_per_class=50),
    },
}
"""The settings of each suite that are not the defaults, which are the paper's."""


def model_of(student: str) -> ModelConfig:
    """Return the network that a word of `students` names.

    Raises:
        ConfigError: There is none of that name.
    """
    widths = CONVNET.fullmatch(student)
    if widths:
        return ModelConfig(widths=tuple(map(int, widths[1].split("-")[1:])))
    try:
        return ModelConfig(kind=student)
    except ConfigError as error:
        raise ConfigError(f"students: {error}, or convnet-16-32-64 by widths") from None


def _slug(student: str) -> str:
    return re.sub(r"[^\w.-]+", "-", student)


def evaluate_suite(config: SuiteConfig, *, progress: bool = True) -> str:
    """Evaluate every cell, and write and return the tables.

    Each cell is a result of its own, `evaluation/SUITE-STORE-STUDENT.json` of the first run: cells
    that are finished are read, and one that was stopped goes on where it was. The tables are in
    `evaluation/SUITE.md`. Until all cells are finished, a folder `evaluation/SUITE-*.networks` has
    the pre-trained networks, which the cells of a student share.

    Args:
        config: The settings.
        progress: Show bars, where there is a terminal.

    Returns:
        The tables, as text and as Markdown at once.

    Raises:
        DataError, ConfigError: As of `evaluate`, for any cell, before the first is begun.
        NonFiniteError, NotPositiveDefiniteError: Rows of a cell failed; the others are finished.
        Interrupted: A signal came; what was finished is kept.
    """
    cells = list(config.cells())
    for cell in cells:
        check(cell)
    names = hashlib.sha256(" ".join(cell.name or "" for cell in cells).encode()).hexdigest()[:8]
    # Of these cells alone: another process may be at others of the same suite.
    networks = config.folder / f"{config.suite}-{names}.networks"
    finished: dict[EvaluateConfig, Evaluation] = {}
    failed: list[KrrstError] = []
    try:
        for cell in cells:
            try:
                finished[cell] = evaluate(cell, progress=progress, networks=networks)
            except (NonFiniteError, NotPositiveDefiniteError) as error:
                failed.append(type(error)(f"{cell.name}: {error}"))
    finally:
        text = _tables(config, finished)
        if finished:
            write_text(config.folder / f"{config.suite}.md", text + "\n")
    if failed:
        raise type(failed[0])(f"{'; '.join(map(str, failed))} (the other cells are finished)")
    shutil.rmtree(networks, ignore_errors=True)
    return text


def _tables(config: SuiteConfig, finished: Mapping[EvaluateConfig, Evaluation]) -> str:
    """Return the tables of the cells that are finished, one for each student."""
    tables = [f"# {config.suite}"]
    for student in config.students:
        results = [found for cell, found in finished.items() if cell.model == model_of(student)]
        if results:
            tables.append(f"## {student}\n\n{suite_table(results)}")
    return "\n\n".join(tables)


def suite_table(results: list[Evaluation]) -> str:
    """Return one Markdown table of evaluations of the same methods: a row for each method.

    A cell is the mean and, in brackets, the paired difference to the random rival with its standard
    error; the last row is the distilled set minus the best rival of its size. Below it stand the
    steps and rates that were chosen, and what is to be known of the data.
    """
    columns = [
        (result, task)
        for result in results
        for task in ([R2] if result.explained() else []) + [*result.tasks()]
    ]
    header = ["pre-trained on", "images"]
    header += [f"{result.config.store.resolve().name} {task}" for result, task in columns]
    lines = [header]
    for method in results[0].config.names:
        line = [method, str(results[0].sizes().get(method) or "-")]
        lines.append(line + [_cell(result, method, task) for result, task in columns])
    best = ["**distilled** - best rival", ""]
    for result, task in columns:
        found = None if task == R2 else result.best_rival(task)
        best.append("-" if found is None else _difference(*found))
    lines.append(best)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [
        f"{result.name}: {note}"
        for result in results
        for note in filter(None, (result.stopped(), result.chosen_rates(), *result.notes))
    ]
    return "\n\n".join(["\n".join(rows), *notes])


def _cell(result: Evaluation, method: str, task: str) -> str:
    if task == R2:
        explained = result.explained().get(method)
        return "-" if explained is None else f"{explained:+.3f}"
    found = result.summary(method, task)
    if found is None:
        return "-"
    by = found.difference
    told = "" if by is None else f" ({signed(by.mean, by.standard_error)})"
    return plus_minus(found.mean, None) + told


def _difference(rival: str, by: Sample) -> str:
    return f"{signed(by.mean, by.standard_error)} ({rival})"
