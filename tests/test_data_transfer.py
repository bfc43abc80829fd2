"""The sets that transfer is measured on, in the layouts of their authors, and what may be wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="needs scipy, which writes the .mat files")
from scipy.io import savemat

from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.errors import DataError
from tests import published

CLASSES = {
    "FGVC-Aircraft": ("707-320", "F/A-18", "Falcon 900"),
    "Stanford Cars": published.CARS,
    "Stanford Dogs": ("n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog"),
    "Flowers-102": ("1", "2", "3"),
    "STL-10": ("airplane", "bird", "car"),
}


def prepared(folder: Path) -> ImageStore:
    return prepare(PrepareConfig(source=str(folder), out=folder.parent / "store", size=8))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", published.SETS)
def test_published_layouts(name: str, wrapped: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    published.SETS[name](folder / "unpacked" if wrapped else folder)
    store = prepared(folder)
    assert {split: store.count(split) for split in store.splits} == {"train": 6, "test": 6}
    for split in store.splits:
        labels = store.labels(split)
        assert labels.bincount().tolist()[:3] == [2, 2, 2]
        level = store.images(split).float().mean((1, 2, 3))
        assert (level - 40 * labels).abs().max() < 6  # each image has the label of its grey level
    if name in CLASSES:
        assert store.classes == CLASSES[name]


def test_stl10_is_stored_column_after_column(tmp_path: Path) -> None:
    published.stl10(tmp_path / "set")
    first = prepared(tmp_path / "set").images("train")[0]
    assert torch.equal(first[:, :, :4], torch.full((3, 8, 4), 5, dtype=torch.uint8))
    assert first[:, :, 4:].max() == 0


def test_zero_of_svhn_is_ten_in_the_file(tmp_path: Path) -> None:
    published.svhn(tmp_path / "set")
    store = prepared(tmp_path / "set")
    assert store.classes == tuple("0123456789")
    assert store.labels("train").tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("STL-10", "unlabelled part"),
        ("SVHN", "extra part"),
        ("CUB-200-2011", "bounding_boxes.txt"),
        ("Stanford Dogs", "Annotation"),
    ],
)
def test_what_is_left_out_is_said(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.SETS[name](tmp_path / "set")
    with pytest.raises(DataError, match=told):
        source, out = str(tmp_path / "set"), tmp_path / "store"
        prepare(PrepareConfig(source=source, out=out, size=8, strict=True))


def test_cars_without_the_labels_of_the_test_images(tmp_path: Path) -> None:
    published.cars(tmp_path / "set", labelled=False)
    assert list(prepared(tmp_path / "set").splits) == ["train"]
    with pytest.raises(DataError, match="cars_test_annos_withlabels.mat, are not there"):
        source, out = str(tmp_path / "set"), tmp_path / "other"
        prepare(PrepareConfig(source=source, out=out, size=8, strict=True))


def write(text: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text)


def mat(**variables: object) -> Callable[[Path], object]:
    return lambda path: savemat(path, variables)


def delete(path: Path) -> None:
    path.unlink()


FAULTS: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("Flowers-102", "imagelabels.mat", write(b"no matlab" * 50), "not a readable .mat file"),
    ("Flowers-102", "imagelabels.mat", write(b""), "not a readable .mat file"),
    ("Flowers-102", "imagelabels.mat", mat(label=[[1, 2]]), "holds no variable labels"),
    ("Flowers-102", "imagelabels.mat", mat(labels=[[1, 2]]), "images beyond the 2 labelled"),
    ("Flowers-102", "imagelabels.mat", mat(labels=np.zeros((1, 12))), "labels must be from 1 to"),
    ("Flowers-102", "imagelabels.mat", mat(labels=[[1.5] * 12]), "must hold whole numbers"),
    ("Flowers-102", "imagelabels.mat", mat(labels="text"), "must hold whole numbers"),
    ("Flowers-102", "imagelabels.mat", mat(labels=[[1e300] * 12]), "must hold whole numbers"),
    ("Flowers-102", "setid.mat", delete, "setid.mat: there is no such file"),
    ("Flowers-102", "jpg/image_00007.jpg", delete, "6 images, of which 1 are not there, such as"),
    ("Stanford Cars", "devkit/cars_meta.mat", mat(class_names=[1, 2]), "a cell array of texts"),
    ("Stanford Cars", "devkit/cars_meta.mat", mat(class_names=published.cells("a")), "from 1 to 1"),
    ("Stanford Cars", "devkit/cars_train_annos.mat", mat(annotations=[1]), "has no field fname"),
    ("Stanford Dogs", "train_list.mat", mat(file_list=published.cells("a/b"), labels=[]), "none"),
    ("SVHN", "train_32x32.mat", mat(X=np.zeros((2, 2, 3, 4)), y=[1] * 4), "X must be uint8"),
    ("SVHN", "train_32x32.mat", mat(X=np.zeros((2, 2, 3, 4), "u1"), y=[[1]] * 3), "for each of 4"),
    ("SVHN", "train_32x32.mat", mat(X=np.zeros((2, 2, 3, 1), "u1"), y=[[0]]), "from 1 to 10"),
    ("STL-10", "stl10_binary/test_X.bin", write(b"x" * 1000), "cut short"),
    ("STL-10", "stl10_binary/test_y.bin", write(b"\x01\x02"), "for each of 6 images"),
    ("STL-10", "stl10_binary/test_y.bin", write(b"\x04" * 6), "must be from 1 to 3, got 4 to 4"),
    ("STL-10", "stl10_binary/train_y.bin", delete, "train_y.bin: there is no such file"),
    ("CUB-200-2011", "CUB_200_2011/classes.txt", write(b"1 a\n"), "must be from 1 to 1"),
    ("CUB-200-2011", "CUB_200_2011/images.txt", write(b"one a\n"), "a number and a value"),
    (
        "CUB-200-2011",
        "CUB_200_2011/image_class_labels.txt",
        write(b"1 1\n"),
        "no label or no split",
    ),
    ("CUB-200-2011", "CUB_200_2011/image_class_labels.txt", write(b"\xff\xfe"), "not a text file"),
    (
        "FGVC-Aircraft",
        "fgvc-aircraft-2013b/data/images_variant_test.txt",
        write(b"0000001 Boeing 1\n"),
        "names no variant of variants.txt",
    ),
]


@pytest.mark.parametrize(("name", "file", "spoil", "told"), FAULTS)
def test_what_does_not_belong_together_is_refused(
    name: str, file: str, spoil: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    published.SETS[name](tmp_path / "set")
    spoil(tmp_path / "set" / file)
    with pytest.raises(DataError, match=told):
        prepared(tmp_path / "set")
    assert not (tmp_path / "store").exists()
