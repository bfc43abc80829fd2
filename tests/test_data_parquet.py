"""Parquet and Arrow files in the layouts in which Hugging Face data sets are published."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ("ant", "bee", "cat")
PIXELS = np.random.default_rng(0).integers(0, 256, (150, 6, 6, 3), np.uint8)
LABELS = [i % 3 for i in range(150)]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def table(rows: range, *, image: str = "image", label: str | None = "label", words: bool = False):
    """A table as `datasets` writes it: {bytes, path}, and the class names in the metadata."""
    images = [{"bytes": png(PIXELS[i]), "path": f"{i}.png"} for i in rows]
    columns: dict[str, Any] = {image: images}
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if label:
        columns[label] = [CLASSES[LABELS[i]] if words else LABELS[i] for i in rows]
        features[label] = {"names": list(CLASSES), "_type": "ClassLabel"}
    said = {} if words else {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(said)


def write_arrow(path: Path, rows: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    found = table(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, found.schema) as stream:
        stream.write_table(found, max_chunksize=7)


def prepared(source: Path, tmp_path: Path) -> ImageStore:
    prepare(PrepareConfig(source=str(source), out=tmp_path / "store", size=6))
    return open_store(tmp_path / "store")


def check(store: ImageStore, counts: dict[str, range]) -> None:
    assert store.classes == CLASSES
    for split, rows in counts.items():
        labels = store.labels(split)
        assert labels is not None and labels.tolist() == [LABELS[i] for i in rows]
        assert np.array_equal(store.images(split).permute(0, 2, 3, 1).numpy(), PIXELS[rows])


def test_a_published_repository(tmp_path: Path) -> None:
    """Shards in `data`, ten of them, whose order is that of their numbers."""
    (tmp_path / "in" / "data").mkdir(parents=True)
    for i in range(10):
        path = tmp_path / "in" / "data" / f"train-{i:05d}-of-00010.parquet"
        pq.write_table(table(range(10 * i, 10 * i + 10), image="img"), path, row_group_size=3)
    path = tmp_path / "in" / "data" / "validation-00000-of-00001.parquet"
    pq.write_table(table(range(100, 150), image="img"), path)
    check(prepared(tmp_path / "in", tmp_path), {"train": range(100), "test": range(100, 150)})


def test_what_save_to_disk_writes(tmp_path: Path) -> None:
    write_arrow(tmp_path / "in" / "train" / "data-00000-of-00001.arrow", range(100))
    write_arrow(tmp_path / "in" / "test" / "data-00000-of-00001.arrow", range(100, 150))
    write_arrow(tmp_path / "in" / "train" / "cache-1f.arrow", range(3))
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    check(prepared(tmp_path / "in", tmp_path), {"train": range(100), "test": range(100, 150)})


def test_labels_that_are_words(tmp_path: Path) -> None:
    pq.write_table(table(range(50), words=True), tmp_path / "cats.parquet")
    check(prepared(tmp_path / "cats.parquet", tmp_path), {"train": range(50)})


def test_plain_bytes_without_labels(tmp_path: Path) -> None:
    found = pa.table({"id": list(range(5)), "jpg": [png(PIXELS[i]) for i in range(5)]})
    pq.write_table(found, tmp_path / "x.parquet")
    store = prepared(tmp_path / "x.parquet", tmp_path)
    assert not store.has_labels
    assert np.array_equal(store.images("train").permute(0, 2, 3, 1).numpy(), PIXELS[:5])


@pytest.mark.parametrize(
    "columns,message",
    [
        ({"label": [1, 2]}, "need one column of image files"),
        ({"left": [b"a", b"b"], "right": [b"a", b"b"]}, "its columns are left, right"),
        ({"image": [{"bytes": None, "path": "a.png"}]}, r"\[0\]: the image is not in the file"),
    ],
)
def test_what_is_refused(tmp_path: Path, columns: dict[str, list], message: str) -> None:
    found = pa.table(columns)
    if "image" in columns:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        found = pa.table({"image": pa.array(columns["image"], kind)})
    pq.write_table(found, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=message):
        prepared(tmp_path / "x.parquet", tmp_path)


def test_two_columns_of_classes(tmp_path: Path) -> None:
    found = table(range(3), label="colour")
    features = {name: {"names": ["a", "b"], "_type": "ClassLabel"} for name in ("colour", "shape")}
    found = found.append_column("shape", [[0, 1, 0]])
    said = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(found.replace_schema_metadata(said), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="which column is the label. There are colour, shape"):
        prepared(tmp_path / "x.parquet", tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -9])
def test_damage_is_named(tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(table(range(50)), path)
    else:
        write_arrow(path, range(50))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"x\.{suffix}: not a readable {suffix} file"):
        prepared(path, tmp_path)


def test_an_arrow_file_without_its_end(tmp_path: Path) -> None:
    """Its batches are whole: it would read like a shorter one."""
    write_arrow(tmp_path / "x.arrow", range(50))
    whole = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(whole[:-8])
    with pytest.raises(DataError, match="x.arrow: not a readable arrow file .it is cut short"):
        prepared(tmp_path / "x.arrow", tmp_path)


def test_a_flipped_byte_is_not_read_as_another_image(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(table(range(50)), path, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(PIXELS.shape[1].to_bytes(4, "big") * 2) + 40] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="x.parquet"):
        prepared(path, tmp_path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'krrst-fast\[parquet\]'"):
        prepared(tmp_path / "x.parquet", tmp_path)
