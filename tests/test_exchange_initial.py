"""An export that needs labels takes those of the images that the set began as, or says why not."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.store import LABELS
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.exchange import import_set
from krrst_fast.models import ModelConfig
from krrst_fast.targets import SSLAugmentConfig, TargetConfig, train_target

MODEL = ModelConfig(widths=(4, 8))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a labelled store, a target and a run of two steps."""
    folder = tmp_path_factory.mktemp("made")
    prepare(PrepareConfig(source="digits", out=folder / "store", size=8, limit=60))
    train_target(
        TargetConfig(
            store=folder / "store",
            out=folder / "target",
            model=MODEL,
            num_outputs=6,
            steps=1,
            batch_size=16,
            projector=(),
            augment=SSLAugmentConfig(saturation=0, hue=0, greyscale=0),
        ),
        progress=False,
    )
    for name, more in (("run", {}), ("noise", {"init_images": "noise"})):
        distill(
            DistillConfig(
                store=folder / "store",
                target=folder / "target",
                out=folder / name,
                num_images=7,
                steps=2,
                batch_size=16,
                seed=3,
                pool=PoolConfig(size=1, online_steps=2, model=MODEL),
                **more,
            ),
            progress=False,
        )
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, to be damaged: its run knows the store under its first name."""
    shutil.copytree(made, tmp_path / "made")
    config = tmp_path / "made" / "run" / "config.json"
    values = json.loads(config.read_text())
    values["store"] = str(tmp_path / "made" / "store")
    config.write_text(json.dumps(values))
    yield tmp_path / "made"


def _export(path: Path, to: str, out: Path) -> int:
    return main(["export", str(path), "--to", to, "--out", str(out)])


@pytest.mark.parametrize("to", ["dcbench", "lgm", "ddranking"])
def test_labels_are_those_of_the_nearest_images_of_the_store(
    made: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made / "run" if to != "lgm" else made / "run" / "distilled.safetensors"
    assert _export(path, to, tmp_path / "out") == 0
    assert "labels: those of the real images of store that the images began as; --labels" in (
        capsys.readouterr().out
    )
    # Found without the seed: two steps of a rate of 1e-4 have hardly moved an image.
    store, made_set = open_store(made / "store"), load_distilled(made / "run")
    real = store.images("train").flatten(1).float()
    nearest = torch.cdist(made_set.pixels().permute(0, 3, 1, 2).flatten(1).float(), real).argmin(1)
    about = json.loads((tmp_path / "out" / "krrst.json").read_text())
    assert about["labels"] == store.labels("train")[nearest].tolist()
    assert len(set(about["labels"])) > 2 and about["classes"] == list(store.classes)
    assert about["labels_from"] in (tmp_path / "out" / "README.md").read_text()
    assert torch.equal(import_set(tmp_path / "out").distilled.targets, made_set.targets)


def test_formats_that_hold_representations_get_no_labels(made: Path, tmp_path: Path) -> None:
    assert _export(made / "run", "imagefolder", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "krrst.json").read_text())["labels"] is None


def test_soft_labels_are_not_replaced(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_distilled(made / "run")
    soft = dataclasses.replace(found, meta={"label_kind": "soft"})
    soft.save(tmp_path / "soft.safetensors")
    assert _export(tmp_path / "soft.safetensors", "dcbench", tmp_path / "out") == 2
    assert "dcbench holds labels of kind class, and these are of kind soft" in (
        capsys.readouterr().err
    )


def _refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert _export(path, "dcbench", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "give labels with --labels" in line
    return line


def test_where_they_are_not_known_the_reason_is_said(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the run began with noise" in _refused(copy / "noise", tmp_path, capsys)
    shutil.copy(copy / "run" / "distilled.safetensors", tmp_path / "alone.safetensors")
    line = _refused(tmp_path / "alone.safetensors", tmp_path, capsys)
    assert f"{tmp_path / 'alone.safetensors'} lies in no folder of a run" in line
    # Of the same store, in the folder of a run that began with other images.
    shutil.copy(copy / "noise" / "distilled.safetensors", copy / "run" / "other.safetensors")
    line = _refused(copy / "run" / "other.safetensors", tmp_path, capsys)
    assert "other.safetensors: is the set of another run: init_images is 'noise' there" in line
    labels = copy / "store" / LABELS
    data = bytearray(labels.read_bytes())
    data[0] ^= 1
    labels.write_bytes(data)
    assert "the checksum is wrong" in _refused(copy / "run", tmp_path, capsys)
    shutil.move(copy / "store", tmp_path / "moved")
    assert "not an image store" in _refused(copy / "run", tmp_path, capsys)
    prepare(PrepareConfig(source="digits", out=copy / "store", size=8, limit=59))
    line = _refused(copy / "run", tmp_path, capsys)
    assert "holds other images than the run's store did" in line


def test_first_images_that_are_not_those_of_the_seed(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(copy / "noise" / "initial.safetensors", copy / "run" / "initial.safetensors")
    line = _refused(copy / "run", tmp_path, capsys)
    assert "initial.safetensors does not hold the images that the seed draws" in line
