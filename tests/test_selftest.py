"""The self-test: ok where all is right; FAILED, and exit code 1, where something is not."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import backends, krr_predict, operators, selftest, selftest_checks
from krrst_fast.ops import whole
from krrst_fast.planner import FORMS

LINE = re.compile(
    r"(?P<verdict>ok|FAILED) +(?P<check>\S.*?)  +(?P<rest>.*)error +(?P<error>\S+)  "
    r"allowed +(?P<allowed>\S+) +(?P<seconds>[\d.]+) s(?:  (?P<problem>.*))?$"
)


SMALL = ((1, 1, 1, 1), (7, 13, 5, 3), (9, 7, 5, 2), (7, 13, 5, 3, 2, 3))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems in this process, without those for the other instruction sets."""
    monkeypatch.setattr(selftest, "in_a_child", lambda isa: iter(()))
    monkeypatch.setattr(selftest_checks, "SHAPES", SMALL)
    monkeypatch.setattr(selftest_checks, "PRECISIONS", selftest_checks.PRECISIONS[:2])


def lines(printed: str) -> list[dict[str, str]]:
    """The lines of checks that a run printed, taken apart."""
    return [m.groupdict() for m in map(LINE.match, printed.splitlines()) if m]


def first() -> backends.Backend:
    """The backend that computes on this machine."""
    return backends.choose("auto", torch.empty(1, 1), "test")


def plant(monkeypatch: pytest.MonkeyPatch, gram: Callable[..., Tensor]) -> str:
    """Give the first backend that computes here another gram; return its name."""
    monkeypatch.setattr(first(), "gram", gram)
    return first().NAME


def test_everything_is_right_on_this_machine(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "krrst_fast.selftest", "--json", str(tmp_path / "told.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    checks = lines(done.stdout)
    assert len(checks) == len(told["checks"]) > 40
    assert told["failed"] == 0 and told["seconds"] < 300 and told["finished"]
    assert all(row["ok"] and row["error"] <= row["allowed"] < 0.1 for row in told["checks"])
    for printed, row in zip(checks, told["checks"]):
        assert printed["check"] == row["check"]
        assert float(printed["error"]) == pytest.approx(row["error"], rel=0.1)
    for value in told["machine"].values():
        assert value in done.stdout
    assert f"{len(checks)} checks on cpu, 0 FAILED" in done.stdout
    names = " ".join(row["check"] for row in told["checks"])
    for op in ("gram", "ridge_solve", "krr_mse", "krr_predict", "krr_predict_from_gram"):
        assert op in names
    for op in ("krr_fit", "leave-one-out", "krr_path", "views", *(f"form {f}" for f in FORMS)):
        assert op in names
    by = {row["backend"] for row in told["checks"]}
    assert {f"cpp {isa}" for isa in torch.ops.krrst_fast.isas()} | {"torch", ""} == by


def test_a_gram_off_by_a_thousandth_fails(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = first().gram

    def off(x: Tensor, scale: float, bias: float) -> Tensor:
        return right(x, scale, bias).mul_(1.001)

    name = plant(monkeypatch, off)
    assert selftest.main([]) == 1
    printed = capsys.readouterr().out
    checks = lines(printed)
    failed = [row for row in checks if row["verdict"] == "FAILED"]
    how = ", by steps" if name == "cpp" else ""
    for op in (
        "gram",
        *(f"{x}{how}" for x in ("krr_predict", *(f"krr_mse, form {f}" for f in FORMS))),
    ):
        mine = [row for row in checks if row["check"] == op and row["rest"].startswith(name)]
        assert mine and all(row["verdict"] == "FAILED" for row in mine), op
        assert all(float(row["error"]) > 1e-5 for row in mine), op
    assert all(row["rest"].startswith(name) for row in failed), "another backend was blamed"
    assert f"{len(failed)} FAILED" in printed


@pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
def test_an_operator_for_a_whole_pass_off_by_a_thousandth_fails(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = whole._FORWARD

    def off(*arguments: Any) -> tuple[Tensor, ...]:
        loss, *others = right(*arguments)
        return loss * 1.001, *others

    monkeypatch.setattr(whole, "_FORWARD", off)
    assert selftest.main([]) == 1
    failed = {r["check"] for r in lines(capsys.readouterr().out) if r["verdict"] == "FAILED"}
    assert failed == {"krr_mse, ridge of the trace", *(f"krr_mse, form {form}" for form in FORMS)}


def test_a_backend_that_raises_fails_and_the_rest_goes_on(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(x: Tensor, scale: float, bias: float) -> Tensor:
        raise OSError("no such instruction\nand more")

    name = plant(monkeypatch, broken)
    assert selftest.main(["--json", str(tmp_path / "told.json")]) == 1
    checks = lines(capsys.readouterr().out)
    failed = [row for row in checks if row["verdict"] == "FAILED"]
    assert failed and all(row["problem"] == "OSError: no such instruction" for row in failed)
    assert all(row["rest"].startswith(name) for row in failed)
    assert {"views 1x1x1", "ridge_solve"} <= {
        row["check"] for row in checks if row["verdict"] == "ok"
    }
    told = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert told["failed"] == len(failed)
    assert [row["error"] for row in told["checks"] if not row["ok"]] == [None] * len(failed)


def test_not_a_number_fails(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = first().gram
    plant(monkeypatch, lambda x, scale, bias: right(x, scale, bias).fill_(float("nan")))
    assert selftest.main([]) == 1
    failed = [row for row in lines(capsys.readouterr().out) if row["verdict"] == "FAILED"]
    assert any(row["check"] == "gram" and row["error"] == "nan" for row in failed)


def test_a_wrong_gradient_alone_fails(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steeper(*args: Tensor, **settings: Any) -> Tensor:
        value = krr_predict(*args, **settings)
        return value + 1e-3 * (value - value.detach())

    monkeypatch.setattr(selftest_checks, "krr_predict", steeper)
    assert selftest.main([]) == 1
    failed = {r["check"] for r in lines(capsys.readouterr().out) if r["verdict"] == "FAILED"}
    assert failed == {"krr_predict", "krr_predict, by steps"}


def rows_when_killed(file: Path, process: subprocess.Popen, count: int) -> list[dict[str, Any]]:
    """Kill a self-test once it has written so many rows; what its file then has."""
    deadline = time.monotonic() + 120
    while not file.exists() or len(json.loads(file.read_text(encoding="utf-8"))["checks"]) < count:
        assert process.poll() is None and time.monotonic() < deadline, "it wrote no row"
        time.sleep(0.01)
    process.kill()
    process.wait()
    told = json.loads(file.read_text(encoding="utf-8"))
    assert not told["finished"] and told["machine"] and told["choices"] and told["seconds"] > 0
    return told["checks"]


def test_one_that_is_killed_keeps_what_it_found(tmp_path: Path) -> None:
    file = tmp_path / "told.json"
    command = [sys.executable, "-m", "krrst_fast.selftest", "--json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        rows = rows_when_killed(file, process, 2)
    assert [row["check"] for row in rows[:2]] == ["gram", "krr_mse, form k"]
    assert all(row["ok"] and row["error"] <= row["allowed"] for row in rows)


def test_an_instruction_set_that_dies_keeps_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = selftest_checks.Result("gram", "cpp avx2", "float32", True, 1e-7, 1e-6, 0.1)
    rows = json.dumps({"checks": [found._asdict()], "finished": False})
    child = tmp_path / "python"
    write = f"#!/bin/sh\nfor file; do :; done\necho '{rows}' > \"$file\"\n"
    child.write_text(f"{write}echo a word >&2\nexit 3\n", encoding="utf-8")
    child.chmod(0o755)
    monkeypatch.setattr(selftest.sys, "executable", str(child))
    kept, dead = selftest.in_a_child("avx2")
    assert kept == found and not dead.ok and dead.problem == "a word"
    child.write_text(f"{write}exec sleep 60\n", encoding="utf-8")
    monkeypatch.setattr(selftest, "CHILD_SECONDS", 0.5)
    kept, dead = selftest.in_a_child("avx2")
    assert kept == found and "timed out after 0.5 seconds" in dead.problem
    assert dead.seconds < 30


def test_an_instruction_set_that_dies_is_a_failed_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.sys, "executable", "/bin/false")
    (dead,) = selftest.in_a_child("avx2")
    assert not dead.ok and dead.backend == "cpp avx2" and dead.problem
    assert dead.line().startswith("FAILED")


def test_choices_name_operator_and_reason() -> None:
    told = selftest.choices("cpu")
    assert any("krr_mse M 5000" in row and "form primal; M = 5000 > D = 512" in row for row in told)
    assert told[0] == f"backend on cpu: {first().NAME}"
    for name in selftest_checks.BACKENDS:
        assert any(row.startswith(f"  {name}: ") for row in told)


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit) as stopped:
        selftest.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "none that torch sees" in capsys.readouterr().err
