"""How the rows of a GPU run are made and kept: by processes that die, hang, or run out of time."""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))
measure = import_module("bench.gpu.measure")
record = import_module("bench.gpu.record")
results = import_module("bench.gpu.results")

# Children of a test process, which may have threads: theirs are rows of plain Python.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

ABOUT = {"name": "NVIDIA H900", "architecture": "sm_90", "driver": "600.1", "cuda": "13.0"}
MACHINE = {
    **{"gpu": "NVIDIA H900", "about": ABOUT, "commit": None},
    **{"versions": {"torch": "2.11.0", "triton": "3.6.0", "nvcc": "13.0"}},
    **{"sizes": "full", "sources": "old"},
}


class Clock:
    """A device that computes, or does not any more."""

    spoilt = False

    def wait(self) -> None:
        if getattr(self, "lost", False):
            raise RuntimeError("an illegal memory access was encountered")

    free = wait
    require_device = measure.Clock.require_device


@pytest.fixture
def kept(tmp_path: Path):
    return results.Results.begin(tmp_path, MACHINE)


def carried_out(kept, rows, seconds: float = 20.0) -> bool:
    """Make the rows that `rows(run)` yields; each call also says in a file that it was made."""
    made = measure.Run("krr", "cpu", True, None, Clock(), lambda name: kept.rows("krr").get(name))
    kept.begin_stage("krr")
    unit = measure.Unit("m 1", rows)
    return measure.carry_out("krr", unit, lambda: made, kept, time.monotonic() + seconds)


def on_disk(kept) -> dict:
    return {
        name: {k: v for k, v in row.items() if k not in ("date", "sources")}
        for name, row in results.Results(kept.path.parent).rows("krr").items()
    }


def test_rows_are_kept_one_by_one_and_not_made_again(kept) -> None:
    def rows(run):
        for name in "abc":
            yield name, lambda: {"ms": float(os.getpid())}

    assert carried_out(kept, rows)
    first = on_disk(kept)
    assert list(first) == ["a", "b", "c"] and len({row["ms"] for row in first.values()}) == 1
    assert carried_out(kept, rows) and on_disk(kept) == first


def test_a_row_that_takes_its_process_with_it_costs_only_itself(kept) -> None:
    def rows(run):
        yield "first", lambda: {"ms": 1.0}
        yield "crash", lambda: os.kill(os.getpid(), signal.SIGKILL)
        yield "exit", lambda: os._exit(3)
        yield "last", lambda: {"ms": 2.0}

    assert carried_out(kept, rows)
    assert on_disk(kept) == {
        "first": {"ms": 1.0},
        "crash": {"failed": "its process ended by SIGKILL"},
        "exit": {"failed": "its process ended by exit code 3"},
        "last": {"ms": 2.0},
    }


def test_a_time_limit_is_no_blame_and_the_next_call_goes_on(kept) -> None:
    """It was: a row that was begun late and cut by the limit was left out for good."""
    pause = [60.0]

    def rows(run):
        yield "first", lambda: {"ms": 1.0}
        yield "slow", lambda: time.sleep(pause[0]) or {"ms": 2.0}
        yield "last", lambda: {"ms": 3.0}

    begin = time.monotonic()
    assert not carried_out(kept, rows, seconds=1.5) and time.monotonic() - begin < 20
    assert on_disk(kept) == {"first": {"ms": 1.0}}
    assert not carried_out(kept, rows, seconds=0.0), "nothing begins when the time is over"
    pause[0] = 0.0
    assert carried_out(kept, rows)
    assert on_disk(kept) == {"first": {"ms": 1.0}, "slow": {"ms": 2.0}, "last": {"ms": 3.0}}


def test_a_row_that_hangs_fails_and_the_next_is_made(kept, monkeypatch) -> None:
    monkeypatch.setattr(measure, "SILENCE", 0.5)

    def rows(run):
        yield "hangs", lambda: time.sleep(60)
        yield "last", lambda: {"ms": 3.0}

    assert carried_out(kept, rows)
    assert on_disk(kept) == {"hangs": {"failed": "took longer than 0.5 s"}, "last": {"ms": 3.0}}


def test_a_process_that_a_failed_capture_has_spoilt_makes_no_more_rows(kept) -> None:
    """It was: all graphs of the same row, and all rows behind it, were lost."""

    def rows(run):
        def spoils():
            run.clock.spoilt = True
            return {"failed": "capture", "process": os.getpid()}

        yield "first", lambda: {"process": os.getpid()}
        yield "graph", spoils
        yield "next", lambda: {"process": os.getpid()}

    assert carried_out(kept, rows)
    made = on_disk(kept)
    assert made["first"]["process"] == made["graph"]["process"] != made["next"]["process"]


def test_a_lost_device_costs_one_row(kept) -> None:
    def rows(run):
        def lost():
            run.clock.lost = True
            raise RuntimeError("an illegal memory access was encountered")

        yield "wild", lost
        yield "next", lambda: {"ms": 1.0}
        yield "wrong", lambda: 1 / 0

    assert carried_out(kept, rows)
    assert on_disk(kept) == {
        "wild": {"failed": "RuntimeError: an illegal memory access was encountered"},
        "next": {"ms": 1.0},
        "wrong": {"failed": "ZeroDivisionError: division by zero"},
    }


def test_a_unit_whose_process_never_starts_ends(kept) -> None:
    def rows(run):
        raise RuntimeError("no driver")

    assert carried_out(kept, rows)
    assert on_disk(kept) == {"m 1": {"failed": "its process ended by exit code 1"}}
    assert carried_out(kept, lambda run: [("a", lambda: {"ms": 1.0})])
    assert on_disk(kept) == {"a": {"ms": 1.0}}, "what it failed by is gone once it works"


def test_a_row_sees_those_before_it(kept) -> None:
    def rows(run):
        yield "a", lambda: {"ms": 2.0}
        yield "b", lambda: {"twice": 2 * run.row("a")["ms"]}

    assert carried_out(kept, rows)
    assert on_disk(kept)["b"] == {"twice": 4.0}


def test_repaired_code_throws_nothing_away(tmp_path: Path) -> None:
    """It was: any repair began all stages anew, and no report could be made of old and new rows."""
    kept = results.Results.begin(tmp_path, MACHINE)
    for stage in ("krr", "tests"):
        kept.add(stage, "right", {"ms": 1.0})
        kept.end(stage, finished=True)
    kept.add("krr", "broken", {"failed": "a shape"})
    assert kept.done("krr") and kept.done("tests") and kept.settled("krr", "broken")

    kept = results.Results.begin(tmp_path, {**MACHINE, "sources": "new"})
    assert kept.settled("krr", "right") and not kept.settled("krr", "broken")
    assert not kept.done("krr"), "what failed is tried again with repaired code"
    assert not kept.done("tests"), "tests of other code say nothing"
    kept.add("krr", "broken", {"ms": 2.0})
    kept.end("krr", finished=True)
    again = results.Results(tmp_path)
    assert again.done("krr")
    digests = {name: row["sources"] for name, row in again.rows("krr").items()}
    assert digests == {"right": "old", "broken": "new"}


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA A100"},
        {"sizes": "toy"},
        {"versions": {"torch": "2.12.0", "triton": "3.6.0"}},
    ],
    ids=str,
)
def test_results_of_another_machine_are_put_aside(kept, change: dict) -> None:
    """Whoever gets another GPU the second time has its results all the same."""
    kept.add("krr", "a", {"ms": 1.0})
    before, other = kept.path.read_text(), {**MACHINE, **change}
    found = results.Results.begin(kept.path.parent, other)
    assert found.machine == other and found.stages == {}
    assert (kept.path.parent / "gpu-before.json").read_text() == before


def test_what_was_refused_is_asked_again_and_a_failed_build_is_not_done(kept) -> None:
    kept.add("krr", "cuda, fast", {"refused": "no CUDA extension"})
    kept.add("build", "build", {"wrong": ["it does not build"]})
    for stage in ("krr", "build"):
        kept.end(stage, finished=True)
    assert not kept.settled("krr", "cuda, fast")
    assert kept.done("krr") and not kept.done("build")
    assert not results.Results.begin(kept.path.parent, {**MACHINE, "sources": "new"}).done("krr")


def test_a_stage_that_was_cut_in_the_middle_has_its_line(kept) -> None:
    """It was: a report after a kill ended with a KeyError in place of the table."""
    kept.begin_stage("krr")
    kept.save()
    found = results.Results(kept.path.parent)
    assert "krr       NOT FINISHED, 0 rows" in record.report.short(found)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": 1}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "gpu.json").write_text(text)
    with pytest.raises(results.DataError, match="holds no results"):
        results.Results.begin(tmp_path, MACHINE)


def recorded(kept, *arguments: object, log: str = "", part: str = "") -> tuple[int, dict]:
    folder, stage = kept.path.parent, arguments[0]
    (folder / f"{part or stage}.log").write_text(log)
    where = ["--out", str(folder), "--work", str(folder), *(["--part", part] if part else [])]
    code = record.main([*map(str, arguments), *where])
    return code, results.Results(folder).stages[stage]


def test_tests_that_were_cut_count_as_far_as_they_came(kept) -> None:
    """As pytest says it alone, and as it says it with several processes, one of which crashed."""
    alone = """collected 12 items / 7 deselected / 5 selected

tests/test_a.py::test_one[gpu] PASSED                    [ 20%]
tests/test_a.py::test_two[3-a b] FAILED                  [ 40%]
tests/test_b.py::test_three SKIPPED (no triton)          [ 60%]
ERROR tests/test_c.py - ModuleNotFoundError: No module named 'x'
"""
    code, stage = recorded(kept, "tests", 124, 150, log=alone)
    row = stage["rows"]["tests"]
    assert code == 75 and not stage["finished"] and stage["seconds"] == 150
    assert row["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert row["wrong"] == ["tests/test_a.py::test_two[3-a b]", "tests/test_c.py"]
    workers = """tests/test_a.py::test_one
[gw3] [ 10%] PASSED tests/test_a.py::test_one
[gw0] [ 20%] SKIPPED tests/test_a.py::test_two[x y]
[gw1] node down: Not properly terminated
[gw1] [ 30%] FAILED tests/test_b.py::test_three
replacing crashed worker gw1
[gw4] [100%] PASSED tests/test_b.py::test_four
FAILED tests/test_b.py::test_three
"""
    code, stage = recorded(kept, "tests", 1, 20, log=workers)
    row = stage["rows"]["tests"]
    assert code == 1 and stage["finished"] and row["wrong"] == ["tests/test_b.py::test_three"]
    assert row["outcomes"] == {"passed": 2, "skipped": 1, "failed": 1}
    assert recorded(kept, "tests", 3, 1)[1]["rows"]["tests"]["wrong"] == [
        "pytest ended with exit code 3"
    ]


def test_a_self_test_that_was_cut_counts_as_far_as_it_came(kept) -> None:
    checks = [
        {"check": "gram", "backend": "torch", "ok": True},
        {"check": "krr_mse, form k", "backend": "cuda", "ok": False},
    ]
    told = {"machine": {}, "choices": ["a"], "checks": checks, "failed": 1, "finished": False}
    (kept.path.parent / "selftest.json").write_text(json.dumps(told))
    code, stage = recorded(kept, "selftest", 124, 60)
    row = stage["rows"]["selftest"]
    assert code == 75 and row["checks"] == 2 and row["wrong"] == ["krr_mse, form k, cuda"]
    row = recorded(kept, "selftest", -11, 60)[1]["rows"]["selftest"]
    assert row["wrong"][-1] == "it ended before its last check, with exit code -11"
    (kept.path.parent / "selftest.json").unlink()
    code, stage = recorded(kept, "selftest", 75, 0)
    assert code == 75 and not stage["finished"], "it was not begun"
    assert recorded(kept, "selftest", -9, 60)[1]["rows"]["selftest"]["wrong"] == [
        "exit code -9: no result"
    ]


def test_a_build_that_fails_and_tools_that_find_something_are_wrong(kept) -> None:
    assert recorded(kept, "build", 1, 5, log="error: x")[0] == 1
    code, stage = recorded(kept, "build", 0, 5, log="a warning: b")
    assert code == 0 and stage["rows"]["build"]["last line"] == "a warning: b"
    code, stage = recorded(kept, "build", 1, 0, log="x\n5 of 6 kernels", part="kernels")
    assert stage["rows"]["kernels"]["wrong"] == ["exit code 1: 5 of 6 kernels"]
    found = "15 calls\n" + "=" * 9 + " RACECHECK SUMMARY: 2 hazards\n"
    code, stage = recorded(kept, "sanitizer", 99, 9, log=found, part="racecheck")
    assert code == 1 and stage["rows"]["racecheck"]["last line"].endswith("2 hazards")
    code, stage = recorded(kept, "sanitizer", 124, 9, part="memcheck")
    assert code == 75 and stage["rows"]["racecheck"]["wrong"], "the races stay"
    code, stage = recorded(kept, "sanitizer", 0, 9, log="refused: none here", part="memcheck")
    assert stage["rows"]["memcheck"]["refused"] == "none here" and stage["finished"]
    recorded(kept, "sanitizer", 124, 9, part="racecheck")
    _, stage = recorded(kept, "sanitizer", 0, 9, part="memcheck")
    assert not stage["finished"], "the other tool was cut"


def test_a_stage_that_measures_has_its_rows_already(kept) -> None:
    kept.add("parts", "gram", {"ms": 1.0})
    code, stage = recorded(kept, "parts", 75, 120)
    assert code == 75 and list(stage["rows"]) == ["gram"] and not stage["finished"]
    code, stage = recorded(kept, "parts", 0, 7)
    assert code == 0 and stage["finished"] and stage["seconds"] == 127
    code, stage = recorded(kept, "parts", 1, 7)
    assert code == 1 and stage["rows"]["the stage"]["failed"] == "exit code 1"
    assert recorded(kept, "parts", 0, 7)[0] == 0, "what it failed by is gone once it works"


def test_a_call_that_fails_says_why_in_one_line() -> None:
    error = SimpleNamespace(wait=lambda: None, require_device=lambda error: None)
    row, lost = measure.attempt(error, lambda: (_ for _ in ()).throw(ValueError("a\nb")))
    assert row == {"failed": "ValueError: a"} and not lost
