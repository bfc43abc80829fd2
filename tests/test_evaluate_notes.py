"""What an evaluation says of its data: images that stand elsewhere too, and classes that differ."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError
from krrst_fast.evaluate.notes import check_classes, data_notes

DRAW = np.random.default_rng(0)
Split = tuple[np.ndarray, list[int]]


def images(count: int) -> np.ndarray:
    """Return random images [count, 8, 8, 3]."""
    return DRAW.integers(0, 256, (count, 8, 8, 3), np.uint8)


def store_of(folder: Path, train: Split, test: Split) -> ImageStore:
    """Prepare a store of these images and labels."""
    folder.mkdir()
    for name, (pixels, labels) in (("train", train), ("test", test)):
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.array(labels, np.int64))
    return prepare(PrepareConfig(source=str(folder), out=folder / "store", size=8))


def test_test_images_in_train_or_in_the_source_are_counted(tmp_path):
    train, test, source = images(12), images(6), images(20)
    test[0], test[1], test[2] = train[3], source[5], source[6]
    store = store_of(tmp_path / "a", (train, [0, 1] * 6), (test, [0, 1] * 3))
    other = store_of(tmp_path / "b", (source, [0, 1] * 10), (test[3:], [0, 1, 0]))
    told = "of 6 test images, these stand elsewhere too: 1 in train"
    unknown = "test images are not looked for in the distilled source: "
    assert data_notes(store, "test", None) == (told, f"{unknown}it is not known")
    assert data_notes(store, "test", store.path) == (told,)
    found, gone = data_notes(store, "test", tmp_path / "gone")
    assert found == told and gone.startswith(unknown) and "gone" in gone
    (found,) = data_notes(store, "test", other.path)
    assert found == f"{told}, 2 in the distilled source store"
    assert data_notes(other, "test", other.path) == ()


def test_classes_that_train_lacks_cap_the_accuracy(tmp_path):
    store = store_of(tmp_path / "a", (images(8), [0, 1] * 4), (images(4), [0, 1, 2, 0]))
    told = (
        "1 of 4 test images are of 1 of 3 classes that no train image has (2); "
        "accuracy is at most 75.0 per cent"
    )
    with pytest.warns(UserWarning, match="^evaluate: .*1 of 3 classes that no train image has"):
        assert data_notes(store, "test", store.path) == (told,)


def test_classes_that_test_lacks_are_said(tmp_path):
    store = store_of(tmp_path / "a", (images(9), [0, 1, 2] * 3), (images(4), [0, 1, 1, 0]))
    with pytest.warns(UserWarning, match="1 of 3 classes have train images and no test image"):
        assert len(data_notes(store, "test", store.path)) == 1


def test_no_class_in_common_and_a_single_class_are_errors(tmp_path):
    store = store_of(tmp_path / "a", (images(4), [0, 1] * 2), (images(3), [2, 3, 2]))
    with pytest.raises(DataError, match="no class in common: train has 0, 1, test 2, 3"):
        check_classes(store, "test")
    store = store_of(tmp_path / "b", (images(4), [0] * 4), (images(3), [0, 0, 0]))
    with pytest.raises(DataError, match="images of two classes or more, got 4 of 0"):
        check_classes(store, "test")


def test_equal_classes_give_no_warning(tmp_path):
    store = store_of(tmp_path / "a", (images(4), [0, 1] * 2), (images(3), [0, 1, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_classes(store, "test") is None


@pytest.mark.filterwarnings("always")
def test_the_command_ends_with_the_notes_and_the_file_keeps_them(tmp_path, capsys):
    train, test = images(20), images(6)
    test[0] = train[3]
    store = store_of(tmp_path / "a", (train, [0, 1] * 10), (test, [0, 1, 2] * 2))
    DistilledSet(
        images=torch.randn(4, 3, 8, 8),
        targets=torch.randn(4, 5),
        mean=store.mean,
        std=store.std,
        meta={},
    ).save(tmp_path / "distilled.safetensors")
    words = [
        *("evaluate", tmp_path / "distilled.safetensors", "--store", store.path),
        *("--methods", "distilled", "--seeds", 1, "--model.widths", "[4,8]"),
        *("--pretrain.steps", 2, "--probe.solver", "ridge", "--finetune.steps", 0),
    ]
    assert main([str(word) for word in words]) == 0
    out, err = capsys.readouterr()
    assert "of 6 test images, these stand elsewhere too: 1 in train" in out.splitlines()
    capped = [line for line in out.splitlines() if line.endswith("at most 66.7 per cent")]
    assert len(capped) == 1 and capped[0] in err
    saved = (tmp_path / "evaluation" / "store.json").read_text()
    assert capped[0] in saved
    few = [*map(str, words), "--probe.labels", "11", "--name", "few"]
    assert main(few) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "class 0 has only 10 labelled training images" in line and "labels 11" in line


def test_a_set_whose_kind_of_labels_is_unknown_is_refused(tmp_path, capsys):
    store = store_of(tmp_path / "a", (images(8), [0, 1] * 4), (images(4), [0, 1] * 2))
    path = tmp_path / "distilled.safetensors"
    DistilledSet(
        images=torch.randn(4, 3, 8, 8),
        targets=torch.randn(4, 5),
        mean=store.mean,
        std=store.std,
        meta={"label_kind": "clas"},
    ).save(path)
    assert main(["evaluate", str(path), "--store", str(store.path)]) == 2
    err = capsys.readouterr().err
    assert err == (
        f"krrst: error: {path}: label_kind must be one of representation, class, soft, got 'clas'\n"
    )
    assert not (tmp_path / "evaluation").exists()


def test_classes_are_no_representations_of_mkdt(tmp_path, capsys):
    torch.save(torch.randn(4, 3, 8, 8), tmp_path / "images_best.pt")
    torch.save(torch.arange(4), tmp_path / "labels_best.pt")
    out = tmp_path / "made.safetensors"
    words = ["import", str(tmp_path), "--out", str(out), "--mean", "0.5,0.5,0.5"]
    words += ["--std", "0.2,0.2,0.2", "--from"]
    assert main([*words, "mkdt"]) == 2
    err = capsys.readouterr().err
    assert "its labels are classes, and those of MKDT are representations" in err
    assert err.count("\n") == 1 and not out.exists()
    assert main([*words, "mtt"]) == 0
    assert capsys.readouterr().out.endswith("its targets are classes, one-hot\n")
