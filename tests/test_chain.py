"""The whole chain on CIFAR, from the three formats that people have it in, to the same pixels."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import ImageStore, open_store
from krrst_fast.distill.distilled_set import load_distilled

UNPACK = Path(__file__).resolve().parents[2] / "shared/data/unpack.py"
FORMATS = ("cifar", "imagefolder", "webdataset")
LIMIT = 200

TARGET = shlex.split(
    "--model.kind convnet --model.widths [8,16] --num_outputs 16 --steps 5 --batch_size 64 "
    "--warmup_steps 0 --projector [32]"
)
DISTILL = shlex.split(
    "--num_images 10 --steps 8 --batch_size 32 --pool.size 2 --pool.online_steps 4 --lr 1e-2 "
    "--pool.lr 0.05 --pool.model.widths [8,16]"
)
EVALUATE = shlex.split(
    "--seeds 2 --methods [none,random_labels,random_target,distilled,target] --model.widths [8,16] "
    "--pretrain.steps 5 --probe.solver ridge --probe.labels 5 --finetune.steps 3 "
    "--finetune.labels_per_class 5"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not UNPACK.exists(), reason="no CIFAR images: no ../shared/data/unpack.py"),
]


def _krrst(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0, argv


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The five commands from each format: CIFAR-100 is distilled, CIFAR-10 transferred to."""
    made = {}
    for name in FORMATS:
        root = tmp_path_factory.mktemp(name)
        for dataset in ("cifar100", "cifar10"):
            unpack = [sys.executable, UNPACK, dataset, name, root / f"{dataset}-files"]
            subprocess.run([*unpack, "--limit", str(LIMIT)], check=True, timeout=60)
            _krrst("prepare", root / f"{dataset}-files", root / dataset, "--size", 32)
        store, target, run = root / "cifar100", root / "target", root / "run"
        _krrst("target", "--run=cifar100", "--store", store, "--out", target, *TARGET)
        paths = ["--store", store, "--target", target, "--out", run]
        _krrst("distill", "--run=cifar100", *paths, *DISTILL)
        _krrst("evaluate", run, "--run=cifar100", "--store", root / "cifar10", *EVALUATE)
        _krrst("report", run)
        made[name] = root
    return made


def _label_names(store: ImageStore, split: str) -> list[str]:
    return [store.classes[label] for label in store.labels(split).tolist()]


@pytest.mark.parametrize("dataset", ["cifar100", "cifar10"])
def test_every_format_gives_the_same_pixels(runs: dict[str, Path], dataset: str) -> None:
    first, folder, tars = (open_store(runs[name] / dataset, verify=True) for name in FORMATS)
    pixels = (first.path / "images.u8").read_bytes()
    assert len(pixels) == 2 * LIMIT * 3 * 32 * 32
    for other in (folder, tars):
        assert (other.path / "images.u8").read_bytes() == pixels, other.path
        assert other.splits == first.splits and other.mean == first.mean
    for split in ("train", "test"):
        assert _label_names(first, split) == _label_names(folder, split)
        # Tars hold the class numbers alone.
        same = np.unique(torch.stack([first.labels(split), tars.labels(split)]), axis=1)
        assert len(set(same[0])) == len(set(same[1])) == same.shape[1]


def test_pixels_are_those_of_the_pack(runs: dict[str, Path]) -> None:
    sys.path.insert(0, str(UNPACK.parent))
    try:
        from unpack import decode, load
    finally:
        sys.path.remove(str(UNPACK.parent))
    jpegs, labels, names = load("cifar100", "test", LIMIT)
    store = open_store(runs["imagefolder"] / "cifar100")
    expected = torch.from_numpy(decode(jpegs)).permute(0, 3, 1, 2)
    assert torch.equal(store.images("test"), expected)
    assert _label_names(store, "test") == [names[label] for label in labels]


def test_every_format_gives_the_same_result(runs: dict[str, Path]) -> None:
    first, *others = (load_distilled(runs[name] / "run") for name in FORMATS)
    assert first.images.shape == (10, 3, 32, 32) and first.targets.shape == (10, 16)
    for other in others:
        assert torch.equal(other.images, first.images)
        assert torch.equal(other.targets, first.targets)


def test_evaluation_has_every_method_and_seed(runs: dict[str, Path]) -> None:
    accuracies = []
    for name in FORMATS:
        (path,) = (runs[name] / "run/evaluation").glob("*.json")
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) == 5 * 2
        by_row = {(row["method"], row["seed"]): row["scores"] for row in rows}
        assert all(0 <= score["probe-5"] <= 100 for score in by_row.values())
        accuracies.append(by_row)
        page = (runs[name] / "run/report.html").read_text()
        assert "random_target" in page and "<img" in page
    # A folder's classes are numbered by their names, so it draws other labels for the probe.
    pickles, _, tars = accuracies
    assert pickles == tars
