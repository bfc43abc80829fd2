"""The packed store: what it maps, and what it refuses to open."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.errors import DataError
from krrst_fast.runs.files import read_json, write_json

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 5, 5, 3), np.uint8)
LABELS = RNG.integers(0, 4, 30)


def packed(folder: Path, **arrays) -> ImageStore:
    """A store whose splits do not begin at a page of memory: 19 images of train, 11 of test."""
    folder.mkdir()
    for split, rows in (("train", slice(0, 19)), ("test", slice(19, 30))):
        given = {name: values[rows] for name, values in arrays.items()}
        np.savez(folder / f"{split}.npz", images=IMAGES[rows], **given)
    return prepare(PrepareConfig(source=str(folder), out=folder / "store", size=5))


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return packed(tmp_path / "made", labels=LABELS)


def test_each_split_maps_its_own_images_and_labels(store):
    for split, rows in (("train", slice(0, 19)), ("test", slice(19, 30))):
        images = store.images(split)
        assert images.dtype == torch.uint8 and images.is_contiguous()
        assert np.array_equal(images.numpy(), IMAGES[rows].transpose(0, 3, 1, 2))
        assert store.labels(split).tolist() == LABELS[rows].tolist()
        assert store.count(split) == len(images)
    assert store.classes == ("0", "1", "2", "3") and store.has_labels


def test_images_are_mapped_and_not_read(tmp_path):
    """A sparse file of 2 GB opens at once and costs no memory."""
    source = packed(tmp_path / "made")
    index = read_json(source.path / "index.json")
    count = 2_000_000_000 // 75
    index |= {"count": count, "splits": {"train": [0, count]}}
    write_json(source.path / "index.json", index, sealed=True)
    with (source.path / "images.u8").open("r+b") as file:
        file.truncate(75 * count)
    before = resident()
    images = open_store(source.path).images()
    assert images.shape == (count, 3, 5, 5) and not images[-1].any()
    assert np.array_equal(images[:19].numpy(), IMAGES[:19].transpose(0, 3, 1, 2))
    assert resident() - before < 50e6


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_writing_to_the_images_never_reaches_the_file(store):
    before = (store.path / "images.u8").read_bytes()
    images = store.images()
    images.zero_()
    assert not images.any()
    del images
    assert (store.path / "images.u8").read_bytes() == before
    assert open_store(store.path, verify=True).images().any()


def test_labels_that_are_not_there_are_named(tmp_path):
    store = packed(tmp_path / "made")
    assert not store.has_labels and store.classes == ()
    message = rf"{store.path}: labels are needed, and the images of split 'test' have none"
    with pytest.raises(DataError, match=message):
        store.labels("test")
    some = LABELS.copy()
    some[25] = -1
    store = packed(tmp_path / "partly", labels=some)
    assert store.labels("train").tolist() == LABELS[:19].tolist()
    with pytest.raises(DataError, match="labels are needed, and the images of split 'test'"):
        store.labels("test")


def test_a_split_that_is_not_there_is_named(store):
    for call in (store.count, store.images, store.labels):
        with pytest.raises(DataError, match=r"no split 'val', only \['test', 'train'\]"):
            call("val")


def test_verify_finds_a_flipped_bit_and_plain_opening_a_wrong_length(store):
    for name in ("images.u8", "labels.i64"):
        path = store.path / name
        good = path.read_bytes()
        path.write_bytes(good[:9] + bytes([good[9] ^ 1]) + good[10:])
        open_store(store.path)
        with pytest.raises(DataError, match=f"{name}: the checksum is wrong"):
            open_store(store.path, verify=True)
        for wrong in (good[:-1], good + b"\0", b""):
            path.write_bytes(wrong)
            with pytest.raises(DataError, match=f"{name}: has {len(wrong)} bytes, the index says"):
                open_store(store.path)
        path.unlink()
        with pytest.raises(DataError, match=f"{name}: is missing, the index says"):
            open_store(store.path)
        path.write_bytes(good)
    assert open_store(store.path, verify=True) == store


@pytest.mark.filterwarnings("ignore:.*without a checksum")
def test_what_is_no_store_is_refused(store, tmp_path):
    with pytest.raises(DataError, match="not an image store .it has no index.json."):
        open_store(tmp_path)
    with pytest.raises(DataError, match="not an image store"):
        open_store(tmp_path / "none")
    path = store.path / "index.json"
    good = read_json(path)
    for change, message in [
        ({"format_version": 2}, "the store has format 2, this version reads up to 1"),
        ({"splits": {"train": [0, 31]}}, "exceed the number of images"),
        ({"splits": [1]}, "not the index of an image store"),
        ({"mean": None}, "not the index of an image store"),
        ({"mean": [10**400]}, "not the index of an image store"),
        ({"size": "wide"}, "not the index of an image store"),
        ({"crc32": {}, "count": 29}, "images.u8: has 2250 bytes, the index says 2175"),
    ]:
        write_json(path, good | {"splits": {"train": [0, 1]}} | change, sealed=True)
        with pytest.raises(DataError, match=message):
            open_store(store.path)
    for text, message in [
        ("[]", "not the index"),
        ("{", "not a JSON file"),
        ("{}", "not the index"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            open_store(store.path)


def test_a_store_that_a_kill_left_aside_is_found(store):
    """Killed between the two renames of `prepare --overwrite`; moved by a living one: left."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    living = store.path.rename(store.path.with_name(f".store.{os.getppid()}-0.old"))
    with pytest.raises(DataError, match="not an image store"):
        open_store(store.path)
    living.rename(store.path.with_name(f".store.{gone.pid}-0.old"))
    assert open_store(store.path, verify=True) == store
    assert [p.name for p in store.path.parent.glob(".*")] == []


def test_a_store_may_be_moved_and_read_only(store, tmp_path):
    moved = Path(shutil.move(store.path, tmp_path / "elsewhere"))
    for file in moved.iterdir():
        file.chmod(0o444)
    again = open_store(moved, verify=True)
    assert np.array_equal(again.images("test").numpy(), IMAGES[19:].transpose(0, 3, 1, 2))


def test_a_constant_channel_has_a_deviation_to_divide_by(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((3, 4, 4, 3), 51, np.uint8))
    store = prepare(PrepareConfig(source=str(tmp_path / "a.npz"), out=tmp_path / "s", size=4))
    assert np.allclose(store.mean, 0.2, atol=1e-15) and store.std == (1 / 255,) * 3


def test_two_runs_write_the_same_bytes(tmp_path):
    a, b = (packed(tmp_path / name, labels=LABELS).path for name in ("a", "b"))
    for name in ("images.u8", "labels.i64"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
