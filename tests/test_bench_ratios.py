"""The table of ratios: its rows and floors, and that a slow-down or a loss of digits is seen."""

import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch

from krrst_fast import backends

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
ratios = import_module("bench.ratios")
suite = import_module("bench.suite")
few_shot = import_module("bench.bench_few_shot")
fit = import_module("bench.bench_fit")
krr = import_module("bench.bench_krr")
peers = import_module("bench.bench_peers")

TORCH = suite.Setting(backend="torch")
TINY_PEER = peers.Shape(40, 3, 60, 20)


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the number of threads: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_loss_has_the_shapes_and_floors_that_are_promised() -> None:
    floors = {tuple(shape): floor for shape, floor in krr.FLOORS.items()}
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


def test_every_other_promise_is_a_row() -> None:
    rows = {(row.name, row.against): row.floor for row in ratios.other_rows(TORCH)}
    shots, queries = (
        "few-shot 4096 x M=25 P=5 D=640 B=75",
        "100 queries of a fit M=1000 P=10 D=2048 B=32",
    )
    assert rows == {
        (shots, "the formula in batched PyTorch"): 1.2,
        (shots, "a Python loop over the episodes"): 8.0,
        (queries, "the formula for each query"): 20.0,
        (queries, "krr_predict for each query"): 20.0,
    }
    asked = ratios.arguments(["--peers"])
    rows = {(row.name, row.against): row for row in ratios.chosen(asked)}
    assert {name for name, _ in rows} == {"fit and predict M=1000 P=512 D=8192 B=1024"}
    assert {against for _, against in rows} == {kind.against for kind in peers.PEERS}
    assert all(row.floor == 1.0 and len(row.draws) == 2 for row in rows.values())
    everything = list(ratios.chosen(ratios.arguments([])))
    assert len(everything) == len(krr.FLOORS) + 4


@pytest.mark.parametrize("reference", few_shot.FLOORS)
def test_few_shot_rows_compute_the_same(reference: str) -> None:
    make = partial(few_shot.few_shot_case, few_shot.Shape(9, 5, 2, 30, 4), TORCH)
    case = make(reference=reference)
    loss, d_syn, d_real, d_ridge = case.exact()
    assert loss.shape == d_ridge.shape == () and d_syn.shape == (9, 5, 30)
    assert d_real.shape == (9, 4, 30)
    assert max(ratios.errors(case)) < 1e-5


@pytest.mark.parametrize("reference", fit.FLOORS)
def test_queries_of_a_fit_compute_the_same(reference: str) -> None:
    case = fit.reuse_case(fit.Shape(20, 3, 30, 4, queries=5), TORCH, reference=reference)
    assert [tuple(x.shape) for x in case.exact()] == [(4, 3)] * 5
    assert max(ratios.errors(case)) < 1e-4


@pytest.mark.parametrize("kind", peers.PEERS, ids=lambda kind: kind.__name__)
def test_peers_compute_the_same(kind: type) -> None:
    pytest.importorskip(kind.module)
    case = peers.peer_case(TINY_PEER, TORCH, module=kind.module, predict=kind.predict)
    assert case.exact()[0].shape == (20, 3)
    assert max(ratios.errors(case)) < 1e-3


def test_peers_get_the_threads_that_we_get() -> None:
    pytest.importorskip("threadpoolctl")
    seen = []

    class Model:
        def fit(self, x, y):
            return self

        def predict(self, new):
            seen.extend(pool["num_threads"] for pool in blas.info() if pool["user_api"] == "blas")
            return new

    blas = peers._blas()
    torch.set_num_threads(1)
    x = torch.ones(2, 2)
    assert torch.equal(peers.fit_and_predict(Model(), x, x, x), x)
    assert seen and set(seen) == {1}


def _row(floor: float, **options: object) -> ratios.Row:
    shape = krr.Shape(100, 10, 512, 64)
    return next(replace(row, floor=floor, **options) for row in ratios.krr_rows([shape], TORCH))


def _slow_backend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every gram of the backend "torch" takes this much longer."""
    plain = next(one for one in backends.BACKENDS if one.name == "torch")

    def gram(x, scale, bias):
        time.sleep(seconds)
        return plain.gram(x, scale, bias)

    monkeypatch.setattr(backends, "BACKENDS", (replace(plain, gram=gram),))


def test_a_planted_slow_down_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ratios.measure(_row(0.0), seconds=0.3).timing
    _slow_backend(monkeypatch, max(0.05, 5 * before.reference))
    after = ratios.measure(_row(0.0), seconds=0.3).timing
    assert after.ratio < 0.5 * min(1.0, before.ratio), f"{before} then {after}"


def test_failures_name_the_row_and_what_is_needed() -> None:
    def measured(ours: float, error: float, **options: object) -> list[str]:
        timing = ratios.Timing(ours, 1.0, 5)
        return list(ratios.Measured(_row(2.0, **options), timing, 1e-5, error).failures())

    assert measured(0.5, 1e-3) == [] == measured(0.5, 1e-5, draws=[None])
    name = "krr_mse M=100 P=10 D=512 B=64 against LU and autograd"
    assert measured(1.0, 0.0) == [f"{name}: 1.00, 2.0 is needed"]
    less = f"{name}: error 1.10e-05, 1.00e-05 is allowed"
    assert measured(0.1, 1.1e-5, draws=[None]) == [less]
    assert len(measured(1.0, float("nan"), draws=[None])) == 2


def test_check_fails_below_the_floor(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    shape = krr.Shape(30, 64, 512, 256)
    command = ["30,64,512,256", "--check", "--seconds", "0.2", "--backend", "torch"]
    monkeypatch.setattr(krr, "FLOORS", {shape: 1e-6})
    assert ratios.main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(krr, "FLOORS", {shape: 1.0})
    _slow_backend(monkeypatch, 0.05)
    assert ratios.main(command) == 1
    out, err = capsys.readouterr()
    assert "krr_mse M=30 P=64 D=512 B=256" in out and "1.0 is needed" in err
    assert ratios.main(command[:1] + command[2:]) == 0


def test_a_peer_that_is_not_here_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "himalaya", None)
    monkeypatch.setattr(peers, "PEERS", (peers.Himalaya,))
    monkeypatch.setattr(peers, "SHAPE", TINY_PEER)
    assert ratios.main(["--peers", "--check", "--seconds", "0"]) == 0
    assert "himalaya's KernelRidge         n/a: import of himalaya" in capsys.readouterr().out


def test_options_that_do_not_go_together_are_refused(capsys) -> None:
    for options, said in (
        (["--clock", "cpu"], "--threads 1"),
        (["--peers", "30,64,512"], "shapes are of the loss"),
    ):
        with pytest.raises(SystemExit):
            ratios.main(options)
        assert said in capsys.readouterr().err
