"""What becomes of measured rows: the page, the short table, the verdicts, what is published."""

import copy
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from krrst_fast.backends import tuned
from krrst_fast.errors import DataError
from krrst_fast.reference.kernels import OF_PRODUCTS

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
page = import_module("bench.gpu.report")
parts = import_module("bench.gpu.parts")
results = import_module("bench.gpu.results")
table = import_module("bench.gpu.table")

MACHINE = {
    "gpu": "NVIDIA H900",
    "about": {"name": "NVIDIA H900", "architecture": "sm_90", "cuda": "13.0", "driver": "600.1"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "nvcc": "13.0", "python": "3.12"},
    **{"sizes": "full", "sources": "new", "commit": "c" * 40},
}
ABOUT = {"date": "2030-05-06T07:08:09+00:00", "sources": "new"}
TIMES = {"p10": 0.9, "p90": 1.1, "calls": 20, **ABOUT}


def part(kind: str, precision: str, size: list[int], name: str, **row) -> dict:
    label = f"{kind} {precision} {'x'.join(map(str, size))}: {name}"
    return {label: {"part": kind, "precision": precision, "size": size, **TIMES, **row}}


def krr(m: int, p: int, *, eager: float, graph: float | None, other: float = 6.0) -> dict:
    """The released formulation takes 10 ms, "cuda, fast" `eager` and `graph`, a wrong way 0.1."""

    def way(ms: float, error: float, **row) -> dict:
        errors = {"loss": 1e-6, "f_syn": error, "y_syn": error / 2}
        return {"ms": ms, **TIMES, "error": errors, "peak_mb": 100.0, **row}

    label = f"m {m}, p {p}: "
    about = {"shape": {"m": m, "p": p, "d": 8192, "b": 1024}, "form": "w", "gflop": 70.0}
    rows = {
        "released": way(10.0, 1e-3) | about,
        "released, identity on the device": way(8.0, 1e-3) | about,
        "cuda, fast": way(eager, 5e-3, released_ms=10.0, error_rounded={"f_syn": 1e-3}),
        "torch, float32": way(other, 1e-3, released_ms=10.0),
        "triton, fast": way(0.1, 4e-2, released_ms=10.0, wrong=["error 4e-2 > 2e-3"]),
        "cuda, float32": {"refused": "no CUDA extension", **ABOUT},
        "torch, float32, as a graph": {"failed": "RuntimeError: not permitted", **ABOUT},
        "cuda, fast, kernels": {
            **{"kernel_ms": 0.5, "elapsed_ms": 2.0, "launches": 40.0, **ABOUT},
            "largest": [{"name": "_parts|kernel", "launches": 2.0, "ms": 0.25}],
        },
    }
    if graph is not None:
        rows["cuda, fast, as a graph"] = {"ms": graph, **TIMES, "same_bits": True}
    return {label + name: row for name, row in rows.items()}


def stage(*rows: dict, finished: bool = True) -> dict:
    one = {name: row for some in rows for name, row in some.items()}
    return {"seconds": 3.0, "finished": finished, "why": "", "sources": "new", "rows": one}


STAGES = {
    "krr": stage(
        krr(1000, 512, eager=2.5, graph=1.9),
        krr(1000, 10, eager=1.0, graph=2.0),
        krr(10000, 512, eager=1.2, graph=None),
        krr(5000, 100, eager=1.0, graph=0.5),
    ),
    "parts": stage(
        part("gram", "fast", [1000, 8192], "torch", ms=0.3, error=1e-6),
        part("gram", "fast", [1000, 8192], "triton", ms=0.1, error=2.9e-6, eager_ms=0.2),
        part("gram", "fast", [2000, 8192], "torch", ms=0.9, error=1e-6),
        part("gram", "fast", [2000, 8192], "triton", ms=0.2, error=3.1e-6, wrong=["error"]),
        part("solve", "float64", [256, 512], "torch", ms=0.5, error=1e-12),
        {"solve float64 256x512: cuda": {"failed": "its process ended by SIGSEGV", **ABOUT}},
        {"views float32 1024x1024: torch": {"refused": "out of memory", **ABOUT}},
        part("closing", "float32", [10, 9, 8], "triton", ms=0.5, error=1e-7),
    ),
    "step": stage(
        {"krrst_fast": {"failed": "x", **ABOUT}, "released": {"parts": {"views": 1.0}, **ABOUT}},
    ),
    "tests": stage({"tests": {"outcomes": {"passed": 400, "failed": 1}, "wrong": ["a"], **ABOUT}}),
}


def folder(path: Path, stages: dict = STAGES, machine: dict = MACHINE):
    (path / "gpu.json").write_text(json.dumps({"machine": machine, "stages": stages}))
    return results.Results(path)


def shape(tmp_path: Path, **numbers) -> object:
    return page.shapes(folder(tmp_path, {"krr": stage(krr(1000, 512, **numbers))}))[0]


def test_the_graph_is_what_is_judged(tmp_path: Path) -> None:
    """Where there is one: 5 times as fast is the goal at (1000, 512), and 2 ms of 10."""
    found = shape(tmp_path, eager=9.0, graph=2.0)
    assert found.verdict == ("5x", "met") and found.best.name == "cuda, fast"
    assert shape(tmp_path, eager=1.0, graph=2.01).verdict == ("5x", "missed")
    assert shape(tmp_path, eager=2.0, graph=None).verdict == ("5x", "met (no graph)")
    assert shape(tmp_path, eager=2.1, graph=None).verdict == ("5x", "missed (no graph)")
    none = page.shapes(folder(tmp_path, {"krr": stage(krr(5000, 100, eager=1.0, graph=0.1))}))[0]
    assert none.verdict == ("-", "-")


def test_the_best_way_is_the_fastest_that_is_right(tmp_path: Path) -> None:
    """A wrong way is never it, nor one whose graph gives other bits than a call."""
    assert shape(tmp_path, eager=2.0, graph=1.0, other=1.5).best.name == "cuda, fast"
    assert shape(tmp_path, eager=2.0, graph=1.6, other=1.5).best.name == "torch, float32", (
        "that it cannot be captured makes no call of it wrong"
    )
    rows = krr(1000, 512, eager=2.0, graph=1.0)
    rows["m 1000, p 512: cuda, fast, as a graph"]["wrong"] = ["a call differs by 1.0e-1"]
    del rows["m 1000, p 512: torch, float32, as a graph"]
    assert page.shapes(folder(tmp_path, {"krr": stage(rows)}))[0].best.name == "torch, float32"


def test_a_graph_of_other_code_is_not_that_of_the_way(tmp_path: Path) -> None:
    """A kernel that was wrong and is mended has no time that it had before."""
    rows = krr(1000, 512, eager=2.5, graph=0.5)
    rows["m 1000, p 512: cuda, fast, as a graph"]["sources"] = "old"
    found = page.shapes(folder(tmp_path, {"krr": stage(rows)}))[0]
    assert found.best.ms == 2.5 and found.verdict == ("5x", "missed (no graph)")


def test_where_one_has_no_graph_calls_are_compared_with_calls(tmp_path: Path) -> None:
    rows = part("solve", "float32", [1000, 10], "torch", ms=0.5, no_graph="refused")
    rows |= part("solve", "float32", [1000, 10], "cuda", ms=0.2, eager_ms=0.6)
    found = table.dispatch(folder(tmp_path, {"parts": stage(rows)}))["sm_90"]["rows"]
    assert [row["ms"] for row in found] == [{"torch": 0.5, "cuda": 0.6}]


def test_the_short_table_has_what_matters_in_few_characters(tmp_path: Path) -> None:
    text = page.short(folder(tmp_path))
    assert len(text) <= page.LONGEST
    lines = text.splitlines()
    assert any(
        x.startswith("| 1000 | 512 | 10.0") and "**5.26** (4.00) | 5.0e-3 | 5x met" in x
        for x in lines
    )
    assert any(x.startswith("| 10000 | 512 |") and "10x missed (no graph)" in x for x in lines)
    assert "tests: 400 passed, 1 failed" in lines
    assert lines[-1] == f"files: {tmp_path / 'gpu.json'}, {tmp_path / 'gpu.md'}"
    many = copy.deepcopy(STAGES)
    for name in results.STAGES:
        rows = {f"row {i}": {"failed": "x" * 500, **ABOUT} for i in range(50)}
        many.setdefault(name, stage())["rows"].update(rows)
    text = page.short(folder(tmp_path, many))
    assert len(text) <= page.LONGEST and text.rstrip().endswith("gpu.md")
    assert "| 1000 | 512 | 10.0" in text


def test_no_path_of_a_machine_is_on_a_page(tmp_path: Path) -> None:
    log = "/opt/gcc/bin/g++ -O2 /home/me/a/x.o -L/usr/lib/y -lc10 -o /home/me/b/_C.so docs/a/b 1/2"
    rows = {"build": {"last line": log, "library": "/home/me/site/_C.so", **ABOUT}}
    page.write_page(folder(tmp_path, {"build": stage(rows)}))
    text = (tmp_path / "gpu.md").read_text()
    assert "g++ -O2 x.o -Ly -lc10 -o _C.so docs/a/b 1/2 |" in text and "| _C.so |" in text
    assert not any(part in text for part in ("/opt", "/home", "/usr"))


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    found = folder(tmp_path)
    page.write_page(found)
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("# NVIDIA H900\n")
    lines = text.splitlines()
    code = "sources new, 2030-05-06"
    assert f"NVIDIA H900, torch 2.11.0, triton 3.6.0, {code}: `bench/gpu.sh`." in lines
    assert "The newest rows: driver 600.1, CUDA 13.0, nvcc 13.0, sources new." in lines
    assert lines.count(f"Measured with {code}.") == len(STAGES)
    first = next(line for line in lines if line.startswith("| 1000 | 512 |"))
    assert [cell.strip() for cell in first.split("|")[3:-1]] == [
        *("10.0 (0.900-1.10)", "1.0e-3"),
        *("- (6.00)", "**1.67** (1.67)", "1.0e-3"),
        *("1.90 (2.50)", "**5.26** (4.00)", "5.0e-3", "5x met"),
    ]
    kernels = next(
        line for line in lines if line.startswith("| m 1000, p 512: cuda, fast, kernels")
    )
    assert "| 0.500 | 2.00 | 40.0 |" in kernels, "host-bound is seen at a glance"
    assert "| `_parts/kernel` | 2 | 0.250 |" in lines and "no CUDA extension" in text
    gram = next(line for line in lines if line.startswith("| gram fast 1000x8192: triton |"))
    assert "| 0.100 (0.900-1.10) |" in gram and "| 0.200 |" in gram, "eager too"
    assert "| released | - | 1.00 |" in lines


def test_rows_of_older_code_are_named(tmp_path: Path) -> None:
    stages = copy.deepcopy(STAGES)
    stages["parts"]["rows"]["gram fast 1000x8192: torch"]["sources"] = "old"
    text = "\n".join(page.page(folder(tmp_path, stages)))
    assert "| parts | finished | 8 | 3.0 | old (1), new (7) |" in text


def test_a_table_names_the_code_and_the_day_of_the_rows_that_it_shows(tmp_path: Path) -> None:
    """Not those of the stage that was measured last, nor of rows that are not in it."""
    stages, old = copy.deepcopy(STAGES), {"sources": "old", "date": "2030-04-01T00:00:00+00:00"}
    for name, row in stages["krr"]["rows"].items():
        if name.startswith("m 1000, p 10:") or "triton" in name or "kernels" in name:
            row |= old
    paths, _ = published(tmp_path, stages, MACHINE | {"sources": "newest"})
    # Of each shape released, torch in float32, "cuda, fast", and its graph where there is one.
    each = "sources new (11 rows, 2030-05-06), old (4 rows, 2030-04-01)"
    line = f"NVIDIA H900, torch 2.11.0, triton 3.6.0, {each}: `bench/gpu.sh`."
    lines = [path.read_text().splitlines() for path in paths[:2]]
    assert all(line in one for one in lines)
    whole = "sources new (20 rows, 2030-05-06), old (15 rows, 2030-04-01)"
    assert f"Measured with {whole}." in lines[1] and "newest" not in "".join(lines[0])
    for row in stages["krr"]["rows"].values():
        row |= old
    found = folder(tmp_path, stages, MACHINE | {"sources": "newest"})
    assert ", sources old, 2030-04-01: `bench" in page.under(found)
    stages["parts"]["rows"]["gram fast 1000x8192: torch"] |= old
    found = table.dispatch(folder(tmp_path, stages))["sm_90"]
    assert found["date"] == "2030-04-01 to 2030-05-06"


def test_the_table_is_what_the_library_reads(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "measured.json"
    other = {"gpu": "another", "rows": []}
    path.write_text(json.dumps({"sm_80": other, "sm_90": other}))
    found = json.loads(table.merged(path, table.dispatch(folder(tmp_path))))
    assert found["sm_80"] == other, "what was measured elsewhere stays"
    own = found["sm_90"]
    assert {name: own[name] for name in ("gpu", "date", "torch", "triton", "cuda", "command")} == {
        **{"gpu": "NVIDIA H900", "date": "2030-05-06", "torch": "2.11.0", "triton": "3.6.0"},
        **{"cuda": "13.0", "command": "bench/gpu.sh"},
    }
    about = {"part": "gram", "precision": "fast"}
    assert own["rows"] == [
        {**about, "size": [1000, 8192], "ms": {"torch": 0.3, "triton": 0.1}},
        {**about, "size": [2000, 8192], "ms": {"torch": 0.9}},
        {"part": "solve", "precision": "float64", "size": [256, 512], "ms": {"torch": 0.5}},
    ], "what is wrong, and what torch has no time for, is left out"
    monkeypatch.setattr(tuned, "tables", lambda: found)
    tuned.nearest.cache_clear()
    try:
        chosen = [tuned.nearest("sm_90", "gram", "fast", (n, 8192)).name for n in (1000, 2000)]
    finally:
        tuned.nearest.cache_clear()
    assert chosen == ["triton", "torch"]


def test_every_part_has_the_sizes_and_implementations_that_the_library_asks_for() -> None:
    numbers = {name: 3 for name in ("matmul", "matmul_t", "mse", "closing", "solve_many")}
    numbers |= {name: 2 for name in ("gram", "views", "solve")}
    numbers |= {f"{name}_{what}": 2 for name in OF_PRODUCTS for what in ("values", "slopes")}
    assert set(parts.FULL) == set(parts.TOY) == set(parts.IMPLEMENTATIONS) == set(numbers)
    for name, implementations in parts.IMPLEMENTATIONS.items():
        assert f"| {', '.join(implementations)} |" in tuned.__doc__ and name in tuned.__doc__
        for one in (parts.FULL[name], parts.TOY[name]):
            assert {len(s) for sizes in one.sizes.values() for s in sizes} == {numbers[name]}
        for precision, (size, *_) in parts.TOY[name].sizes.items():
            work = one.make(size, precision, "cpu")
            assert {*work.calls, *work.refused} == set(implementations), name


def published(tmp_path: Path, stages: dict, machine: dict = MACHINE) -> tuple[list[Path], Path]:
    root = tmp_path / "root"
    (root / "krrst_fast" / "backends").mkdir(parents=True)
    (root / "krrst_fast" / "backends" / "tuned.json").write_text("{}")
    (root / "README.md").write_text(f"before\n\n{page.BEGIN}\n\nold\n\n{page.END}\n\nafter\n")
    return page.publish(folder(tmp_path, stages, machine), root), root


def test_what_was_measured_is_published(tmp_path: Path) -> None:
    paths, root = published(tmp_path, STAGES)
    assert [path.relative_to(root).as_posix() for path in paths] == [
        *("README.md", "docs/results/h900.md", "krrst_fast/backends/tuned.json")
    ]
    readme = paths[0].read_text()
    assert readme.startswith("before\n") and readme.endswith(f"{page.END}\n\nafter\n")
    assert "old" not in readme and "| 1000 | 10 |" in readme and "`bench/gpu.sh`." in readme
    assert len(json.loads(paths[2].read_text())["sm_90"]["rows"]) == 3
    text = (ROOT / "README.md").read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1, "there is a place for the table"


@pytest.mark.parametrize(
    "stages, machine, told",
    [
        (STAGES, {"sizes": "toy"}, "a dry run"),
        (STAGES, {"gpu": None}, "a dry run"),
        ({"parts": STAGES["parts"]}, {}, "no row of the KRR table is right"),
        ({}, {}, "no row of the KRR table is right"),
    ],
)
def test_nothing_else_is_published(tmp_path: Path, stages, machine: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        published(tmp_path, stages, MACHINE | machine)
    root = tmp_path / "root"
    assert "old" in (root / "README.md").read_text() and not (root / "docs").exists()
    assert (root / "krrst_fast" / "backends" / "tuned.json").read_text() == "{}"


def test_without_parts_the_choice_of_kernels_stays(tmp_path: Path) -> None:
    paths, root = published(tmp_path, {"krr": STAGES["krr"]})
    assert len(paths) == 2 and (root / "krrst_fast" / "backends" / "tuned.json").read_text() == "{}"


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def code(stages: dict, *options: str) -> int:
        folder(tmp_path, stages)
        return page.main(["--out", str(tmp_path), *options])

    assert code(STAGES) == 1, "something is wrong"
    assert code({"krr": stage(finished=False)}) == 1, "something is left to do"
    right = stage(part("gram", "fast", [1, 2], "torch", ms=1.0, error=0.0))
    assert code({"parts": right}) == 0
    capsys.readouterr()
    assert code({}, "--publish") == 2
    assert capsys.readouterr().err.count("\n") == 1
