"""Matrices that are computed once on the disk: kills, damage, other inputs; and their PCA."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.errors import ConfigError, DataError, NonFiniteError
from krrst_fast.runs.rows import computed_rows
from krrst_fast.targets.pca import pca_head

INPUTS = {"store": "a"}


def _rows(index: torch.Tensor) -> torch.Tensor:
    return torch.sin(index[:, None] * torch.arange(1.0, 4.0))


class Counted:
    """The rows, with a record of those that were computed, and a stop before one of them."""

    def __init__(self, stop: int = 1000, kill: bool = False) -> None:
        self.seen: list[int] = []
        self._stop, self._kill = stop, kill

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        if self._stop in index:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        self.seen += index.tolist()
        return _rows(index)


def _computed(folder: Path, compute, inputs=INPUTS, count: int = 100) -> torch.Tensor:
    return computed_rows(folder, (count, 3), inputs, compute, block=4, what="rows")


def _killed_child(folder: str) -> None:
    _computed(Path(folder), Counted(stop=70, kill=True))


def test_a_killed_computation_is_taken_up_with_the_same_bits(tmp_path):
    whole = _computed(tmp_path / "whole", Counted())
    assert torch.equal(whole, _rows(torch.arange(100)))
    code = f"from tests.test_rows import _killed_child; _killed_child({str(tmp_path / 'r')!r})"
    root = Path(__file__).resolve().parent.parent
    child = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert child.returncode == -signal.SIGKILL
    rest = Counted()
    assert torch.equal(_computed(tmp_path / "r", rest), whole)
    # Blocks of 4 are saved 8 at a time.
    assert rest.seen == list(range(64, 100))
    for name in ("rows.f32", "rows.json"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = Counted()
    assert torch.equal(_computed(tmp_path / "r", again), whole) and again.seen == []


@pytest.mark.parametrize("harm", ["flip", "cut", "progress", "inputs", "count"])
def test_rows_that_cannot_be_used_are_computed_again_and_said(harm, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _computed(tmp_path, Counted(stop=70))
    rows, progress = tmp_path / "rows.f32", tmp_path / "rows.json"
    data = bytearray(rows.read_bytes())
    inputs, count = INPUTS, 100
    if harm == "flip":
        data[17] ^= 1
        rows.write_bytes(data)
    elif harm == "cut":
        rows.write_bytes(data[:100])
    elif harm == "progress":
        progress.write_text("{")
    elif harm == "inputs":
        inputs = {"store": "b"}
    else:
        count = 90
    message = "of other inputs" if harm in ("inputs", "count") else "damaged"
    compute = Counted()
    with pytest.warns(UserWarning, match=f"rows there are {message}; computed again"):
        made = _computed(tmp_path, compute, inputs, count)
    assert compute.seen == list(range(count)) and torch.equal(made, _rows(torch.arange(count)))
    assert json.loads(progress.read_text())["done"] == count


def test_what_takes_long_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("krrst_fast.runs.rows._LONG", 0.0)
    with pytest.warns(UserWarning, match="rows: 92 of 100 rows are still to be computed") as said:
        _computed(tmp_path, Counted())
    assert len(said) == 1


def test_rows_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(NonFiniteError, match="rows 0 to 3 hold NaN"):
        _computed(tmp_path, lambda index: torch.full((len(index), 3), torch.nan))
    with pytest.raises(ValueError, match=r"must give \[4, 3\], got \(4, 2\)"):
        _computed(tmp_path, lambda index: torch.ones(len(index), 2))


@pytest.mark.parametrize("shape", [(200, 12), (9, 30), (5000, 6)])
def test_pca_is_numpys_svd_in_float64(shape):
    draw = np.random.default_rng(0)
    x = draw.normal(size=shape) * np.linspace(3, 0.1, shape[1]) + draw.normal(size=shape[1])
    x = x.astype(np.float32)
    for p in (1, 5):
        head, explained = pca_head(torch.from_numpy(x), p)
        centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
        _, singular, directions = np.linalg.svd(centred, full_matrices=False)
        energy = singular**2
        assert explained == pytest.approx(energy[:p].sum() / energy.sum(), rel=1e-9)
        best = centred @ directions[:p].T
        best /= np.sqrt(best.var(0).mean())
        best *= np.sign(directions[:p][np.arange(p), np.abs(directions[:p]).argmax(1)])
        made = head(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(made, best, rtol=1e-3, atol=1e-4)
        assert made.var(0).mean() == pytest.approx(1, rel=1e-5)


def test_all_features_are_only_shifted_and_scaled():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 7 + 3
    head, explained = pca_head(x, 0)
    made = head(x)
    assert explained == 1 and made.var(0, correction=0).mean() == pytest.approx(1, rel=1e-5)
    factor = (x.var(0, correction=0).mean()).sqrt()
    torch.testing.assert_close(made, (x - x.mean(0)) / factor, rtol=1e-4, atol=1e-5)


def test_features_without_components_are_refused():
    with pytest.raises(ConfigError, match="at most the 4 features .* fewer than the 3 images"):
        pca_head(torch.randn(3, 4), 3)
    with pytest.raises(DataError, match="the same"):
        pca_head(torch.full((9, 4), 0.1), 2)
