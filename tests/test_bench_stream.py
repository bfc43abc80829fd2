"""The benchmark of a mapped file runs, small, in both forms."""

import json
from pathlib import Path

import pytest

from bench import stream


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
@pytest.mark.parametrize("rows, form", [(60, "w"), (300, "primal")])
def test_a_small_file(
    rows: int, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--rows", str(rows), "--features", "90", "--targets", "8"]
    assert stream.main([*sizes, "--folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["form"] == form and found["rows"] == rows
    assert found["error"] < 1e-5 and found["peak_mb"] >= found["before_mb"] > 0
    assert not list(tmp_path.iterdir())
