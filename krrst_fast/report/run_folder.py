"""The contents of the folder of a distillation run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.distill.heldout import MISSING
from krrst_fast.errors import DataError
from krrst_fast.evaluate.table import Evaluation
from krrst_fast.report.verdict import EvaluationSection
from krrst_fast.runs.environment import recorded
from krrst_fast.runs.files import read_json, read_jsonl


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A part the run folder lacks, and the command that makes it."""

    what: str
    command: str


@dataclass(kw_only=True)
class Run:
    """The contents of a run folder; absent parts are empty and named in `missing`."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where it ran, by file name: another one for each time it went on elsewhere."""
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    initial: DistilledSet | None = None
    distilled: DistilledSet | None = None
    evaluations: list[EvaluationSection] = field(default_factory=list)
    target_rows: list[dict[str, Any]] = field(default_factory=list)
    target_config: dict[str, Any] = field(default_factory=dict)
    target_summary: dict[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    def lacks(self, what: str, command: str) -> None:
        """Note a part that is not there."""
        self.missing.append(Missing(what=what, command=command))

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def steps_done(self) -> int:
        """The outer step of the last logged row."""
        return int(self.rows[-1]["step"]) if self.rows else 0


def read_run(folder: Path) -> Run:
    """Read whatever a run folder holds.

    Raises:
        DataError: It is not the folder of a distillation run, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"write_report: {folder} is not a folder")
    run = Run(folder=folder)
    config_file = folder / "config.json"
    if config_file.exists():
        run.config = _object(config_file)
        if "num_images" not in run.config or "target" not in run.config:
            raise DataError(
                f"write_report: {folder} is not a distillation run: its config.json has no "
                "num_images and target"
            )
    elif not (folder / FILE_NAME).exists():
        raise DataError(
            f"write_report: {folder} is not a distillation run: it holds neither config.json "
            f"nor {FILE_NAME}"
        )
    else:
        run.lacks("The settings (config.json).", "krrst distill")
    _read_records(run)
    _read_results(run)
    _read_evaluations(run)
    _read_target(run)
    return run


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, got a {type(value).__name__}")
    return value


def _read_records(run: Run) -> None:
    run.environments = {path.name: _object(path) for path in recorded(run.folder)}
    if not run.environments:
        run.lacks("What the run ran on (environment.json).", "krrst distill")
    run.rows = _by_step(read_jsonl(run.folder / "metrics.jsonl"))
    if not run.rows:
        run.lacks("The curves of the run (metrics.jsonl).", "krrst distill")


def _by_step(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows in the order of steps; of a step that a resumed run did twice, the later row."""
    last = {row["step"]: row for row in rows if isinstance(row.get("step"), int)}
    return [last[step] for step in sorted(last)]


def _read_results(run: Run) -> None:
    final, first, summary = (
        run.folder / name for name in (FILE_NAME, "initial.safetensors", "summary.json")
    )
    if summary.exists():
        run.summary = _object(summary)
        if MISSING in run.summary:
            run.lacks(f"The held-out R2, {run.summary[MISSING]}.", "")
    if final.exists():
        # By its folder, so that the set of another run is noticed.
        run.distilled = load_distilled(run.folder)
        if not summary.exists():
            run.lacks("The cost and the held-out R2 (summary.json).", "krrst distill")
    else:
        what = f"The distilled images ({FILE_NAME}) and what they cost: the run has not finished."
        run.lacks(what, f"krrst distill --config {run.folder / 'config.json'} --resume")
    if first.exists():
        run.initial = load_distilled(first)
    else:
        what = "The images at the start (initial.safetensors), so no difference is shown."
        run.lacks(what, "krrst distill")


def _read_evaluations(run: Run) -> None:
    folder = run.folder / "evaluation"
    for path in sorted(folder.glob("*.json")):
        evaluation = Evaluation.from_json(_object(path), path)
        section = EvaluationSection(evaluation=evaluation, file=f"evaluation/{path.name}")
        run.evaluations.append(section)
    unfinished = sorted(folder.glob("*.partial.jsonl"))
    for path in unfinished:
        name = path.name.removesuffix(".partial.jsonl")
        run.lacks(
            f"The rest of the evaluation {name}, which was stopped.",
            f"krrst evaluate {run.folder} --store STORE --name {name}",
        )
    if not run.evaluations and not unfinished:
        run.lacks(
            "Any evaluation (evaluation/*.json): nothing here says whether it transfers.",
            f"krrst evaluate {run.folder} --store STORE",
        )


def _read_target(run: Run) -> None:
    if "target" not in run.config:
        return
    target = Path(str(run.config["target"]))
    folder = target if target.suffix != ".safetensors" else target.parent
    run.target_rows = _by_step(read_jsonl(folder / "metrics.jsonl"))
    if (folder / "config.json").exists():
        run.target_config = _object(folder / "config.json")
    if (folder / "summary.json").exists():
        run.target_summary = _object(folder / "summary.json")
    # A target of existing weights, or an encoder, has no curves to miss.
    made = run.target_config.get("weights") or run.target_config.get("encoder")
    if not run.target_rows and not made:
        run.lacks(
            f"The pre-training curves of the target network ({folder / 'metrics.jsonl'}).",
            "krrst target",
        )
