"""The report: its numbers are those of the run folder, its images decode, and it loads nothing."""

import base64
import io
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError, KrrstError
from krrst_fast.evaluate.config import EvaluateConfig, FinetuneConfig
from krrst_fast.evaluate.table import Evaluation, Row
from krrst_fast.report.contact_sheet import columns
from krrst_fast.report.page import write_report
from krrst_fast.report.run_folder import read_run
from krrst_fast.runs.files import append_jsonl, read_json, write_json

SEEDS = 5
PROBE = {
    "none": [76.0, 74.5, 79.0, 77.5, 75.5],
    "random_target": [81.0, 79.5, 84.0, 82.5, 80.5],
    "distilled": [84.0, 82.0, 87.5, 85.0, 83.5],
    "target": [85.0, 83.0, 88.0, 86.5, 84.0],
}


@dataclass
class Page(HTMLParser):
    """What a test asks of a page: tables, figures, references, and the text of some elements."""

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    images: list[dict[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    text: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)
    _rows: list[list[str]] = field(default_factory=list)
    _caption: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in given.items()]
        for name in given.get("class", "").split():
            self.classes[name] = self.classes.get(name, 0) + 1
        if tag == "img":
            self.images.append(given)
        if tag not in ("meta", "img", "link", "br"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td"):
            self._rows[-1].append("")
        if tag in ("h1", "li", "code", "figcaption", "dd"):
            self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "table":
            self.tables[self._caption.strip()] = self._rows

    def handle_data(self, data: str) -> None:
        if "caption" in self._open:
            self._caption += data
        if "th" in self._open or "td" in self._open:
            self._rows[-1][-1] += data
        for tag in ("h1", "li", "code", "figcaption", "dd"):
            if tag in self._open:
                self.text[tag][-1] += data


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def make_set(*, seed: int = 0, count: int = 7, size: int = 8, shift: float = 0.0) -> DistilledSet:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=draw) / 255
    return DistilledSet(
        images=(pixels - 0.5) / 0.25 + shift,
        targets=torch.randn(count, 4, generator=draw),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def make_evaluation(run: Path, probe: dict[str, list[float]], *, name: str = "digits") -> None:
    config = EvaluateConfig(
        run=run,
        store=Path("store"),
        methods=tuple(probe),
        seeds=len(probe["distilled"]),
        finetune=FinetuneConfig(steps=3),
    )
    rows = [
        Row(
            method=method,
            seed=seed,
            scores={"probe-all": value}
            | ({} if method == "target" else {"finetune": value + 5 + 0.5 * seed}),
            pretrain_loss=None,
            seconds=1.0,
            fingerprint="0",
        )
        for method, values in probe.items()
        for seed, value in enumerate(values)
    ]
    evaluation = Evaluation(
        name=name, config=config, rows=tuple(rows), num_images=7, environment={}, seconds=20.0
    )
    (run / "evaluation").mkdir(exist_ok=True)
    write_json(run / "evaluation" / f"{name}.json", evaluation.to_json())


def make_rows(path: Path, steps: range) -> None:
    for step in steps:
        row = {
            "step": step,
            "loss": 0.08 / step**0.5,
            "ridge": 0.01,
            "condition": 1e5 + step,
            "retries": int(step in (7, 9)),
            "slot": step % 3,
            "slot_age": step % 20,
            "lr": 1e-2 * (1 - step / 100),
            "images_per_second": 1000.0,
            "seconds": 0.25 * step,
            "peak_memory_mb": 500.0,
        }
        append_jsonl(path, row)


def make_run(folder: Path, **settings: Any) -> Path:
    run, target = folder / "run", folder / "target"
    run.mkdir()
    target.mkdir()
    pool = {"size": 3, "online_steps": 20, "model": {"kind": "convnet", "widths": [8, 16]}}
    config = {"store": "store", "target": str(target), "num_images": 7, "steps": 60, "pool": pool}
    write_json(run / "config.json", {**config, "batch_size": 250, **settings})
    write_json(run / "environment.json", {"python": "3.11", "cpu": "A <fast> one", "threads": 2})
    write_json(run / "summary.json", {"seconds_per_step": 0.25})
    make_rows(run / "metrics.jsonl", range(1, 61))
    for step in range(0, 50, 10):
        row = {"step": step, "loss": 9.0 - step / 10, "embedding_std": 0.9, "effective_rank": 12.0}
        append_jsonl(target / "metrics.jsonl", row)
    write_json(target / "config.json", {"loss": "barlow_twins", "steps": 50})
    make_set().save(run / "initial.safetensors")
    make_set(shift=0.1).save(run / "distilled.safetensors")
    make_evaluation(run, PROBE)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run and its page, which no test may change."""
    folder = make_run(tmp_path_factory.mktemp("whole"))
    write_report(folder)
    return folder


@pytest.fixture
def page(run: Path) -> Page:
    return parse(run / "report.html")


def test_tables_hold_the_numbers_of_the_evaluation(run: Path, page: Page) -> None:
    summary = read_json(run / "evaluation" / "digits.json")["summary"]
    header, *rows = page.tables["7 images, 5 seeds"]
    probe = "Linear probe, all training labels"
    assert header == ["Method", probe, "difference", "Fine-tuning", "difference"]
    assert len(rows) == len(summary) == len(PROBE)
    for row, expected in zip(rows, summary):
        for task, (accuracy, difference) in zip(("probe-all", "finetune"), (row[1:3], row[3:5])):
            found = expected["scores"].get(task)
            if found is None:
                assert accuracy == "not run"
                continue
            mean, std = map(float, accuracy.split(" ± "))
            assert abs(mean - found["mean"]) <= 0.05001
            assert abs(std - found["std"]) <= 0.05001
            if found["difference"] is None:
                assert difference == "–"
            else:
                mean, error = map(float, difference.replace("−", "-").split(" ± "))
                assert abs(mean - found["difference"]["mean"]) <= 0.05001
                assert abs(error - found["difference"]["standard_error"]) <= 0.05001
    by_seed = page.tables["Linear probe, all training labels in %"]
    assert by_seed[0] == ["Method"] + [f"seed {seed}" for seed in range(SEEDS)]
    assert [[float(value) for value in row[1:]] for row in by_seed[1:]] == list(PROBE.values())


def test_headline_states_the_paired_difference(page: Page) -> None:
    differences = np.array(PROBE["distilled"]) - np.array(PROBE["random_target"])
    mean, error = differences.mean(), differences.std(ddof=1) / SEEDS**0.5
    (headline,) = page.text["h1"]
    assert f"beats 7 random real ones with the same target network by {mean:.1f}" in headline
    points = f"{mean:.1f} ± {error:.1f} points of linear-probe accuracy"
    assert f"{points} with all training labels on digits" in headline
    assert "(5 paired seeds)" in headline


def test_captions_and_stats_count_what_the_log_holds(page: Page) -> None:
    told = "\n".join(page.text["figcaption"])
    assert "2 of 60 logged solves took a larger ridge than asked for" in told
    # The middle of the 31 losses 0.08 / sqrt(step) from step 30 on stands at the last ages.
    assert "Median (dot) and middle half (bar) of 31 logged losses" in told
    assert any(text.startswith("60 of 60") for text in page.text["dd"])
    costs = page.tables["What the distillation cost on A <fast> one, 2 threads"]
    cost = {row[0]: row[1:] for row in costs}
    assert cost["Time a step"] == ["250", "ms"]
    assert cost["Throughput"] == ["1,000", "real images / s"]
    assert cost["Peak memory"] == ["500", "MB"]
    assert cost["Outer steps, in all"] == ["15", "s"]


def test_a_run_that_went_on_elsewhere_names_each_place(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    first = read_json(folder / "environment.json")
    write_json(folder / "environment.2.json", {**first, "torch": "2.9"})
    third = {"python": "3.12", "gpu": "H", "cpu": "B", "device": "cuda"}
    write_json(folder / "environment.3.json", third)
    tables = parse(write_report(folder)).tables
    assert "What the distillation cost on A <fast> one, 2 threads; then on H" in tables
    assert ["torch", "2.9"] in tables["environment.2.json"]
    assert dict(tables["environment.3.json"][1:]) == third
    write_json(folder / "environment.3.json", {**third, "device": "cpu"})
    tables = parse(write_report(folder)).tables
    assert "What the distillation cost on A <fast> one, 2 threads; then on B" in tables


def test_a_number_and_its_spread_stay_on_one_line(run: Path) -> None:
    rules = re.findall(r"([^{}]*)\{([^{}]*)\}", (run / "report.html").read_text(encoding="utf-8"))
    found = [what for who, what in rules if re.search(r"\.num\b", who)]
    assert found and all("white-space: nowrap" in what for what in found)


def test_page_loads_nothing(run: Path, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:80])
        if not value.startswith("data:"):
            for reference in re.findall(r"url\(([^)]*)\)|(\w+://)", value):
                assert reference[0].startswith("#"), (tag, name, value[:80])
    source = (run / "report.html").read_text(encoding="utf-8")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "http" not in source and "file:" not in source


def test_every_id_is_unique_and_every_reference_is_met(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    wanted = {value[1:] for _, name, value in page.attributes if name == "href"}
    for _, _, value in page.attributes:
        wanted |= set(re.findall(r"url\(#([^)]*)\)", value))
    wanted |= {v for _, n, v in page.attributes if n in ("aria-labelledby", "aria-describedby")}
    assert wanted <= set(ids)


def test_page_is_accessible(page: Page) -> None:
    assert ("html", "lang", "en") in page.attributes
    assert len(page.images) == 3 and all(len(image["alt"]) > 20 for image in page.images)
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == page.tags.count("svg") == 10
    headers = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
    assert len(headers) == page.tags.count("th")
    assert all(page.tables), "every table has a caption"


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_sheets_hold_the_pixels(page: Page) -> None:
    for image, made in zip(page.images, (make_set(), make_set(shift=0.1))):
        sheet, pixels = decoded(image["src"]), made.pixels().numpy()
        assert sheet.shape == (int(image["height"]), int(image["width"]), 4)
        across = columns(7)
        scale = next(s for s in range(1, 200) if (s * 9) * across >= 720)
        for index in range(7):
            y, x = index // across * (scale * 9), index % across * (scale * 9)
            square = sheet[y : y + 8 * scale, x : x + 8 * scale]
            assert (square[..., 3] == 255).all()
            big = np.kron(pixels[index], np.ones((scale, scale, 1), dtype=np.uint8))
            assert (square[..., :3] == big).all()
        assert (sheet[..., 3] == 0).any(), "gaps are clear"
    # A shift of 0.1 deviations of 0.25 is 0.025 everywhere; amplified it reaches white.
    difference = decoded(page.images[2]["src"])
    assert set(difference[difference[..., 3] == 255][:, :3].flatten().tolist()) == {255}
    captions = [text for text in page.text["figcaption"] if "Now minus start" in text]
    assert len(captions) == 1 and "times 20," in captions[0] and "2.5\u00a0%" in captions[0]


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("environment.json", "metrics.jsonl", "summary.json", "distilled.safetensors"):
        (run / name).unlink()
    (run / "initial.safetensors").unlink()
    (run / "evaluation" / "digits.json").unlink()
    (tmp_path / "target" / "metrics.jsonl").unlink()
    page = parse(write_report(run))
    told = "\n".join(page.text["li"])
    for part in ("environment.json", "metrics.jsonl", "distilled.safetensors", "initial.safe"):
        assert part in told
    assert "evaluation/*.json" in told and str(tmp_path / "target" / "metrics.jsonl") in told
    assert f"krrst evaluate {run} --store STORE" in page.text["code"]
    assert f"krrst distill --config {run}/config.json --resume" in page.text["code"]
    assert "not been measured" in page.text["h1"][0]
    assert not page.images and page.tags.count("svg") == 0


def test_a_target_made_of_weights_has_no_curves_to_miss(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "target" / "metrics.jsonl").unlink()
    write_json(tmp_path / "target" / "config.json", {"loss": "vicreg", "weights": "some/net.pth"})
    summary = {"dim": 64, "effective_rank": 41.3, "embedding_std": 0.9712}
    write_json(tmp_path / "target" / "summary.json", summary)
    source = write_report(run).read_text(encoding="utf-8")
    assert read_run(run).missing == []
    assert "was loaded: some/net.pth" in source
    assert "deviation of 0.971 (1 is full spread) over an effective 41 of 64 dimensions" in source


def test_user_text_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert('1')</script>"
    run = make_run(tmp_path, store=attack, note={attack: [attack]})
    make_evaluation(run, PROBE, name="<b>x")
    write_json(
        run / "evaluation" / "a.json",
        read_json(run / "evaluation" / "digits.json") | {"name": attack},
    )
    page = parse(write_report(run))
    assert "script" not in page.tags and "b" not in page.tags[page.tags.index("h1") :]
    settings = dict(row for row in page.tables["config.json"][1:])
    assert settings["store"] == attack
    assert settings[f"note.{attack}"] == attack
    assert settings["pool.model.widths"] == "8, 16"
    assert "on <b>x (" in page.text["h1"][0]
    assert ("div", "aria-label", f"Accuracies, {attack}") in page.attributes


def test_the_same_run_gives_the_same_page(run: Path, tmp_path: Path) -> None:
    again = write_report(run, tmp_path / "again.html")
    assert again.read_bytes() == (run / "report.html").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


def test_rows_without_numbers_do_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    append_jsonl(run / "metrics.jsonl", {"step": 61, "loss": None, "condition": float("inf")})
    append_jsonl(run / "metrics.jsonl", {"step": 62, "loss": float("nan"), "lr": 0.0})
    page = parse(write_report(run))
    assert page.tags.count("svg") == 10
    assert "nan" not in "".join(page.text["dd"]).lower()


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a distillation run: it holds neither"):
        write_report(tmp_path)
    run = make_run(tmp_path)
    with pytest.raises(DataError, match="its config.json has no num_images and target"):
        write_report(tmp_path / "target")
    (run / "evaluation" / "digits.json").write_text("[1]")
    with pytest.raises(DataError, match="must hold a JSON object, got a list"):
        write_report(run)
    (run / "evaluation" / "digits.json").write_text("{}")
    with pytest.raises(DataError, match="not a result of krrst evaluate"):
        write_report(run)
    (run / "evaluation" / "digits.json").unlink()
    for out in (tmp_path / "no" / "page.html", tmp_path):
        with pytest.raises(DataError, match="cannot be written"):
            write_report(run, out)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(KrrstError, match=r"needs jinja2.*pip install 'krrst-fast\[report\]'"):
        write_report(make_run(tmp_path))
