"""The outer step beside the released one, on a small scale."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
outer_step = import_module("bench.outer_step")
images = import_module("bench.gpu.images")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    """The toy scale; the command sets the number of threads, which is put back."""
    before = torch.get_num_threads()
    monkeypatch.setattr(outer_step, "SCALE", images.TOY)
    monkeypatch.setattr(outer_step, "COUNT", 16)
    yield
    torch.set_num_threads(before)


def test_the_page_has_both_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{outer_step.BEGIN}\nold\n{outer_step.END}\nafter\n")
    words = ["--seconds", "0", "--steps", "1", "--page", str(page)]
    assert outer_step.main(words) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| krrst_fast, looked up | " in text and "| SGD step of the network | " in text
    assert text.count("\n| ") == 1 + 3 + 1 + 9
    monkeypatch.setattr(outer_step, "FLOORS", dict.fromkeys(outer_step.FLOORS, 1e9))
    assert outer_step.main(["--seconds", "0", "--steps", "1", "--check"]) == 1
    assert "times as fast, 1000000000.0 is needed" in capsys.readouterr().err


def test_all_ways_make_the_same_step() -> None:
    """The released step and ours have the same gradients, up to rounding."""
    runs = outer_step.Runs()
    batch = runs.their_views()
    assert batch.shape == (images.TOY.b, 3, images.TOY.size, images.TOY.size)
    for step in (runs.released(), runs.ours()):
        step._replace(views=lambda: batch)(outer_step.Marks("cpu"))
    ours, theirs = runs.live.state.x_syn.grad, runs.theirs.x_syn.grad
    assert theirs.abs().max() > 0
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
