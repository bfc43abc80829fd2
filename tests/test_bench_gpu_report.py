"""What becomes of measured rows: the table the library reads, the verdicts, what is published."""

import copy
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from krrst_fast import measured
from krrst_fast.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
page = import_module("bench.gpu.report")
parts = import_module("bench.gpu.parts")
table = import_module("bench.gpu.table")

GPU = {"name": "NVIDIA H900", "architecture": "sm_90", "cuda": "13.0", "driver": "600.1"}
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "nvcc": "13.0", "python": "3.12"}
TIMES = {"p10": 0.9, "p90": 1.1, "calls": 20}


def told(ms: float, error: float) -> dict:
    return {"ms": ms, "error": error, **TIMES}


def part(kind: str, precision: str, size: list[int], **by: dict) -> dict:
    return {"part": kind, "precision": precision, "size": size, "told": by}


def krr_row(m: int, p: int, ms: float, *, error: float = 1e-3, graph: float = 1.0) -> dict:
    """The released formulation takes 10 ms, ours `ms`, fast but wrong 0.1 ms."""

    def way(time: float, wrong: float) -> dict:
        errors = {"loss": 1e-6, "f_syn": wrong, "y_syn": wrong / 2}
        times = {"times_released": 10.0 / time, "times_kept_eye": 8.0 / time, "peak_mb": 100.0}
        return {"ms": time, **TIMES, "error": errors, **times}

    ours = {
        "triton, fast, raise": way(ms, 5e-3) | {"error_rounded": {"f_syn": error}},
        "triton, fast, flag": way(2 * ms, 5e-3)
        | {"graph": {"ms": graph, **TIMES, "same_bits": True}},
        "torch, float32, raise": way(6.0, 1e-3),
        "cuda, float32, raise": way(0.1, 4e-3),
        "tuned, float32, raise": {"refused": "nothing was measured on sm_90"},
    }
    base = {"released": way(10.0, 1e-3), "released, identity on the device": way(8.0, 1e-3)}
    row = {"shape": {"m": m, "p": p, "d": 8192, "b": 1024}, "form": "w", "gflop": 70.0}
    return row | {"condition": 1e5, "released": base, "ours": ours, "wrong": []}


def results(**stages: dict) -> dict[str, dict]:
    """Files of stages that were measured on a GPU."""
    key = {"sources": "s", "gpu": GPU["name"], "sizes": "full"}
    whole = {"finished": True, "wrong": [], "date": "2030-05-06T07:08:09+00:00", "seconds": 3.0}
    about = {"commit": "c" * 40, "gpu": GPU, "versions": VERSIONS, **whole}
    return {
        name: {"stage": name, "key": dict(key), **about, "rows": rows}
        for name, rows in stages.items()
    }


MEASURED = results(
    parts={
        "a": part(
            *("gram", "fast", [1000, 8192]),
            torch=told(0.3, 1e-6),
            triton=told(0.1, 2.9e-6),
        ),
        "b": part(
            *("gram", "fast", [2000, 8192]),
            torch=told(0.9, 1e-6),
            triton=told(0.2, 3.1e-6),
        ),
        "c": part(
            *("solve", "float64", [256, 512]),
            torch=told(0.5, 1e-12),
            cuda={"failed": "left out: ended by SIGSEGV"},
        ),
        "d": part("views", "float32", [1024, 1024], torch={"failed": "out of memory"}),
        "e": {"failed": "out of memory"},
    },
    krr={
        "m 1000, p 512": krr_row(1000, 512, 2.5),
        "m 1000, p 10": krr_row(1000, 10, 1.0),
        "m 5000, p 100": krr_row(5000, 100, 1.0),
    },
)


def folder(path: Path, stages: dict[str, dict]) -> Path:
    for name, one in stages.items():
        (path / f"{name}.json").write_text(json.dumps(one))
    return path


def test_a_wrong_kernel_is_left_out_of_the_table() -> None:
    """Twice torch's error and 1e-6 of its own are allowed: 3e-6, here."""
    rows = MEASURED["parts"]["rows"]
    assert table.usable(rows["a"]) == ({"torch": 0.3, "triton": 0.1}, [])
    assert table.usable(rows["b"]) == ({"torch": 0.9}, ["triton: error 3.1e-06 > 3.0e-06"])
    assert table.usable(rows["c"])[1] == ["cuda: left out: ended by SIGSEGV"]
    assert table.usable(rows["d"]) == ({}, [])
    exact = part("solve", "float64", [9, 9], torch=told(1.0, 1e-14), cuda=told(1.0, 2e-12))
    assert table.usable(exact)[0] == {"torch": 1.0}, "the floor of float64 is its own"


def test_the_table_is_what_the_library_reads(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "measured.json"
    other = {"gpu": "another", "rows": [part("gram", "fast", [1, 1]) | {"ms": {"torch": 1.0}}]}
    path.write_text(json.dumps({"sm_80": other, "sm_90": other}))
    found = json.loads(table.merged(path, table.dispatch(MEASURED["parts"])))
    assert found["sm_80"] == other, "what was measured elsewhere stays"
    own = found["sm_90"]
    assert {name: own[name] for name in ("gpu", "date", "torch", "triton", "cuda", "command")} == {
        **{"gpu": "NVIDIA H900", "date": "2030-05-06", "torch": "2.11.0", "triton": "3.6.0"},
        **{"cuda": "13.0", "command": "bench/gpu.sh"},
    }
    assert own["rows"] == [
        {
            **{"part": "gram", "precision": "fast", "size": [1000, 8192]},
            "ms": {"torch": 0.3, "triton": 0.1},
        },
        {"part": "gram", "precision": "fast", "size": [2000, 8192], "ms": {"torch": 0.9}},
        {"part": "solve", "precision": "float64", "size": [256, 512], "ms": {"torch": 0.5}},
    ]
    monkeypatch.setattr(measured, "tables", lambda: found)
    measured.choice.cache_clear()
    try:
        chosen = [measured.choice("sm_90", "gram", "fast", (n, 8192)).name for n in (1000, 2000)]
    finally:
        measured.choice.cache_clear()
    assert chosen == ["triton", "torch"]


def test_every_part_has_the_sizes_and_implementations_that_the_library_asks_for() -> None:
    two = ("torch", "triton")
    solvers = ("torch", "torch inverse", "cuda", "cuda inverse")
    known = {
        **{name: (3, two) for name in ("matmul", "matmul_t", "mse", "closing")},
        **{"gram": (2, two), "views": (2, two), "solve": (2, solvers)},
        "solve_many": (3, solvers),
    }
    assert set(parts.FULL) == set(parts.TOY) == set(known)
    for name, (numbers, who) in known.items():
        assert f"| {', '.join(who)} |" in measured.__doc__ and name in measured.__doc__
        for one in (parts.FULL[name], parts.TOY[name]):
            assert {len(size) for sizes in one.sizes.values() for size in sizes} == {numbers}
        for precision, (size, *_) in parts.TOY[name].sizes.items():
            work = one.make(size, precision, "cpu")
            assert {*work.calls, *work.refused} == set(who), name


def test_the_best_is_the_fastest_that_is_about_as_right() -> None:
    assert table.best(krr_row(1000, 512, 2.5)) == "triton, fast, raise"
    # The error on rounded features counts where features were rounded; 2.1e-3 is too much.
    assert table.best(krr_row(1000, 512, 2.5, error=2.1e-3)) == "torch, float32, raise"
    assert table.worst({"loss": 1e-3, "f_syn": "holds NaN"}) == float("inf")


def test_targets_are_met_or_missed() -> None:
    assert page.verdict(krr_row(1000, 512, 2.0)) == ("5", "met")
    assert page.verdict(krr_row(1000, 512, 2.01)) == ("5", "missed")
    assert page.verdict(krr_row(5000, 100, 1.0)) == ("-", "-")


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    text = page.write(folder(tmp_path, MEASURED))
    assert text.startswith("# NVIDIA H900\n") and text == (tmp_path / "gpu.md").read_text()
    lines = text.splitlines()
    assert any("driver 600.1" in line and "commit cccccccc" in line for line in lines)
    first = next(line for line in lines if line.startswith("| 1000 | 512 |"))
    assert [cell.strip() for cell in first.split("|")[3:-1]] == [
        *("10.0 (0.900-1.10)", "2.50 (0.900-1.10)", "triton, fast, raise", "**4.0** (3.2)", "10"),
        *("1.0e-3", "5.0e-3", "100, 100", "5", "missed"),
    ]
    assert (
        "| gram | fast | 2000x8192 | torch 0.900 (1e-06), triton 0.200 (3e-06) | torch |" in lines
    )
    assert "Refused: nothing was measured on sm_90" in lines


def test_the_commit_of_a_copy_without_history_is_that_of_the_same_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = copy.deepcopy(MEASURED)
    for one in stages.values():
        one["commit"] = None
    folder(tmp_path, stages)
    monkeypatch.setattr(page.machine, "commit", lambda: "d" * 40)
    monkeypatch.setattr(page.machine, "sources", lambda: "others")
    assert "commit unknown, sources s" in page.write(tmp_path)
    monkeypatch.setattr(page.machine, "sources", lambda: "s")
    assert "commit dddddddd, sources s" in page.write(tmp_path)


def published(tmp_path: Path, stages: dict[str, dict]) -> tuple[list[Path], Path]:
    root = tmp_path / "root"
    (root / "krrst_fast").mkdir(parents=True)
    (root / "krrst_fast" / "measured.json").write_text("{}")
    (root / "README.md").write_text(f"before\n\n{page.BEGIN}\n\nold\n\n{page.END}\n\nafter\n")
    (tmp_path / "out").mkdir()
    return page.publish(folder(tmp_path / "out", stages), root), root


def test_what_was_measured_is_published(tmp_path: Path) -> None:
    paths, root = published(tmp_path, MEASURED)
    assert [path.relative_to(root).as_posix() for path in paths] == [
        *("README.md", "docs/results/h900.md", "krrst_fast/measured.json")
    ]
    readme = paths[0].read_text()
    assert readme.startswith("before\n") and readme.endswith(f"{page.END}\n\nafter\n")
    assert "old" not in readme and "| 1000 | 10 |" in readme and "`bench/gpu.sh`." in readme
    assert len(json.loads(paths[2].read_text())["sm_90"]["rows"]) == 3
    text = (ROOT / "README.md").read_text()
    assert text.count(page.BEGIN) == text.count(page.END) == 1, "there is a place for the table"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda found: found["krr"]["key"].update(sizes="toy"), "not measured on the same"),
        (lambda found: [x["key"].update(sizes="toy") for x in found.values()], "a dry run"),
        (lambda found: found["krr"].update(finished=False), "nothing to publish without krr"),
        (lambda found: found.pop("parts"), "nothing to publish without parts"),
        (lambda found: found.clear(), "holds no results"),
    ],
)
def test_nothing_else_is_published(tmp_path: Path, change, told: str) -> None:
    found = copy.deepcopy(MEASURED)
    change(found)
    with pytest.raises(DataError, match=told):
        published(tmp_path, found)
    root = tmp_path / "root"
    assert "old" in (root / "README.md").read_text() and not (root / "docs").exists()
    assert (root / "krrst_fast" / "measured.json").read_text() == "{}"


def test_a_page_of_what_failed_is_still_a_page(tmp_path: Path) -> None:
    stages = results(
        krr={"m 1000, p 512": {"failed": "out of memory"}},
        step={"krrst_fast": {"failed": "x"}, "released": {"parts": {"views": 1.0}}},
        steps={"the target at every step": {"failed": "the loss is nan"}},
        ceilings={"copy": {"failed": "x"}, "system 9 float32": {"potrf": {"failed": "y"}}},
        parts={"a": {"failed": "z"}},
    )
    stages["krr"] |= {"finished": False, "wrong": ["a|b"] * 7}
    text = page.write(folder(tmp_path, stages))
    assert "| krr | not finished | 1 | 3.0 | a/b; a/b; a/b; a/b; a/b; and 2 more |" in text
    assert "| the target at every step | the loss is nan |" in text
    assert "| views | 1.00 | - |" in text
