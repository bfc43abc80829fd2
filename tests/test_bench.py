"""The benchmarks: what asv finds, one run of each at a tiny shape, and that a slow-down is seen."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from krrst_fast import backends, library

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
common = import_module("bench.common")
ratios = import_module("bench.ratios")
bench_gram = import_module("bench.bench_gram")
bench_krr = import_module("bench.bench_krr")
bench_outer_step = import_module("bench.bench_outer_step")
bench_ridge_solve = import_module("bench.bench_ridge_solve")
bench_views = import_module("bench.bench_views")

TINY = {
    bench_gram.Gram: bench_gram.Shape(9, 12, transposed=True),
    bench_gram.GramGradient: bench_gram.Shape(9, 12),
    bench_krr.KRR: bench_krr.Shape(7, 3, 20, 11),
    bench_outer_step.OuterStep: bench_outer_step.Shape("tiny", 4, 3, 6, 8, (4, 8)),
    bench_ridge_solve.RidgeSolve: bench_ridge_solve.Shape(9, 3, 20),
    bench_views.Views: bench_views.Shape(5, 8),
}
TRACKS = ("time_call", "track_error", "track_peak_mb", "track_ratio_to_reference")


@pytest.fixture(autouse=True)
def _threads():
    """A benchmark sets the number of threads: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_asv_finds_every_suite_and_can_run_each_shape() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asv", "check", "-E", "existing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "No problems found" in done.stdout, done.stdout + done.stderr


def test_discovery_gives_four_measurements_a_suite() -> None:
    from asv_runner.discovery import disc_benchmarks

    found = {one.name: one for one in disc_benchmarks(str(ROOT / "bench"))}
    suites = {f"{kind.__module__.removeprefix('bench.')}.{kind.__name__}": kind for kind in TINY}
    assert set(found) == {f"{suite}.{track}" for suite in suites for track in TRACKS}
    for name, one in found.items():
        shapes, names = suites[name.rpartition(".")[0]].params
        assert one.param_names == ["shape", "backend"] and len(shapes) == len(set(shapes)) > 1
        assert set(names) <= {backend.name for backend in backends.BACKENDS}
        assert [len(values) for values in one.params] == [len(shapes), len(names)]


@pytest.mark.parametrize("kind,backend", [(kind, name) for kind in TINY for name in kind.params[1]])
def test_every_suite_runs(kind: type, backend: str) -> None:
    if backend == "cpp" and not library.has_extension():
        pytest.skip(library.EXTENSION)
    suite, shape = kind(), TINY[kind]
    assert type(shape) is type(kind.params[0][0])
    suite.seconds = 0.0
    suite.setup(shape, backend)
    assert torch.get_num_threads() == common.THREADS
    suite.time_call(shape, backend)
    assert 0 < suite.track_ratio_to_reference(shape, backend) < math.inf
    # The inputs are float32: as wrong as that, and not exact (then float64 is measured itself).
    assert 0 < suite.track_error(shape, backend) < 1e-3
    assert 0 < suite.track_peak_mb(shape, backend) < 10


def test_a_backend_that_is_not_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from asv_runner.benchmarks.mark import SkipNotImplemented

    gone = replace(backends.BACKENDS[0], refuses=lambda x: "it is gone")
    monkeypatch.setattr("bench.common.BACKENDS", (gone, *backends.BACKENDS[1:]))
    with pytest.raises(SkipNotImplemented, match="it is gone"):
        bench_krr.KRR().setup(TINY[bench_krr.KRR], "cpp")


def test_the_suite_has_the_shapes_that_are_promised() -> None:
    floors = {tuple(shape): floor for shape, floor in bench_krr.FLOORS.items()}
    assert floors == {
        (1000, 512, 8192, 1024): 1.3,
        (1000, 100, 8192, 1024): 2.3,
        (1000, 10, 8192, 1024): 4.0,
        (2000, 512, 8192, 1024): 1.7,
        (5000, 512, 512, 1024): 8.0,
        (10, 2048, 25088, 256): 1.0,
        (100, 64, 2048, 256): 1.0,
        (256, 512, 2049, 256): 1.0,
        (30, 64, 512, 256): 1.0,
    }


def test_calls_take_turns_and_their_medians_are_compared() -> None:
    order, now = [], [0.0]

    def call(name: str, seconds: list[float]):
        def run():
            order.append(name)
            now[0] += seconds[order.count(name) - 1]

        return run

    # The first call of each, which warms up, and one call that was disturbed do not count.
    ours = call("ours", [9.0, 1.0, 1.0, 50.0, 1.0, 1.0])
    reference = call("reference", [9.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    timing = common.interleaved(ours, reference, seconds=0.0, at_least=5, clock=lambda: now[0])
    assert timing == (1.0, 3.0, 5) and timing.ratio == 3.0
    assert [set(order[i : i + 2]) for i in range(0, 12, 2)] == [{"ours", "reference"}] * 6
    assert order[2:6] == ["reference", "ours", "ours", "reference"]


def test_error_is_that_of_the_worst_tensor() -> None:
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    got = [torch.tensor([3.0, 4.5]), torch.tensor([1.01])]
    assert common.relative_error(got, exact) == pytest.approx(0.1)


def test_peak_counts_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(1000)
        b = torch.zeros(2000)
        del a
        return torch.zeros(500), b

    assert common.peak_bytes(call) == 4 * 3000


def _slow_backend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every gram of the backend "torch" takes this much longer."""
    plain = next(one for one in backends.BACKENDS if one.name == "torch")

    def gram(x, scale, bias):
        time.sleep(seconds)
        return plain.gram(x, scale, bias)

    monkeypatch.setattr(backends, "BACKENDS", (replace(plain, gram=gram),))


@pytest.mark.slow
def test_a_planted_slow_down_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = bench_krr.Shape(100, 10, 512, 64)
    options = {"backend": "torch", "seconds": 0.3, "clock": "wall"}
    before = ratios.measure(shape, **options).timing
    _slow_backend(monkeypatch, max(0.05, 5 * before.reference))
    after = ratios.measure(shape, **options).timing
    assert after.ratio < 0.5 * min(1.0, before.ratio), f"{before} then {after}"


@pytest.mark.slow
def test_check_fails_below_the_floor(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shape = bench_krr.Shape(30, 64, 512, 256)
    command = ["30,64,512,256", "--check", "--seconds", "0.2", "--backend", "torch"]
    monkeypatch.setattr(ratios, "FLOORS", {shape: 1e-6})
    assert ratios.main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ratios, "FLOORS", {shape: 1.0})
    _slow_backend(monkeypatch, 0.05)
    assert ratios.main(command) == 1
    out, err = capsys.readouterr()
    assert "   30    64    512   256  k" in out and "1.0 is needed" in err
    assert ratios.main(command[:1] + command[2:]) == 0


def test_clock_of_the_processor_is_for_one_thread(capsys) -> None:
    with pytest.raises(SystemExit):
        ratios.main(["--clock", "cpu"])
    assert "--threads 1" in capsys.readouterr().err
