"""Images in two splits of a store, and classes in one of them only, are found, counted and said."""

from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.data.splits import class_gaps, overlap_in_words, remarks, repeated
from krrst_fast.errors import DataError

DRAW = np.random.default_rng(0)


def images(count: int) -> np.ndarray:
    """Return random images [count, 8, 8, 3]."""
    return DRAW.integers(0, 256, (count, 8, 8, 3), np.uint8)


def write(folder: Path, **splits: tuple[np.ndarray, list[int]]) -> Path:
    """Write splits as npz files, of which each holds images and labels."""
    folder.mkdir(parents=True)
    for name, (pixels, labels) in splits.items():
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.array(labels, np.int64))
    return folder


def store_of(folder: Path, **splits: tuple[np.ndarray, list[int]]) -> ImageStore:
    """Prepare a store of such files."""
    source = write(folder / "source", **splits)
    return prepare(PrepareConfig(source=str(source), out=folder / "store", size=8))


def test_repeated_images_are_the_equal_ones():
    some = torch.from_numpy(images(50)).movedim(3, 1).contiguous()
    others = torch.cat([some[[30, 4, 4]], some[:1] ^ 1])
    assert repeated(some, others).tolist() == [4, 30]
    assert repeated(others, some).tolist() == [0, 1, 2]
    assert repeated(some, others[:0]).tolist() == repeated(some[:0], others).tolist() == []
    assert repeated(some, some.reshape(50, 3, 4, 16)).tolist() == []  # the same bytes, no image


def test_one_pixel_makes_another_image():
    some = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for channel, row, column in ((0, 0, 0), (2, 7, 7), (1, 3, 5)):
        other = some.clone()
        other[0, channel, row, column] = 1
        assert not len(repeated(some, other))


def test_images_of_one_kind_take_no_longer():
    blank = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)  # 16 million pairs
    assert len(repeated(blank, blank)) == 4000


def test_each_split_beside_train_is_compared_with_it(tmp_path):
    train, val, test = images(20), images(6), images(10)
    val[0], test[3], test[4] = train[1], train[7], train[7]
    store = store_of(
        tmp_path,
        train=(train, [0, 1] * 10),
        val=(val, [0, 1] * 3),
        test=(test, [0, 1] * 5),
    )
    told = "2 of 10 test images and 1 of 6 val images stand in train too"
    assert sorted(overlap_in_words(store).split()) == sorted(told.split())
    assert remarks(store) == (overlap_in_words(store),)


def test_classes_of_one_split_only_are_named_and_counted(tmp_path):
    labels = [0, 1, 2, 3, 4, 5, 6] * 2
    store = store_of(
        tmp_path, train=(images(14), labels), test=(images(9), [0, 1, 7, 7, 8, 0, 1, 1, 1])
    )
    gaps = class_gaps(store, "test")
    assert gaps is not None and (gaps.images, gaps.total, gaps.classes) == (3, 9, 9)
    assert gaps.untrained == ("7", "8") and gaps.untested == ("2", "3", "4", "5", "6")
    assert str(gaps) == (
        "3 of 9 test images are of 2 of 9 classes that no train image has (7, 8); 5 of 9 classes "
        "have train images and no test image (2, 3, 4, 5 and 1 more)"
    )
    assert remarks(store) == (str(gaps),)


def test_splits_that_are_as_they_should_be_have_no_remark(tmp_path):
    store = store_of(tmp_path, train=(images(6), [0, 1] * 3), test=(images(4), [0, 1] * 2))
    assert remarks(store) == () and class_gaps(store, "test") is None
    alone = store_of(tmp_path / "alone", train=(images(6), [0, 1] * 3))
    assert remarks(alone) == ()


def test_prepare_says_it_in_a_line_each(tmp_path, capsys):
    train, test = images(6), images(4)
    test[1] = train[5]
    source = write(tmp_path / "source", train=(train, [0, 1] * 3), test=(test, [0, 2, 0, 0]))
    assert main(["prepare", str(source), str(tmp_path / "store"), "--size", "8"]) == 0
    out, err = capsys.readouterr()
    assert "left out: nothing" in out
    assert err.splitlines() == [
        "krrst: warning: prepare: 1 of 4 test images stand in train too",
        "krrst: warning: prepare: 1 of 4 test images are of 1 of 3 classes that no train image has "
        "(2); 1 of 3 classes have train images and no test image (1)",
    ]


@pytest.mark.parametrize("label", [-2, 2, 1000])
def test_a_label_that_is_no_class_is_an_error(tmp_path, label):
    store = store_of(tmp_path, train=(images(6), [0, 1] * 3))
    labels = np.fromfile(store.path / "labels.i64", "<i8")
    labels[4] = label
    labels.tofile(store.path / "labels.i64")
    with pytest.raises(DataError, match=f"label {label} is not among 2 classes, counted from 0"):
        store.labels("train")
