"""The benchmark of the choice of ridges runs, small, and writes its table."""

from pathlib import Path

import pytest

from bench import choice


@pytest.mark.slow
def test_a_small_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{choice.BEGIN}\n{choice.END}\n")
    sizes = ["--rows", "60", "--features", "90", "--targets", "8"]
    assert choice.main([*sizes, "--repeats", "1", "--page", str(page)]) == 0
    out = capsys.readouterr().out
    assert "60 rows of rank 200, 90 features, 8 targets" in out
    rows = {line.split("`")[1]: line for line in out.splitlines() if line.startswith("| `")}
    ours, theirs = rows["krrst_fast.KernelRidgeCV"], rows["sklearn.linear_model.RidgeCV"]
    assert ours.split("|")[-2] == theirs.split("|")[-2], "the same ridges"
    assert page.read_text().startswith("before") and ours in page.read_text()


def test_a_page_without_marks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.subprocess, "run", lambda *a, **k: pytest.fail("it was measured"))
    assert choice.main(["--page", str(tmp_path / "nowhere.md")]) == 2
    assert "cannot be read" in capsys.readouterr().err
