"""The sets that come with the package: their names, their cards, and what they are worth."""

import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import DistilledSet, ImageStore, PrepareConfig, export_set, load_distilled, prepare
from krrst_fast.baselines.random_images import random_index
from krrst_fast.cli.main import main
from krrst_fast.data.augment import plain_views
from krrst_fast.distill.shipped import FOLDER, card_of, is_shipped, shipped_names
from krrst_fast.errors import DataError
from krrst_fast.evaluate.config import PretrainConfig
from krrst_fast.evaluate.labelled import draw_labelled
from krrst_fast.evaluate.pretrain import pretrain
from krrst_fast.evaluate.probe import accuracy, embed_both, ridge_scores
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.runs.seeding import derive

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ROOT / "tests" / "golden" / "digits_target.npy"
"""Outputs of the target that digits-30 was distilled from: 1,200 train digits, 597 test digits."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    out = tmp_path_factory.mktemp("digits") / "store"
    return prepare(PrepareConfig(source="digits", out=out, size=16), progress=False)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory without files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shipped_set_is_loaded_by_its_name(empty: Path) -> None:
    made = load_distilled("digits-30")
    assert repr(made) == "DistilledSet(30 images of 3x16x16, 64 targets, method='krr-st')"
    for other in (DistilledSet.load("digits-30"), load_distilled(Path("digits-30"))):
        assert torch.equal(other.images, made.images) and torch.equal(other.targets, made.targets)
    assert made.meta["license"] == "cc-by-4.0" and "10.24432/C50P49" in made.meta["source"]


@pytest.mark.parametrize("name", shipped_names())
def test_each_has_a_card_and_names_no_path_of_a_machine(name: str) -> None:
    card, made = card_of(name), load_distilled(FOLDER / f"{name}.safetensors")
    for word in (name, "krrst distill", "CC BY 4.0", "Limits", made.meta["target"]):
        assert word in card, word
    text = card + "".join(f"{key} {value}" for key, value in made.meta.items())
    for place in ("/tmp", "/home", "/root", "/work"):
        assert place not in text


def test_a_name_that_is_none_lists_those_that_are(empty: Path) -> None:
    with pytest.raises(DataError, match=r"digits-31: .* no shipped set .* \(shipped: digits-30\)"):
        load_distilled("digits-31")
    # A path is not the slip of a name.
    with pytest.raises(DataError, match=r"^a/digits-31: there is no such file or folder$"):
        load_distilled("a/digits-31")
    assert not is_shipped("./a/digits-30") and not is_shipped("")


def test_what_is_on_disk_wins_and_that_is_said(empty: Path) -> None:
    shipped = load_distilled("digits-30")
    mine = DistilledSet(
        images=shipped.images[:2], targets=shipped.targets[:2], mean=shipped.mean, std=shipped.std
    )
    (empty / "digits-30").mkdir()
    mine.save(empty / "digits-30" / "distilled.safetensors")
    with pytest.warns(UserWarning, match="digits-30: what is in the current directory is read"):
        assert len(load_distilled("digits-30")) == 2
    # A path that says where it lies is no name.
    assert len(load_distilled(empty / "digits-30")) == 2


def test_the_commands_take_the_name(
    empty: Path, digits: ImageStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "digits-30"]) == 0
    told = capsys.readouterr().out
    assert "kind     distilled set\n" in told and card_of("digits-30") in told

    assert main(["export", "digits-30", "--to", "imagefolder", "--out", "folder"]) == 0
    card = (empty / "folder" / "README.md").read_text()
    assert "license: cc-by-4.0\n" in card and "put the licence" not in card
    assert "| Made from | Optical Recognition of Handwritten Digits, E. Alpaydin" in card

    small = "--seeds 1 --model.widths 4 --pretrain.steps 1 --finetune.steps 0 --probe.solver ridge"
    words = f"evaluate digits-30 --store {digits.path} --methods distilled --name mine {small}"
    assert main(words.split()) == 0
    captured = capsys.readouterr()
    assert (empty / "evaluation" / "mine.json").exists()
    assert "krrst report" not in captured.out and captured.err.count("\n") == 0

    capsys.readouterr()
    for words in ("info digits-31", "evaluate digits-31 --store x", "export digits-31 --to npz"):
        assert main([*words.split(), *(["--out", "o"] if "export" in words else [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "shipped: digits-30" in line
    words = f"distill --store digits-30 --target x --out {empty}/o --num_images 3"
    assert main(words.split()) == 2
    assert "shipped" not in capsys.readouterr().err


@pytest.mark.parametrize("licence", ["mit\nevil: 1", "", "[a]"])
def test_a_licence_that_is_no_plain_word_stays_out_of_the_header(
    tmp_path: Path, licence: str
) -> None:
    made = load_distilled(FOLDER / "digits-30.safetensors")
    other = replace(made, meta={"method": "krr-st", "license": licence})
    card = (export_set(other, tmp_path / "out", to="npz") / "README.md").read_text()
    assert "license: unknown\n" in card and "put the licence of that set" in card


def _pretrained(images: Tensor, targets: Tensor, seed: int) -> Network:
    net = build(
        ModelConfig(widths=(16, 32, 64)),
        image_size=16,
        channels=3,
        num_outputs=targets.shape[1],
        seed=derive(seed, "network"),
    )
    pretrain(net, images, targets, PretrainConfig(steps=50), seed=seed)
    return net


def _both(seed: int, store: ImageStore) -> tuple[Network, Network]:
    """Pre-train on the shipped digits, and on as many real ones with the same target's outputs."""
    made, outputs = load_distilled("digits-30"), torch.from_numpy(np.load(OUTPUTS)).float()
    index = random_index(store, len(made), seed=seed)
    real = plain_views(store.images("train"), index, made.mean, made.std)
    ours = _pretrained(made.images, made.targets, seed)
    return ours, _pretrained(real, outputs[index], seed)


def test_more_of_the_target_is_learnt_from_them_than_from_real_digits(
    digits: ImageStore, empty: Path
) -> None:
    """Measured: a held-out R2 of 0.65 and of 0.49 after 50 steps, the difference +- 0.04."""
    wanted = torch.from_numpy(np.load(OUTPUTS)).float()[digits.count("train") :]
    variance = float(wanted.var(0, correction=0).mean())
    images = plain_views(digits.images("test"), torch.arange(597), digits.mean, digits.std)
    errors = []
    for seed in range(4):
        nets = _both(seed, digits)
        with torch.no_grad():
            errors.append([float((net(images) - wanted).square().mean()) for net in nets])
    ours, theirs = (1 - statistics.fmean(column) / variance for column in zip(*errors))
    assert ours > 0.53 and ours - theirs > 0.06, (ours, theirs)


def _probes(net: Network, store: ImageStore, seed: int) -> tuple[float, float]:
    """Return the accuracies on test digits of probes on features and on outputs."""
    labels, wanted = store.labels("train"), store.labels("test")
    draws = [
        draw_labelled(labels, 10, 2, seed=derive(seed, "draw", draw), where="")
        for draw in range(20)
    ]
    drawn, scale = torch.cat(draws).unique(), {"mean": store.mean, "std": store.std}
    train = embed_both(net, store.images("train"), drawn, **scale)
    test = embed_both(net, store.images("test"), torch.arange(len(wanted)), **scale)
    means = []
    for known, asked in zip(train, test):
        scores = [
            ridge_scores(known[torch.searchsorted(drawn, index)], labels[index], asked, 10, 0.1)
            for index in draws
        ]
        means.append(statistics.fmean(accuracy(one, wanted) for one in scores))
    return means[0], means[1]


@pytest.mark.slow
def test_their_probe_gain_over_real_digits_holds(digits: ImageStore, empty: Path) -> None:
    """Measured: 1.9 +- 0.4 points on features and 5.6 +- 1.2 on outputs.

    Errors of 1e-5 in the images, which stand for other processors, change that by 0.3; other random
    digits in place of the set gain 0.5 +- 0.6 and 0.2 +- 1.5 over the same rivals.
    """
    gains = []
    for seed in range(8):
        ours, theirs = (_probes(net, digits, seed) for net in _both(seed, digits))
        gains.append([a - b for a, b in zip(ours, theirs)])
    on_features, on_outputs = (statistics.fmean(column) for column in zip(*gains))
    assert on_features > 1 and on_outputs > 3, gains


@pytest.mark.slow
def test_the_sets_are_in_the_source_distribution_and_in_the_wheel(tmp_path: Path) -> None:
    # A copy, since a build writes beside what it builds.
    tree = tmp_path / "tree"
    for folder in ("krrst_fast", "kernels", "csrc"):
        shutil.copytree(
            ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    env = {**os.environ, "KRRST_FAST_BUILD": "0"}

    def build_it(folder: Path, command: str) -> None:
        words = [sys.executable, "setup.py", "--quiet", command, "--dist-dir", str(tmp_path)]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    build_it(tree, "sdist")
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build_it(unpacked, "bdist_wheel")
    (wheel,) = tmp_path.glob("*.whl")
    found = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"krrst_fast/sets/{path.name}" for path in FOLDER.iterdir()}
    assert {"krrst_fast/sets/digits-30.md", *wanted} <= found
