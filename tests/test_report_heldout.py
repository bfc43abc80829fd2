"""The held-out R2 on the page: its numbers, its curve, its words, and where there is none."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from krrst_fast.distill.heldout import ATTAINABLE, MISSING, OURS, REAL
from krrst_fast.report import figures
from krrst_fast.report.heldout import held_out_curve
from krrst_fast.report.page import write_report
from krrst_fast.report.run_folder import Run, read_run
from krrst_fast.runs.files import append_jsonl, write_json
from tests.test_report import Page, make_run, parse

ROWS = {
    0: {OURS: -0.3, REAL: -0.3, ATTAINABLE: 0.16},
    30: {OURS: 0.08, REAL: -0.28},
    61: {OURS: 0.1284, REAL: -0.2637, ATTAINABLE: 0.1719},
}


def _page(folder: Path, rows: dict[int, dict[str, float]]) -> tuple[Path, Page]:
    run = make_run(folder)
    for step, row in rows.items():
        append_jsonl(run / "metrics.jsonl", {"step": step, "loss": 0.01 if step else None, **row})
    return run, parse(write_report(run))


def test_the_figures_at_the_end_are_on_top_and_in_words(tmp_path: Path) -> None:
    run, page = _page(tmp_path, ROWS)
    assert any("+0.13 as many real images −0.26" in text for text in page.text["dd"])
    (caption,) = [text for text in page.text["figcaption"] if "At the end" in text]
    assert "distilled +0.128, as many real images −0.264" in caption
    assert "ridge: +0.172" in caption and "hardly anything" not in caption
    assert ("svg", "aria-label", "Held-out R2") in page.attributes
    assert page.tags.count("svg") == 11
    # The outer loss as a share of a variance is no figure of merit.
    assert "% of the target" not in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_without_evaluation_is_headed_by_it(tmp_path: Path) -> None:
    run, _ = _page(tmp_path, ROWS)
    (run / "evaluation" / "digits.json").unlink()
    (headline,) = parse(write_report(run)).text["h1"]
    assert "held-out R2 +0.13 (as many real images −0.26)" in headline
    assert "outer loss" not in headline


def test_nothing_to_distil_is_said(tmp_path: Path) -> None:
    easy = {0: {OURS: 0.9, REAL: 0.9}, 61: {OURS: 0.97, REAL: 0.95, ATTAINABLE: 0.99}}
    _, page = _page(tmp_path, easy)
    assert any("hardly anything to distil" in text for text in page.text["figcaption"])


def test_the_curve_goes_through_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def kept(title: str, draw: Any, caption: str, height: float = 1.0) -> str:
        from matplotlib.figure import Figure

        drawn.append(Figure())
        draw(drawn[0])
        return caption

    monkeypatch.setattr(figures, "_curve", kept)
    rows = [{"step": step, **row} for step, row in ROWS.items()]
    rows.insert(1, {"step": 10, "loss": 0.2})
    assert held_out_curve(Run(folder=Path("run"), rows=rows)) is not None
    lines = {line.get_label(): line.get_xydata() for line in drawn[0].axes[0].lines}
    assert np.array_equal(lines["distilled"], [[0, -0.3], [30, 0.08], [61, 0.1284]])
    assert np.array_equal(lines["as many real images"], [[0, -0.3], [30, -0.28], [61, -0.2637]])
    assert np.array_equal(lines["attainable"], [[0, 0.16], [61, 0.1719]])


def test_why_there_is_none_is_said_and_an_older_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert read_run(run).missing == []
    write_json(run / "summary.json", {MISSING: "as the store has no test or val split"})
    page = parse(write_report(run))
    assert any("The held-out R2, as the store has no" in text for text in page.text["li"])
    assert "Held-out R2" not in page.text["dd"] and page.tags.count("svg") == 10


def test_both_rates_are_drawn_where_they_differ(tmp_path: Path) -> None:
    _, page = _page(tmp_path, {61: {"lr_targets": 0.02}, 62: {"lr_targets": 0.01}})
    source = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "learning rate of the images" in source and "learning rate of the targets" in source
    assert page.tags.count("svg") == 10
