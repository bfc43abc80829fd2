"""Progress where there is no terminal: lines now and then, and nothing else."""

import io

import pytest

from krrst_fast.runs import progress
from krrst_fast.runs.log import loss_at_end


@pytest.mark.parametrize("clock, lines", [([0, 29, 31, 40, 70], 2), ([0, 1, 2, 3, 4], 0)])
def test_a_log_file_gets_a_line_every_thirty_seconds(monkeypatch, clock, lines):
    seconds = iter(clock)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with progress.progress_bar(True, total=8, desc="distill", unit="step") as bar:
        bar.set_postfix({"loss": "0.5", "images/s": "100"})
        for _ in clock[1:]:
            bar.update()
    written = progress.sys.stderr.getvalue().splitlines()
    assert len(written) == lines
    if lines:
        assert written[0] == "distill: step 2 of 8, loss 0.5, images/s 100, 0:01:33 left"


def test_the_loss_at_the_end_is_the_mean_of_the_last_tenth():
    rows = [{"loss": float(i)} for i in range(200)]
    assert loss_at_end(rows) == sum(range(180, 200)) / 20
    assert loss_at_end(rows[:4]) == 1.5
    assert loss_at_end([{"step": 1}, {"loss": float("nan")}]) is None
