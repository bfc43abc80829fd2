"""The page and the README's table, made from what a real, tiny run of asv recorded."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from krrst_fast.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
charts = import_module("bench.charts")
environment = import_module("bench.bench_environment")
page = import_module("bench.page")
report = import_module("bench.report")
results = import_module("bench.results")
bench_krr = import_module("bench.bench_krr")

SHAPE = bench_krr.Shape(30, 64, 512, 256)
KRR = ("bench_krr.KRR", repr(SHAPE), "'torch'", "'float32'")
VOID = ("area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr")


class Page(HTMLParser):
    """The text of each element by tag; tags that are not closed in order raise."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
            self.text.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.text[tag][-1] += data


def _run(folder: Path, *command: str) -> str:
    mails = {f"GIT_{a}_{b}": "a@b" for a in ("AUTHOR", "COMMITTER") for b in ("NAME", "EMAIL")}
    quiet = {"HOME": str(folder), "GIT_CONFIG_GLOBAL": os.devnull, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **mails, **quiet},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one commit, of which one row of two suites was measured."""
    if shutil.which("git") is None:
        pytest.skip("asv needs git")
    folder = tmp_path_factory.mktemp("asv")
    settings = {
        "version": 1,
        "project": "krrst_fast",
        "repo": ".",
        "branches": ["HEAD"],
        "environment_type": "existing",
        "launch_method": "forkserver",
        "benchmark_dir": str(ROOT / "bench"),
        "results_dir": "results",
    }
    (folder / "asv.conf.json").write_text(json.dumps(settings))
    _run(folder, "git", "init", "-q", ".")
    _run(folder, "git", "commit", "-q", "--allow-empty", "-m", "empty")
    commit = _run(folder, "git", "rev-parse", "HEAD")
    asv = (sys.executable, "-m", "asv")
    _run(folder, *asv, "machine", "--yes", "--machine", "here", "--cpu", "a <fast> processor")
    _run(
        *(folder, *asv, "run", "-E", "existing", "--machine", "here", "--set-commit-hash", commit),
        *("--bench", r"KRR\.\w+\(Shape\(m=30.*'torch', 'float32'"),
        *("--bench", r"RidgeSolve\.track_error\(Shape\(m=30.*'torch', 'float32'"),
        *("--bench", "track_threads"),
    )
    return folder / "results"


def _changed(recorded: Path, to: Path, **changes: object) -> Path:
    """A copy of the folder whose result file has these top-level values."""
    if not to.exists():
        shutil.copytree(recorded, to)
    (source,) = (recorded / "here").glob("*-*.json")
    data = json.loads(source.read_text()) | changes
    name = f"{data['commit_hash'][:8]}-{data['env_name'].replace('/', '_')}.json"
    (to / "here" / name).write_text(json.dumps(data))
    return to


def _later(recorded: Path, to: Path, commit: str, days: int, factor: float) -> Path:
    """A copy with one more commit, whose ratios are those of the first times a factor."""
    (source,) = (recorded / "here").glob("*-*.json")
    data = json.loads(source.read_text())
    for name, row in data["results"].items():
        if name.endswith("ratio_to_reference"):
            row[0] = [value * factor for value in row[0]]
    later = data["date"] + days * 86_400_000
    return _changed(recorded, to, commit_hash=commit, date=later, results=data["results"])


def test_what_asv_recorded_is_read(recorded: Path) -> None:
    (series,) = results.read(recorded)
    assert series.machine["cpu"] == "a <fast> processor" and series.latest.machine == "here"
    assert series.latest.versions == environment.versions() | {"threads": "2"}
    values = series.latest.rows[KRR]
    assert 0 < values["time_call"] < 1 and 0 < values["track_ratio_to_reference"] < 100
    assert 0 < values["track_error"] < 1e-3 and 0 < values["track_peak_mb"] < 10
    elsewhere = series.latest.rows[(*KRR[:2], "'torch-cuda'", KRR[3])]
    assert all(math.isnan(value) for value in elsewhere.values())


def test_the_page_says_what_was_measured(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report.main(["--results", str(recorded), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    got = Page(text)
    values = results.read(recorded)[0].latest.rows[KRR]
    times = 1 / values["track_ratio_to_reference"]
    (promised,) = (row for row in got.text["tr"] if "KRR" in row and "LU and autograd" in row)
    assert charts.digits(values["time_call"] * 1e3) in promised
    assert charts.digits(times, 2 if times < 1 else 3) + "×" in promised
    assert charts.digits(values["track_error"], 2) in promised
    assert "M 30, P 64, D 512, B 256" in promised
    assert ("missed" in promised) is (times < bench_krr.FLOORS[SHAPE])
    assert [name for name in got.text["h3"]] == ["KRR", "RidgeSolve"]
    assert "Not measured here:" in text and "of torch-cuda" in text
    assert any("a <fast> processor" in cell for cell in got.text["td"])
    assert any(environment.versions()["torch"] in cell for cell in got.text["td"])
    assert "nan" not in "".join(got.text["td"] + got.text["dd"]).lower()


def test_the_page_loads_nothing(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert report.main(["--results", str(recorded), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    got = Page(text)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img", text)
    linked = {value for _, name, value in got.attributes if name in ("href", "src")}
    anchors = {f"#{value}" for _, name, value in got.attributes if name == "id"}
    assert linked == anchors == {"#KRR-1", "#RidgeSolve-1"}


def test_commits_make_a_history(recorded: Path, tmp_path: Path) -> None:
    commits = _later(recorded, tmp_path / "more", "f" * 40, 2, factor=0.5)
    _later(recorded, commits, "e" * 40, 1, factor=2.0)
    (series,) = results.read(commits)
    assert [run.commit[0] for run in series.runs[1:]] == ["e", "f"]
    found = [value for _, value in series.history(KRR, "track_ratio_to_reference")]
    assert found == pytest.approx([found[0], 2 * found[0], found[0] / 2])
    assert report.main(["--results", str(commits), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('class="spark"') == 1 and "over commits" in text
    assert f"ffffffff: {charts.digits(2 / found[0])}" in text
    alone = tmp_path / "alone.html"
    assert report.main(["--results", str(recorded), "--out", str(alone)]) == 0
    assert 'class="spark"' not in alone.read_text(encoding="utf-8")


def test_a_failure_is_shown(recorded: Path, tmp_path: Path) -> None:
    (source,) = (recorded / "here").glob("*-*.json")
    data = json.loads(source.read_text())
    row = data["results"]["bench_krr.KRR.track_error"]
    row[0] = [None if value == value else value for value in row[0]]
    # asv writes a lone null where every row failed.
    data["results"]["bench_ridge_solve.RidgeSolve.track_error"][0] = None
    broken = _changed(recorded, tmp_path / "broken", results=data["results"])
    assert report.main(["--results", str(broken), "--out", str(tmp_path / "page.html")]) == 0
    got = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    # Once more among the promises; every row of the second suite failed, on the GPU too.
    assert got.text["td"].count("failed") == 2 + 40
    assert "41 rows failed" in got.text["p"][1]


def test_every_machine_has_its_part(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "two")
    shutil.copytree(recorded / "here", tmp_path / "two" / "there")
    out = tmp_path / "page.html"
    assert report.main(["--results", str(tmp_path / "two"), "--out", str(out)]) == 0
    got = Page(out.read_text(encoding="utf-8"))
    assert [text.split(" · ")[1] for text in got.text["p"] if "benchmarks on" in text] == [
        "benchmarks on here",
        "benchmarks on there",
    ]
    assert len(got.text["h1"]) == 1
    options = ["--results", str(tmp_path / "two"), "--out", str(out), "--machine", "there"]
    assert report.main(options) == 0
    assert "benchmarks on <b>here" not in out.read_text(encoding="utf-8")


def test_the_readme_gets_its_table(recorded: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold | table\n{report.END}\nafter\n")
    options = ["--results", str(recorded), "--out", str(tmp_path / "page.html")]
    assert report.main([*options, "--readme", str(readme)]) == 0
    once = readme.read_text()
    values = results.read(recorded)[0].latest.rows[KRR]
    assert once.startswith(f"before\n{report.BEGIN}\n\n| computation | against |")
    assert once.endswith(f"\n\n{report.END}\nafter\n") and "old" not in once
    (row,) = (line for line in once.splitlines() if line.startswith("| KRR loss"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "KRR loss and gradients: M 30, P 64, D 512, B 256"
    ours, ratio = values["time_call"] * 1e3, values["track_ratio_to_reference"]
    assert float(cells[3]) == pytest.approx(ours, rel=0.01)
    assert float(cells[2]) == pytest.approx(ours / ratio, rel=0.01)
    assert float(cells[4].strip("*")) == pytest.approx(1 / ratio, rel=0.06)
    assert float(cells[6]) == pytest.approx(values["track_error"], rel=0.06)
    assert "a <fast> processor, 2 threads, torch" in once and "asv run -E existing" in once
    assert report.main([*options, "--readme", str(readme)]) == 0
    assert readme.read_text() == once


def test_the_readme_of_the_project_has_the_marks() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(report.BEGIN) == text.count(report.END) == 1


def test_what_cannot_be_told_is_refused(recorded: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        results.read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no results"):
        results.read(tmp_path)
    for text, said in (("{", "cannot be read"), ("[1]", "must hold a JSON object"), ("{}", "asv")):
        shutil.copytree(recorded, tmp_path / "bad", dirs_exist_ok=True)
        next((tmp_path / "bad" / "here").glob("*-*.json")).write_text(text)
        with pytest.raises(DataError, match=said):
            results.read(tmp_path / "bad")
    with pytest.raises(DataError, match="needs one line"):
        report.rewrite(ROOT / "LICENSE", [])
    options = ["--results", str(recorded), "--out", str(tmp_path / "page.html")]
    assert report.main([*options, "--machine", "mars"]) == 2
    assert "no machine 'mars'; there are ['here']" in capsys.readouterr().err
    assert report.main(["--results", str(tmp_path / "nowhere")]) == 2
    for out in (tmp_path / "no" / "page.html", tmp_path):
        assert report.main(["--results", str(recorded), "--out", str(out)]) == 2
        assert f"{out} must be a file in a folder" in capsys.readouterr().err


def test_a_missing_package_is_named(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    options = ["--results", str(recorded), "--out", str(tmp_path / "page.html")]
    assert report.main(options) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value,count,text",
    [
        (0.0, 3, "0"),
        (12345.6, 3, "12,346"),
        (1.2345, 3, "1.23"),
        (0.0123, 2, "0.012"),
        (7.21e-5, 2, "7.2×10⁻⁵"),
    ],
)
def test_digits(value: float, count: int, text: str) -> None:
    assert charts.digits(value, count) == text


def test_ticks_are_round_and_inside() -> None:
    assert charts.log_ticks(0.7, 21) == [1, 2, 5, 10, 20]
    assert charts.log_ticks(1e-7, 2e-2) == pytest.approx([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
