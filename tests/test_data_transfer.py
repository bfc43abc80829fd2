"""The sets that transfer is measured on, in the layouts of their authors, and what may be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="needs scipy, which writes the .mat files")
from scipy.io import savemat

from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.data.formats import open_source
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


def append(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text() + text)


def replace(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


def parts(train: list[int], test: list[int]) -> Callable[[Path], object]:
    return mat(trnid=[train], valid=[[4, 5, 6]], tstid=[test])


def cars_in_one(names: list[str], test: list[int]) -> Callable[[Path], object]:
    columns = {"relative_im_path": names, "class": [1] * len(names), "test": test}
    rows = published.records(**columns)
    return mat(annotations=rows, class_names=published.cells(*published.CARS))


def dogs(*names: str, labels: list[int]) -> Callable[[Path], object]:
    return mat(file_list=published.cells(*names), labels=np.array(labels)[:, None])


BIRDS, PLANES = "CUB_200_2011/", "fgvc-aircraft-2013b/data/"
CAR, CHIHUAHUA = "car_ims/000001.jpg", "n02085620-Chihuahua/n02085620_0.jpg"

# Rows that were dropped or moved in silence, and images that were both trained and tested on.
BY_BIRD, IS_TRAIN = BIRDS + "image_class_labels.txt", BIRDS + "train_test_split.txt"
TESTED = PLANES + "images_variant_test.txt"
CUB, AIRCRAFT, CARS = "CUB-200-2011", "FGVC-Aircraft", "Stanford Cars in one"
TWICE, BOTH = "is listed more than once", "is listed in train and in test"
LISTS: list[tuple[str, str, Callable[[Path], object], str]] = [
    (CUB, IS_TRAIN, append("13 0\n"), "such as 13 in train_test_split"),
    (CUB, BY_BIRD, append("13 1\n"), "such as 13 in image_class_labels"),
    (CUB, BIRDS + "images.txt", append("13 a/b.jpg\n"), "such as 13 in images.txt"),
    (CUB, IS_TRAIN, append("1 0\n"), f"number 1 {TWICE}"),
    (CUB, IS_TRAIN, replace("3 1\n", "3 2\n"), "splits must be 0 or 1, got 2"),
    (CUB, BIRDS + "images.txt", replace("0003", "0000"), f"_0000.jpg {TWICE}"),
    (CUB, BIRDS + "classes.txt", replace("3 003", "4 003"), "number its 3 classes from 1"),
    (AIRCRAFT, TESTED, append("0000001 707-320\n"), f"0000001.jpg {TWICE}"),
    (AIRCRAFT, TESTED, append("0000100 707-320\n"), f"0000100.jpg {BOTH}"),
    (AIRCRAFT, TESTED, replace("0", "../0"), "does not lie in images"),
    (AIRCRAFT, PLANES + "variants.txt", append("707-320\n"), f"707-320 {TWICE}"),
    ("Flowers-102", "setid.mat", parts([1, 2, 3, 3], [7, 8]), f"image_00003.jpg {TWICE}"),
    ("Flowers-102", "setid.mat", parts([1, 2, 4], [7, 8]), f"image_00004.jpg {TWICE}"),
    ("Flowers-102", "setid.mat", parts([1], [2, 1]), f"image_00001.jpg {BOTH}"),
    (CARS, "cars_annos.mat", cars_in_one([CAR] * 2, [0, 1]), f"000001.jpg {BOTH}"),
    (CARS, "cars_annos.mat", cars_in_one([CAR] * 2, [1, 1]), f"000001.jpg {TWICE}"),
    (CARS, "cars_annos.mat", cars_in_one([CAR], [2]), "splits must be 0 or 1, got 2"),
    ("Stanford Dogs", "test_list.mat", dogs(CHIHUAHUA, labels=[1]), f"_0.jpg {BOTH}"),
    ("Stanford Dogs", "test_list.mat", dogs(CHIHUAHUA, labels=[4]), "more than one label"),
]

UNLISTED = {
    "FGVC-Aircraft": PLANES + "images/9.jpg",
    "CUB-200-2011": BIRDS + "images/001.Black_footed_Albatross/new.jpg",
    "Stanford Cars": "cars_test/00099.jpg",
    "Stanford Cars in one": "car_ims/000099.jpg",
    "Stanford Dogs": "Images/n02085620-Chihuahua/n02085620_99.jpg",
    "Flowers-102": "jpg/image_00013.jpg",
}


def test_a_set_may_be_named_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.flowers(tmp_path / "set")
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    assert open_source("../beside/../set", 8).left_out == ()


@pytest.mark.parametrize("name", UNLISTED)
def test_images_in_no_list_are_counted(name: str, tmp_path: Path) -> None:
    published.SETS[name](tmp_path / "set")
    published.photo(tmp_path / "set" / UNLISTED[name], 0)
    (left,) = [
        one for one in open_source(str(tmp_path / "set"), 8).left_out if "in no list" in one.reason
    ]
    assert Path(left.name) == tmp_path / "set" / UNLISTED[name]
    store = prepared(tmp_path / "set")
    assert {split: store.count(split) for split in store.splits} == {"train": 6, "test": 6}
    assert json.loads((tmp_path / "store/index.json").read_text())["left_out"][left.reason] == 1


@pytest.mark.parametrize("name", ["Stanford Cars in one", "Flowers-102"])
def test_strict_takes_a_whole_set_and_no_more(name: str, tmp_path: Path) -> None:
    published.SETS[name](tmp_path / "set")
    for out in ("whole", "more"):
        config = PrepareConfig(
            source=str(tmp_path / "set"), out=tmp_path / out, size=8, strict=True
        )
        if out == "whole":
            assert prepare(config).count("train") == 6
            published.photo(tmp_path / "set" / UNLISTED[name], 0)
        else:
            with pytest.raises(DataError, match="1 files would be left out.*is in no list"):
                prepare(config)


VERSION_7_3 = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(384)
"""The header of a file in HDF5."""

FAULTS: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("Flowers-102", "imagelabels.mat", write(b"no matlab" * 50), "not a readable .mat file"),
    ("Flowers-102", "imagelabels.mat", write(b""), "not a readable .mat file"),
    ("Flowers-102", "imagelabels.mat", write(VERSION_7_3), "of version 7.3; save it in MATLAB"),
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
        "11 numbers are in one of the two alone, such as 2 in images.txt",
    ),
    ("CUB-200-2011", "CUB_200_2011/image_class_labels.txt", write(b"\xff\xfe"), "not a text file"),
    (
        "FGVC-Aircraft",
        "fgvc-aircraft-2013b/data/images_variant_test.txt",
        write(b"0000001 Boeing 1\n"),
        "names no variant of variants.txt",
    ),
]


@pytest.mark.parametrize(("name", "file", "spoil", "told"), FAULTS + LISTS)
def test_what_does_not_belong_together_is_refused(
    name: str, file: str, spoil: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    published.SETS[name](tmp_path / "set")
    spoil(tmp_path / "set" / file)
    with pytest.raises(DataError, match=told):
        prepared(tmp_path / "set")
    assert not (tmp_path / "store").exists()
