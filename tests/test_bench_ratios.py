"""The rows with a floor, and that a slow-down or a loss of digits is seen; the README's table."""

import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from krrst_fast import backends
from krrst_fast.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
markdown = import_module("bench.markdown")
ratios = import_module("bench.ratios")
suite = import_module("bench.suite")
few_shot = import_module("bench.bench_few_shot")
fit = import_module("bench.bench_fit")
krr = import_module("bench.bench_krr")
peers = import_module("bench.bench_peers")

TORCH = suite.Setting(backend="torch")
SMALL = krr.Shape(100, 10, 512, 64)
TINY_PEER = peers.Shape(40, 3, 60, 20)
NAME = "KRR loss and gradients: M 100, P 10, D 512, B 64"


@pytest.fixture(autouse=True)
def _threads():
    """The command sets the number of threads: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _row(floor: float = 0.0, draws: int = 1) -> "ratios.Row":
    return ratios.Row("KRR loss and gradients", krr.KRR, SMALL, floor, draws)


def test_the_loss_has_the_shapes_and_floors_that_are_promised() -> None:
    floors = {tuple(row.shape): row.floor for row in ratios.ROWS if row.suite is krr.KRR}
    assert floors == {
        (1000, 512, 8192, 1024): 1.3,
        (1000, 100, 8192, 1024): 2.3,
        (1000, 10, 8192, 1024): 4.0,
        (2000, 512, 8192, 1024): 1.7,
        (5000, 512, 512, 1024): 8.0,
        (10, 2048, 25088, 256): 1.0,
        (100, 64, 2048, 256): 1.1,
        (256, 512, 2049, 256): 1.0,
        (30, 64, 512, 256): 1.2,
        (20, 8, 512, 20): 1.4,
        (10, 8, 128, 10): 1.3,
    }


def test_every_other_promise_is_a_row() -> None:
    rows = {
        (row.name, row.suite.against): row.floor for row in ratios.ROWS if row.suite is not krr.KRR
    }
    product = "the formula, by a product, LU and autograd"
    shots, queries = (
        "few-shot heads and gradients: episodes 4096, M 25, P 5, D 640, B 75",
        "one fit, many queries: M 1000, P 10, D 2048, B 32, queries 100",
    )
    assert rows == {
        (shots, "the formula in batched PyTorch"): 1.2,
        (shots, "a Python loop over the episodes"): 8.0,
        **{
            (f"KRR loss and gradients: M 1000, P 10, D 512, B 1024, kernel {kernel}", product): 1.0
            for kernel in ("rbf", "polynomial", "arccos")
        },
        (queries, "the formula for each query"): 20.0,
        (queries, "krr_predict for each query"): 20.0,
        **{
            (f"{title}: {sizes}", "PyTorch's modules, channels innermost"): floor
            for title, floor in (
                ("features", 1.2),
                ("features and their gradient", 1.5),
                ("training step", 1.2),
            )
            for sizes in (
                "M 125, size 32, widths (128, 256, 512)",
                "M 32, size 64, widths (64, 128, 256, 512)",
                "M 100, size 32, widths (32, 64, 128)",
                "M 100, size 32, widths (16, 32, 64)",
            )
        },
    }
    assert len(ratios.ROWS) == len(krr.FLOORS) + 19
    *of_peers, rbf = ratios.PEERS
    assert {row.name for row in of_peers} == {"fit and predict: N 1000, P 512, D 8192, B 1024"}
    assert [row.suite for row in of_peers] == list(peers.PEERS) and len(set(peers.PEERS)) == 4
    assert all(row.floor == 1.0 and row.draws == 3 for row in of_peers)
    assert (rbf.floor, rbf.name) == (2.0, "fit and predict, rbf: N 2000, P 10, D 64, B 2000")


def _errors(case: "suite.Case") -> list[float]:
    exact = case.exact()
    return [ratios.relative_error(call(), exact) for call in (case.ours, case.reference)]


@pytest.mark.parametrize("kind", [few_shot.FewShot, few_shot.FewShotLoop])
def test_few_shot_rows_compute_the_same(kind: type) -> None:
    case = kind().case(few_shot.Shape(9, 5, 2, 30, 4), TORCH)
    loss, d_syn, d_real, d_ridge = case.exact()
    assert loss.shape == d_ridge.shape == () and d_syn.shape == (9, 5, 30)
    assert d_real.shape == (9, 4, 30)
    assert max(_errors(case)) < 1e-5


@pytest.mark.parametrize("kind", [fit.Reuse, fit.ReusePredict])
def test_queries_of_a_fit_compute_the_same(kind: type) -> None:
    case = kind().case(fit.Shape(20, 3, 30, 4, queries=5), TORCH)
    assert [tuple(x.shape) for x in case.exact()] == [(4, 3)] * 5
    assert max(_errors(case)) < 1e-4


@pytest.mark.parametrize("kind", peers.PEERS, ids=lambda kind: kind.__name__)
def test_peers_compute_the_same(kind: type) -> None:
    pytest.importorskip(kind.module)
    case = kind().case(TINY_PEER, TORCH)
    assert case.exact()[0].shape == (20, 3)
    assert max(_errors(case)) < 1e-3


def test_draws_of_a_peer_differ() -> None:
    pytest.importorskip("sklearn")
    one, another = peers.ScikitLearn(), peers.ScikitLearn()
    another.seed = 1
    first, second = (x.case(TINY_PEER, TORCH).exact()[0] for x in (one, another))
    assert not torch.equal(first, second)


def test_peers_get_the_threads_that_we_get() -> None:
    pytest.importorskip("threadpoolctl")
    seen = []

    class Model:
        def fit(self, x, y):
            return self

        def predict(self, new):
            seen.extend(pool["num_threads"] for pool in blas.info() if pool["user_api"] == "blas")
            return new

    blas = peers.blas()
    torch.set_num_threads(1)
    x = torch.ones(2, 2)
    assert torch.equal(peers.fit_and_predict(Model(), x, x, x), x)
    assert seen and set(seen) == {1}


def _slow_backend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every gram of the backend that computes here takes this much longer."""
    plain = backends.choose("auto", torch.empty(1, 1), "test")
    gram = plain.gram

    def slow(x, scale, bias):
        time.sleep(seconds)
        return gram(x, scale, bias)

    monkeypatch.setattr(plain, "gram", slow)
    monkeypatch.setattr(plain, "suits_whole", lambda *sizes: False, raising=False)


def test_a_planted_slow_down_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ratios.measure(_row(), seconds=0.3)
    _slow_backend(monkeypatch, max(0.05, 5 * before.reference))
    after = ratios.measure(_row(), seconds=0.3)
    assert after.ratio < 0.5 * min(1.0, before.ratio), f"{before} then {after}"


def test_failures_name_the_row_and_what_is_needed() -> None:
    def failures(ours: float, error: float, draws: int = 1) -> list[str]:
        return list(ratios.Measured(_row(2.0, draws), ours, 1.0, error, 1e-5).failures())

    assert failures(0.5, 1e-3) == [] == failures(0.5, 1e-5, draws=3)
    name = f"{NAME} against the formula, by LU and autograd"
    assert failures(1.0, 0.0) == [f"{name}: 1.00, 2.0 is needed"]
    less = f"{name}: error 1.10e-05, 1.00e-05 is allowed"
    assert failures(0.1, 1.1e-5, draws=3) == [less]
    assert len(failures(1.0, float("nan"), draws=3)) == 2


def _rows(monkeypatch: pytest.MonkeyPatch, *rows: "ratios.Row", peers: tuple = ()) -> None:
    monkeypatch.setattr(ratios, "ROWS", rows)
    monkeypatch.setattr(ratios, "PEERS", peers)


def _peer_alone(monkeypatch: pytest.MonkeyPatch) -> tuple["ratios.Row", ...]:
    monkeypatch.setitem(sys.modules, "himalaya", None)
    return (ratios.Row("fit and predict", peers.Himalaya, TINY_PEER, 1.0, 3),)


def test_check_fails_below_the_floor(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["--check", "--seconds", "0.2"]
    _rows(monkeypatch, _row(1e-6))
    assert ratios.main(command) == 0
    assert capsys.readouterr().err == ""
    _rows(monkeypatch, _row(1.0))
    _slow_backend(monkeypatch, 0.3)
    assert ratios.main(command) == 1
    out, err = capsys.readouterr()
    assert NAME in out and "1.0 is needed" in err
    assert ratios.main(command[1:]) == 0


def test_a_peer_that_is_not_here_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    _rows(monkeypatch, peers=_peer_alone(monkeypatch))
    assert ratios.main(["--peers", "--check", "--seconds", "0"]) == 0
    assert "against himalaya's KernelRidge: n/a: import of himalaya" in capsys.readouterr().err


def test_the_readme_gets_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen = []
    measure = ratios.measure
    monkeypatch.setattr(
        ratios, "measure", lambda *a, **k: seen.append(measure(*a, **k)) or seen[-1]
    )
    _rows(monkeypatch, _row(), peers=_peer_alone(monkeypatch))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{ratios.BEGIN}\nold | table\n{ratios.END}\nafter\n")
    assert ratios.main(["--readme", str(readme), "--seconds", "0"]) == 0
    text, (found,) = readme.read_text(), seen
    assert text.startswith(f"before\n{ratios.BEGIN}\n\n| computation | against |")
    assert text.endswith(f"\n\n{ratios.END}\nafter\n") and "old" not in text
    (row,) = (line for line in text.splitlines() if line.startswith("| KRR loss"))
    assert row in capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == [NAME, "the formula, by LU and autograd"]
    assert float(cells[2]) == pytest.approx(found.reference * 1e3, rel=0.01)
    assert float(cells[3]) == pytest.approx(found.ours * 1e3, rel=0.01)
    assert float(cells[4].strip("*")) == pytest.approx(found.reference / found.ours, rel=0.06)
    assert float(cells[5]) == pytest.approx(found.reference_error, rel=0.06)
    assert float(cells[6]) == pytest.approx(found.error, rel=0.06)
    assert "fit and predict" not in text, "a peer that is not installed has no row"
    assert f", 2 threads, torch {torch.__version__}, krrst_fast " in text
    assert f"`python -m bench.ratios --readme {readme} --seconds 0`" in text
    _rows(monkeypatch, _row(), _row()._replace(headline=False))
    page = tmp_path / "page.md"
    page.write_text(f"{ratios.BEGIN}\n{ratios.END}\n")
    assert ratios.main(["--readme", str(readme), "--page", str(page), "--seconds", "0"]) == 0
    assert len(readme.read_text().splitlines()) == len(text.splitlines())
    assert len(page.read_text().splitlines()) == len(text.splitlines()) - 1


def test_the_readme_of_the_project_has_the_marks() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(ratios.BEGIN) == text.count(ratios.END) == 1


def test_a_file_without_marks_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.setattr(ratios, "measure", lambda *a, **k: pytest.fail("it was measured"))
    assert ratios.main(["--readme", str(ROOT / "LICENSE")]) == 2
    assert "needs one line" in capsys.readouterr().err
    assert ratios.main(["--readme", str(tmp_path / "nowhere.md")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(DataError, match="needs one line"):
        markdown.rewrite(ROOT / "LICENSE", [], ratios.BEGIN, ratios.END)


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
    assert markdown.digits(value, count) == text
