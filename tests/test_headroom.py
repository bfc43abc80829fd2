"""Whether a target has anything to distil, from a few labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.evaluate.headroom import CLASSES, ENOUGH, PER_CLASS, SCORED, _drawn, headroom
from krrst_fast.targets import TargetConfig, load_target, train_target


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    out = tmp_path_factory.mktemp("headroom") / "digits"
    return prepare(PrepareConfig(source="digits", out=out, size=8, limit=400))


def table(store: ImageStore, features: np.ndarray, folder: Path) -> Path:
    """Make a target of a matrix of features."""
    np.save(folder / "features.npy", features)
    encoder = str(folder / "features.npy")
    config = TargetConfig(store=store.path, out=folder / "target", encoder=encoder, num_outputs=8)
    train_target(config, progress=False)
    return folder / "target"


def test_outputs_that_are_the_classes_have_headroom_and_noise_has_none(
    store: ImageStore, tmp_path: Path
) -> None:
    labels = store.labels("train").numpy()
    noise = np.random.default_rng(0).standard_normal((len(labels), 10)).astype(np.float32)
    (tmp_path / "good").mkdir()
    good = load_target(
        table(store, 5 * np.eye(10, dtype=np.float32)[labels] + noise, tmp_path / "good")
    )
    found = headroom(store, good)
    assert found is not None and found.target > 90 and found.avoided > ENOUGH
    assert (found.classes, found.labels_per_class, found.scored) == (10, 5, 350)
    (tmp_path / "bad").mkdir()
    bad = headroom(store, load_target(table(store, noise, tmp_path / "bad")))
    assert bad is not None and bad.target < 25 and bad.avoided < 0
    assert bad.untrained == found.untrained > 30
    assert headroom(store, good) == found


def test_the_command_line_warns_where_there_is_nothing(
    store: ImageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "f.npy", np.random.default_rng(1).standard_normal((400, 10)))
    argv = [
        "target",
        "--store",
        str(store.path),
        "--out",
        str(tmp_path / "t"),
        "--num_outputs",
        "4",
    ]
    assert main([*argv, "--encoder", str(tmp_path / "f.npy")]) == 0
    out, err = capsys.readouterr()
    assert "a probe with 5 labels a class: the target's outputs" in out
    assert "there may be nothing to distil" in err


def test_an_unlabelled_store_has_no_answer(store: ImageStore, tmp_path: Path) -> None:
    pixels = store.images("train").permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "train.npz", images=pixels)
    source = str(tmp_path / "train.npz")
    bare = prepare(PrepareConfig(source=source, out=tmp_path / "bare", size=8))
    target = load_target(table(bare, np.random.rand(400, 9), tmp_path))
    assert headroom(bare, target) is None


def test_images_that_are_scored_were_not_fitted() -> None:
    labels = torch.randint(80, (6000,), generator=torch.Generator().manual_seed(0))
    drawn = _drawn(labels, torch.Generator().manual_seed(1))
    assert drawn is not None
    fitted, scored, of = drawn
    assert len(fitted) == PER_CLASS * CLASSES and len(scored) == SCORED
    assert not set(fitted.tolist()) & set(scored.tolist())
    both = torch.cat([fitted, scored])
    names = {int(new): int(old) for new, old in zip(of, labels[both])}
    assert len(set(names.values())) == CLASSES
    assert all(names[int(new)] == int(old) for new, old in zip(of, labels[both]))


@pytest.mark.parametrize("labels", [[0] * 9, [0, 1, 2], [-1] * 5, []])
def test_too_few_labels_have_no_answer(labels: list[int]) -> None:
    assert _drawn(torch.tensor(labels, dtype=torch.int64), torch.Generator()) is None


def test_classes_with_few_images_are_compared_with_fewer_labels() -> None:
    drawn = _drawn(torch.tensor([0, 0, 0, 1, 1, 2, 5, 5, 5]), torch.Generator().manual_seed(0))
    assert drawn is not None
    fitted, scored, of = drawn
    assert (len(fitted), len(scored)) == (3, 5)
    assert of.max() == 2
