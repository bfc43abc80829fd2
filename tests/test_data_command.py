"""What `krrst prepare` prints: what was left out, and what to type next."""

import shlex
from pathlib import Path

import pytest
from PIL import Image

from krrst_fast.cli.main import main


def krrst(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], str]:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        picture(tmp_path / "my images" / name / "0.png")
    return tmp_path / "my images"


def test_it_ends_with_what_was_left_out_and_the_next_command(folder, tmp_path, capsys):
    out = tmp_path / "it's a store; $HOME"
    code, lines, _ = krrst(capsys, "prepare", folder, out, "--size", 8)
    assert code == 0 and lines[0].endswith(": 2 train images of 8x8, 2 classes")
    assert lines[1] == "left out: nothing"
    words = shlex.split(lines[2])
    assert words == ["next:", "krrst", "target", "--store", str(out), "--out", "TARGET"]

    (folder / "a" / "notes.txt").write_text("x")
    (folder / "a" / "1.png").write_bytes(b"no image")
    code, lines, _ = krrst(
        capsys, "prepare", folder, out, "--overwrite", "--on_error", "skip", "--size", 8
    )
    assert code == 0 and lines[1] == "left out: 1 x .txt is no image; 1 x cannot be decoded"
    code, lines, _ = krrst(capsys, "info", out)
    (row,) = (line for line in lines if line.startswith("left out "))
    assert row.endswith("  1 x .txt is no image; 1 x cannot be decoded")


def test_an_existing_store_names_the_flag_that_replaces_it(folder, tmp_path, capsys):
    out = tmp_path / "store"
    assert krrst(capsys, "prepare", folder, out, "--size", 8)[0] == 0
    code, _, error = krrst(capsys, "prepare", folder, out, "--size", 8)
    assert code == 2 and error.endswith("is not empty; --overwrite replaces it\n")
    (out / "index.json").unlink()
    code, _, error = krrst(capsys, "prepare", folder, out, "--size", 8)
    assert code == 2 and error.endswith("is not empty\n"), "it is no store: nothing replaces it"


def test_strict_leaves_nothing_out(folder, tmp_path, capsys):
    (folder / "a" / "notes.txt").write_text("x")
    words = ("prepare", folder, tmp_path / "out", "--size", 8, "--strict")
    code, _, error = krrst(capsys, *words)
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert "1 files would be left out, which --strict refuses; the first, " in error
    code, _, error = krrst(capsys, *words, "--on_error", "skip")
    assert code == 2 and "on_error must be refuse where strict is true, got 'skip'" in error


def test_help_says_what_happens_to_turned_transparent_and_oblong_images(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "EXIF orientation",
        "transparent pixels",
        "cropped to the centre",
        "--max_pixels",
    ):
        assert words in text
