"""Sources that disagree with themselves, and names that sort in unexpected ways."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.data.source import natural
from krrst_fast.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)


def prepared(source: Path, tmp_path: Path) -> ImageStore:
    prepare(PrepareConfig(source=str(source), out=tmp_path / "store", size=6))
    return open_store(tmp_path / "store")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_table(path: Path, labels: Any, names: list[str] | None = None) -> None:
    import json

    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [png(x) for x in PIXELS[: len(labels)]], "label": labels})
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    said = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    pq.write_table(table.replace_schema_metadata(said), path)


def test_files_whose_classes_have_another_order(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in" / "train.parquet", [0, 1], ["cat", "dog"])
    write_table(tmp_path / "in" / "test.parquet", [0, 1], ["dog", "cat"])
    with pytest.raises(DataError, match="train.parquet: its labels or classes are not those of"):
        prepared(tmp_path / "in", tmp_path)


def test_files_of_which_one_has_words(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_table(tmp_path / "in" / "train.parquet", ["cat", "dog"])
    write_table(tmp_path / "in" / "test.parquet", [0, 1])
    with pytest.raises(DataError, match="its labels or classes are not those of"):
        prepared(tmp_path / "in", tmp_path)


def test_categories_are_words(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    write_table(tmp_path / "x.parquet", pa.array(["dog", "cat", "dog"]).dictionary_encode())
    store = prepared(tmp_path / "x.parquet", tmp_path)
    assert store.classes == ("cat", "dog") and store.labels("train").tolist() == [1, 0, 1]


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False], [[0], [1]]], ids=str)
def test_labels_of_another_type_are_not_dropped(tmp_path: Path, labels: list[Any]) -> None:
    write_table(tmp_path / "x.parquet", labels)
    with pytest.raises(DataError, match="column label must hold integers or words, got"):
        prepared(tmp_path / "x.parquet", tmp_path)


def test_archives_whose_classes_differ(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, classes in (("train", ["a", "b"]), ("test", ["b", "a"])):
        np.savez(
            tmp_path / "in" / f"{name}.npz", images=PIXELS, labels=[0, 1, 0, 1], class_names=classes
        )
    with pytest.raises(DataError, match="its class_names are not those of"):
        prepared(tmp_path / "in", tmp_path)


def test_names_of_classes_that_are_bytes(tmp_path: Path) -> None:
    names = np.array([b"cat", b"dog"])
    np.savez(tmp_path / "x.npz", images=PIXELS, labels=[0, 1, 0, 1], class_names=names)
    assert prepared(tmp_path / "x.npz", tmp_path).classes == ("cat", "dog")


def test_flat_rows_count_from_zero_where_every_label_has_a_name(tmp_path: Path) -> None:
    flat = PIXELS.transpose(0, 3, 1, 2).reshape(4, -1)
    np.savez(tmp_path / "x.npz", data=flat, labels=[1, 2, 1, 2], class_names=["a", "b", "c"])
    assert prepared(tmp_path / "x.npz", tmp_path).labels("train").tolist() == [1, 2, 1, 2]


def test_a_wrapped_set_beside_a_folder_without_images(tmp_path: Path) -> None:
    """As the zip files of a Mac have it."""
    for split in ("train", "test"):
        for name in ("x", "y"):
            path = tmp_path / "in" / "a" / "b" / split / name / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(png(PIXELS[0]))
    (tmp_path / "in" / "__MACOSX" / "a").mkdir(parents=True)
    (tmp_path / "in" / "__MACOSX" / "a" / "._b").write_bytes(b"x")
    store = prepared(tmp_path / "in", tmp_path)
    assert {split: store.count(split) for split in store.splits} == {"train": 2, "test": 2}
    assert store.classes == ("x", "y")


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("train2017", "val2017")])
def test_folders_that_are_called_nearly_like_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.png").write_bytes(png(PIXELS[0]))
    with pytest.raises(DataError, match="splits or classes. Call them train and test"):
        prepared(tmp_path / "in", tmp_path)
    config = PrepareConfig(
        source=str(tmp_path / "in"), out=tmp_path / "out", size=6, layout="classes"
    )
    assert prepare(config).classes == tuple(sorted(names))


def test_integers_whose_range_is_not_known(tmp_path: Path) -> None:
    pixels = PIXELS[0, :, :, 0].astype(np.int32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: .*whether they are of 8 or of 16 bits"):
        prepared(tmp_path, tmp_path)


def test_numbers_of_any_length_sort_as_numbers() -> None:
    names = ["a9", "a10", "a010", "b1", "a" + "7" * 5000, "a", "a9b10", "a9b9"]
    assert sys.get_int_max_str_digits() < 5000
    order = ["a", "a9", "a9b9", "a9b10", "a010", "a10", "a" + "7" * 5000, "b1"]
    assert sorted(names, key=natural) == order
