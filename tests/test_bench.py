"""The benchmarks: what asv finds, one run of each at a tiny shape, and the tools they stand on."""

import math
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from krrst_fast import backends
from krrst_fast.operators import EXTENSION, HAS_EXTENSION

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
common = import_module("bench.common")
suite = import_module("bench.suite")
flops = import_module("bench.flops")
few_shot = import_module("bench.bench_few_shot")
fit = import_module("bench.bench_fit")
kernels = import_module("bench.bench_kernels")
krr = import_module("bench.bench_krr")
network = import_module("bench.bench_network")
operators = import_module("bench.bench_operators")
outer_step = import_module("bench.bench_outer_step")
peers = import_module("bench.bench_peers")
ridge_solve = import_module("bench.bench_ridge_solve")

KRR = krr.Shape(7, 3, 20, 11)
PEER = peers.Shape(9, 3, 20, 7)
TINY = {
    few_shot.FewShot: few_shot.Shape(6, 5, 2, 20, 4),
    few_shot.FewShotLoop: few_shot.Shape(6, 5, 2, 20, 4),
    fit.Fit: fit.Shape(9, 3, 20, 7),
    fit.Reuse: fit.Shape(9, 3, 20, 7, queries=4),
    fit.ReusePredict: fit.Shape(9, 3, 20, 7, queries=4),
    fit.Path: fit.PathShape(9, 3, 20, 7, 4),
    kernels.OfKernel: kernels.Shape(7, 3, 20, 11),
    kernels.ScikitLearnRbf: kernels.FitShape(9, 3, 20, 7),
    krr.KRR: KRR,
    krr.KRRPrecision: KRR,
    krr.KRRPredict: KRR,
    network.Features: network.Shape(3, 8, (4, 8)),
    network.FeaturesWithGradient: network.Shape(3, 8, (4, 8)),
    network.Training: network.Shape(3, 8, (4, 8)),
    operators.BatchedCholesky: operators.System(4, 5, 2),
    operators.BatchedCholeskySolve: operators.System(4, 5, 2),
    operators.BatchedMatmul: operators.Batch(4, 3, 5, 2),
    operators.Gram: operators.GramShape(9, 12, transposed=True),
    operators.GramGradient: operators.GramShape(9, 12),
    operators.ThinMatmul: operators.Thin(20, 9, 3, transposed=True),
    outer_step.OuterStep: outer_step.Shape("tiny", 4, 3, 6, 8, (4, 8)),
    peers.Himalaya: PEER,
    peers.LinearOperator: PEER,
    peers.LinearOperatorCholesky: PEER,
    peers.ScikitLearn: PEER,
    operators.Views: operators.Images(5, 8),
    ridge_solve.FromGram: ridge_solve.GramShape(9, 7, 3, 20),
    ridge_solve.RidgeSolve: ridge_solve.Shape(9, 3, 20),
}
TRACKS = (
    "time_call",
    "track_error",
    "track_peak_mb",
    "track_ratio_to_reference",
    "track_reference_error",
    "track_tflops",
)
# The inputs are what they are; half precision rounds gradients, and "fast" the features.
ALLOWED = {"float32": 2e-5, "float64": 2e-13, "bfloat16": 4e-3, "fast": 2e-3}
ROWS = [
    (kind, backend, precision)
    for kind in TINY
    for backend in kind.params[1]
    if suite.BACKENDS[backend][1] == "cpu"
    for precision in kind.params[2]
]


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


def test_discovery_gives_six_measurements_a_suite() -> None:
    from asv_runner.discovery import disc_benchmarks

    found = {one.name: one for one in disc_benchmarks(str(ROOT / "bench"))}
    suites = {f"{kind.__module__.removeprefix('bench.')}.{kind.__name__}": kind for kind in TINY}
    assert set(found) == {f"{name}.{track}" for name in suites for track in TRACKS}
    for name, one in found.items():
        shapes, where, precisions = suites[name.rpartition(".")[0]].params
        assert one.param_names == ["shape", "backend", "precision"]
        assert len(shapes) == len(set(shapes)) > 1
        assert set(where) <= set(suite.BACKENDS) and set(precisions) <= set(suite.PRECISIONS)
        assert [len(values) for values in one.params] == [len(shapes), len(where), len(precisions)]


def test_the_quick_run_has_a_small_shape_of_every_suite() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    first, second = (line.split(":= ")[1] for line in lines if line.startswith("SMALLEST :="))
    smallest = re.compile(r"\w+\(" + second.replace("$(SMALLEST)", first))
    for kind in TINY:
        matching = [shape for shape in kind.params[0] if smallest.match(repr(shape))]
        assert 1 <= len(matching) <= 2, f"{kind.__name__}: {matching}"


def test_rows_are_the_same_on_every_machine() -> None:
    """Nothing asks for a GPU, or for what is installed, when a suite is imported."""
    code = """
import sys, torch
def never(*_):
    raise AssertionError("CUDA was asked for at import")
for name in ("is_available", "device_count", "current_device", "get_device_name", "init"):
    setattr(torch.cuda, name, never)
torch.cuda._lazy_init = never
for name in ("asv", "himalaya", "linear_operator", "sklearn"):
    sys.modules[name] = None
from asv_runner.discovery import disc_benchmarks
print(sum(1 for _ in disc_benchmarks("bench")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(len(TINY) * len(TRACKS)), done.stdout + done.stderr


@pytest.mark.parametrize(
    "kind,backend,precision", ROWS, ids=lambda value: getattr(value, "__name__", value)
)
def test_every_row_runs(kind: type, backend: str, precision: str) -> None:
    if backend == "cpp" and not HAS_EXTENSION:
        pytest.skip(EXTENSION)
    if issubclass(kind, peers.Peer):
        pytest.importorskip(kind.module)
    one, row = kind(), (TINY[kind], backend, precision)
    assert type(row[0]) is type(kind.params[0][0])
    one.seconds = 0.0
    one.setup(*row)
    assert torch.get_num_threads() == common.THREADS
    # What is computed in float64 and rounded once may be the exact result.
    assert 0 <= one.track_error(*row) < ALLOWED.get(precision, ALLOWED["float32"])
    if precision == kind.params[2][0]:
        one.time_call(*row)
        assert 0 < one.track_ratio_to_reference(*row) < math.inf
        assert 0 <= one.track_reference_error(*row) < ALLOWED.get(precision, ALLOWED["float32"])
        assert 0 < one.track_peak_mb(*row) < 10
        assert 0 < one.track_tflops(*row) < 100


def test_a_backend_that_is_not_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from asv_runner.benchmarks.mark import SkipNotImplemented

    monkeypatch.setattr(backends.BACKENDS["cpp"], "refuses", lambda x: "it is gone")
    with pytest.raises(SkipNotImplemented, match="it is gone"):
        krr.KRR().setup(KRR, "cpp", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SkipNotImplemented, match="no GPU"):
        krr.KRR().setup(KRR, "torch-cuda", "float32")


def test_a_peer_that_is_not_here_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    from asv_runner.benchmarks.mark import SkipNotImplemented

    monkeypatch.setitem(sys.modules, "himalaya", None)
    with pytest.raises(SkipNotImplemented, match="himalaya"):
        peers.Himalaya().setup(PEER, "torch", "float32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
@pytest.mark.parametrize("kind", [kind for kind in TINY if "torch-cuda" in kind.params[1]])
def test_a_gpu_row_runs(kind: type) -> None:
    pytest.importorskip("asv_runner", reason="asv is not installed")
    torch.use_deterministic_algorithms(False)
    for precision in kind.params[2]:
        one, row = kind(), (TINY[kind], "torch-cuda", precision)
        one.seconds = 0.0
        one.setup(*row)
        assert all(x.is_cuda for x in one._ours())
        assert 0 <= one.track_error(*row) < ALLOWED.get(precision, ALLOWED["float32"])
        assert 0 < one.track_peak_mb(*row) < 100
        assert 0 < one.track_ratio_to_reference(*row) < math.inf


def test_a_gpu_is_waited_for_and_its_own_memory_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10_000_000)

    def call() -> tuple[torch.Tensor]:
        said.append("call")
        return (torch.ones(1),)

    assert common.waiting(call, "cpu") is call
    assert common.waiting(call, "cuda")()[0].item() == 1 and said == ["call", "wait"]
    said.clear()
    assert common.peak_mb(call, "cuda") == 7.0
    assert said == ["wait", "reset", "call", "wait"]


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
    times = common.medians(ours, reference, seconds=0.0, at_least=5, clock=lambda: now[0])
    assert times == [1.0, 3.0]
    assert [set(order[i : i + 2]) for i in range(0, 12, 2)] == [{"ours", "reference"}] * 6
    assert order[2:6] == ["reference", "ours", "ours", "reference"]


def test_error_is_that_of_the_worst_tensor() -> None:
    exact = [torch.tensor([3.0, 4.0]), torch.tensor([1.0])]
    got = [torch.tensor([3.0, 4.5]), torch.tensor([1.01])]
    assert common.relative_error(got, exact) == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_that_is_nan_is_a_failure(bad: int) -> None:
    got = [torch.ones(2), torch.ones(2)]
    got[bad][0] = math.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        common.relative_error(got, [torch.ones(2), torch.ones(2)])


def test_peak_counts_what_is_alive_at_once() -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(1000)
        b = torch.zeros(2000)
        del a
        return torch.zeros(500), b

    assert common.peak_bytes(call) == 4 * 3000


def test_counted_arithmetic() -> None:
    assert flops.product(2, 3, 5) == 60
    assert flops.gram(10, 7) == flops.product(10, 7, 10) / 2
    assert flops.solve(3, 2) == 27 / 3 + 36
    assert flops.fit(10, 100, 1) == flops.gram(10, 100) + flops.solve(10, 1) + 2000
    assert flops.fit(100, 10, 1) == flops.gram(10, 100) + flops.solve(10, 1) + 2000
    # A 3x3 convolution of 3 to 4 channels on 8x8 is 2 * 27 * 4 * 64 a pass and image.
    tiny = TINY[outer_step.OuterStep]
    counted = outer_step.Run(tiny, "cpu", torch.float32).flops()
    first = 2 * 27 * 4 * 64
    assert counted > tiny.b * first
