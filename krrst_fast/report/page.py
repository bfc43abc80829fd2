"""A distillation run as one HTML page that loads nothing: verdict, images, curves, settings."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError, KrrstError
from krrst_fast.evaluate.paired import plus_minus, signed
from krrst_fast.report import figures
from krrst_fast.report.contact_sheet import percent, sheets
from krrst_fast.report.figures import Curve, column, has_data, number
from krrst_fast.report.heldout import at_the_end, held_out_curve
from krrst_fast.report.run_folder import Run, read_run
from krrst_fast.report.verdict import Headline, headline_of, label_of, typographic
from krrst_fast.runs.config import flat
from krrst_fast.runs.files import write_text
from krrst_fast.runs.log import loss_at_end
from krrst_fast.runs.version import version

_COST = (
    ("seconds", "Outer steps, in all", "s"),
    ("warm_up_seconds", "Warm-up of the pool", "s"),
    ("seconds_per_step", "Time a step", "s"),
    ("images_per_second", "Throughput", "real images / s"),
    ("peak_memory_mb", "Peak memory", "MB"),
)
_TOP = ("Time a step", "Throughput", "Peak memory")
_EXTRAS = {"jinja2": "report", "matplotlib": "report", "PIL": "report", "safetensors": "cli"}


@dataclass(frozen=True, kw_only=True)
class Stat:
    """A number with its name; `unit` or `note` says what it counts."""

    label: str
    value: str
    unit: str = ""
    note: str = ""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of the distillation run in the folder `run`.

    Args:
        run: A folder made by `krrst distill`; parts it lacks are named on the page.
        out: The page; None takes `report.html` in the folder.

    Returns:
        Where the page is.

    Raises:
        DataError: `run` is not the folder of a distillation run, or a file in it is damaged.
        KrrstError: A package the page is made with is not installed.
    """
    _need_extra()
    run, out = Path(run), Path(out) if out is not None else Path(run) / "report.html"
    found = read_run(run)
    if not out.parent.is_dir() or out.is_dir():
        raise DataError(f"write_report: {out} cannot be written: it must be a file in a folder")
    write_text(out, _render(found))
    return out


def _need_extra() -> None:
    for name, extra in _EXTRAS.items():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise KrrstError(
                f"write_report: needs {name}, which cannot be imported ({error}): "
                f"pip install 'krrst-fast[{extra}]'"
            ) from None


def _render(run: Run) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("krrst_fast", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("page.html").render(
        name=run.name,
        version=version(),
        date=date.today().isoformat(),
        headline=_headline(run),
        stats=_stats(run),
        missing=run.missing,
        evaluations=run.evaluations,
        sheets=sheets(run.initial, run.distilled),
        sheets_note=_sheets_note(run.initial, run.distilled),
        curves=_curves(run),
        curves_note=_curves_note(run.config),
        target_curves=_target_curves(run),
        target_note=_target_note(run),
        cost=_cost(run),
        cost_caption=_cost_caption(run),
        tables=_tables(run),
        label=label_of,
        plus_minus=plus_minus,
        signed=signed,
        typographic=typographic,
    )


def _count(run: Run) -> int | None:
    return len(run.distilled) if run.distilled else run.config.get("num_images")


def _last_loss(run: Run) -> float | None:
    return loss_at_end(run.rows)


def _headline(run: Run) -> Headline:
    headline = headline_of(run.evaluations)
    if headline is not None:
        return headline
    count, loss = _count(run), _last_loss(run)
    state = "Distilled" if run.distilled else "Still distilling"
    images = f"{_whole(count)} images" if count is not None else "images"
    reached = f", outer loss {number(loss)}" if loss is not None else ""
    if (held_out := at_the_end(run)) is not None:
        reached = f", held-out R2 {held_out[0]} ({held_out[1]})"
    return Headline(
        before=f"{state}: {images} after {run.steps_done:,} outer steps{reached}; "
        "whether they transfer has not been measured.",
        lede="A low outer loss or a high R2 does not say that pre-training on the images helps: an "
        "evaluation against random images with the same targets does.",
    )


def _stats(run: Run) -> list[Stat]:
    stats = []
    count, loss, held_out = _count(run), _last_loss(run), at_the_end(run)
    if count is not None:
        shape = run.distilled.images.shape if run.distilled else None
        note = f"{shape[3]} \u00d7 {shape[2]} pixels" if shape is not None else ""
        stats.append(Stat(label="Distilled images", value=_whole(count), note=note))
    if run.rows:
        planned = run.config.get("steps")
        note = f"of {_whole(planned)}" if planned else ""
        stats.append(Stat(label="Outer steps", value=f"{run.steps_done:,}", note=note))
    if held_out is not None:
        stats.append(Stat(label="Held-out R2", value=held_out[0], note=held_out[1]))
    if loss is not None:
        note = "mean of the last tenth"
        stats.append(Stat(label="Outer loss at the end", value=number(loss), note=note))
    top = [item for item in _cost(run) if item.label in _TOP]
    return stats + [Stat(label=i.label, value=i.value, note=i.unit) for i in top]


def _cost(run: Run) -> list[Stat]:
    """Time and memory: of the finished run, or as far as its log goes."""
    found = dict(run.summary)
    if run.rows:
        seconds, memory = column(run.rows, "seconds"), column(run.rows, "peak_memory_mb")
        speed = column(run.rows, "images_per_second")
        if np.isfinite(seconds).any() and run.steps_done:
            found.setdefault("seconds", float(np.nanmax(seconds)))
            found.setdefault("seconds_per_step", float(np.nanmax(seconds)) / run.steps_done)
        if np.isfinite(speed).any():
            found.setdefault("images_per_second", float(np.nanmedian(speed)))
        if np.isfinite(memory).any():
            found.setdefault("peak_memory_mb", float(np.nanmax(memory)))
    items = []
    for key, label, unit in _COST:
        value = found.get(key)
        if isinstance(value, int | float):
            value, unit = _scaled(float(value), unit)
            items.append(Stat(label=label, value=number(value), unit=unit))
    return items


def _whole(value: Any) -> str:
    """Return a count with thousands separators; anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _scaled(value: float, unit: str) -> tuple[float, str]:
    """Return seconds in a readable unit: ms, s or min."""
    if unit != "s":
        return value, unit
    if value < 1:
        return 1000 * value, "ms"
    return (value / 60, "min") if value >= 120 else (value, "s")


def _cost_caption(run: Run) -> str:
    places = dict.fromkeys(filter(None, map(_machine, run.environments.values())))
    return f"What the distillation cost{' on ' if places else ''}{'; then on '.join(places)}"


def _machine(environment: Mapping[str, Any]) -> str:
    """Return the GPU it used, or the processor and its threads; "" if neither is named."""
    gpu = environment.get("gpu")
    if gpu and environment.get("device") != "cpu":
        return str(gpu)
    cpu, threads = environment.get("cpu"), environment.get("threads")
    if cpu and threads:
        return f"{cpu}, {threads} thread{'s' if threads != 1 else ''}"
    return str(cpu or "")


def _sheets_note(initial: DistilledSet | None, distilled: DistilledSet | None) -> str:
    note = "A pixel of an image is a square here; nothing is interpolated."
    if initial is None or distilled is None or initial.targets.shape != distilled.targets.shape:
        return note
    moved = (distilled.targets - initial.targets).norm(dim=1)
    if not moved.any():
        return f"{note} The target representations are those of the start."
    share = float((moved / initial.targets.norm(dim=1).clamp(min=1e-12)).median())
    return (
        f"{note} The target representations were learnt with them: the median image's moved by "
        f"{percent(share)} of its length."
    )


def _curves(run: Run) -> list[Curve]:
    step, loss = column(run.rows, "step"), column(run.rows, "loss")
    curves: list[Curve | None] = [held_out_curve(run)]
    if has_data(loss, positive=True):
        curves.append(figures.outer_loss(step, loss))
        curves.append(figures.loss_by_age(step, loss, column(run.rows, "slot_age")))
    targets = column(run.rows, "lr_targets")
    apart = " of the images" if has_data(targets) else ""
    condition, ridge = column(run.rows, "condition"), column(run.rows, "ridge")
    curves.append(
        figures.stacked(
            "Conditioning",
            step,
            [("condition number, estimate", condition, True), ("ridge, absolute", ridge, True)],
            "The estimated condition number of the ridged gram that is solved, and the ridge on "
            "its diagonal. Towards 10⁷ a float32 solve runs out of digits." + _retried(run),
        )
    )
    curves.append(
        figures.stacked(
            "Pace",
            step,
            [
                (f"learning rate{apart}", column(run.rows, "lr"), False),
                ("learning rate of the targets", targets, False),
                ("real images a second", column(run.rows, "images_per_second"), False),
            ],
            "The rate of the outer optimiser, and the throughput of whole outer steps.",
        )
    )
    return [curve for curve in curves if curve is not None]


def _retried(run: Run) -> str:
    retries = column(run.rows, "retries")
    if not np.isfinite(retries).any():
        return ""
    count = int((retries > 0).sum())
    if count == 0:
        return " No logged solve needed a larger ridge than the one asked for."
    solves = "solve" if count == 1 else "solves"
    logged = int(np.isfinite(retries).sum())
    return f" {count:,} of {logged:,} logged {solves} took a larger ridge than asked for."


def _curves_note(config: Mapping[str, Any]) -> str:
    pool = config.get("pool")
    if not isinstance(pool, dict) or "size" not in pool or "online_steps" not in pool:
        return ""
    return (
        f"The loss is measured on one of {pool['size']} pool networks a step, each of them trained "
        f"on the images for up to {_whole(pool['online_steps'])} steps before a fresh one takes "
        "its place: read it by the age of the network as well as along the run."
    )


def _target_curves(run: Run) -> list[Curve]:
    rows = run.target_rows
    step = column(rows, "step")
    curves = [
        figures.stacked(
            "Self-supervised loss",
            step,
            [("loss", column(rows, "loss"), True)],
            "The loss the target network was trained with.",
            xlabel="target step",
            colour=figures.INK,
        ),
        figures.stacked(
            "Collapse",
            step,
            [
                ("embedding standard deviation", column(rows, "embedding_std"), False),
                ("effective rank (dimensions in use)", column(rows, "effective_rank"), False),
            ],
            "Spread of the representations over a batch: near 1, and many dimensions, is healthy; "
            "near 0, and few, is a collapsed target with nothing to distil.",
            xlabel="target step",
            colour=figures.INK,
        ),
    ]
    return [curve for curve in curves if curve is not None]


def _target_note(run: Run) -> str:
    config, found = run.target_config, run.target_summary
    note = ""
    if config.get("weights"):
        note = f"The network whose representations are distilled was loaded: {config['weights']}."
    elif "loss" in config and "steps" in config:
        loss = str(config["loss"]).replace("_", " ")
        note = (
            "How the network whose representations are distilled was trained: "
            f"{loss}, {_whole(config['steps'])} steps"
        )
        seconds = found.get("seconds")
        value, unit = _scaled(float(seconds), "s") if seconds is not None else (0.0, "")
        note += f", {number(value)} {unit}." if unit else "."
    elif run.target_rows:
        note = "How the network whose representations are distilled was trained."
    if {"dim", "effective_rank", "embedding_std"} <= found.keys():
        note += (
            f" On real images, not augmented, its representations have a standard deviation of "
            f"{number(found['embedding_std'])} (1 is full spread) over an effective "
            f"{found['effective_rank']:.0f} of {found['dim']} dimensions."
        )
    return note


def _tables(run: Run) -> list[dict[str, Any]]:
    tables: list[tuple[str, str, Mapping[str, Any]]] = [
        ("Settings of the distillation", "config.json", run.config),
        ("Settings of the target network", "config.json of the target", run.target_config),
        ("Summary of the target network", "summary.json of the target", run.target_summary),
    ]
    tables += [
        ("Where it ran" if i == 0 else "Where it went on", name, values)
        for i, (name, values) in enumerate(run.environments.items())
    ]
    tables.append(("Summary", "summary.json", run.summary))
    tables += [
        (f"Settings of the evaluation {e.evaluation.name}", e.file, e.settings)
        for e in run.evaluations
    ]
    return [
        {
            "title": title,
            "caption": caption,
            "rows": [(name, _plain(value)) for name, value in flat(dict(values)).items()],
        }
        for title, caption, values in tables
        if values
    ]


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    return str(value)
