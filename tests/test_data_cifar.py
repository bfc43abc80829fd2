"""CIFAR's pickles: damaged ones are named, and ones that would run code are refused."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.data.formats import cifar
from krrst_fast.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = RNG.integers(0, 3, 12)


def refused(source: Path, out: Path, message: str) -> None:
    """prepare fails with one line that matches, and leaves nothing beside what was there."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(DataError, match=message) as caught:
        prepare(PrepareConfig(source=str(source), out=out, size=8))
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def write_cifar(folder: Path, train: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c"]}, 2))
    (folder / "train").write_bytes(train)
    return folder


def batch(**changes) -> bytes:
    rows = IMAGES.transpose(0, 3, 1, 2).reshape(12, -1)
    entries = {b"data": rows, b"fine_labels": LABELS.tolist()}
    return pickle.dumps(entries | {key.encode(): value for key, value in changes.items()}, 2)


class Evil:
    """A pickle of this runs a command when it is loaded the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_code_is_refused_before_anything_runs(tmp_path):
    trace = tmp_path / "trace"
    source = write_cifar(tmp_path / "source", batch(extra=Evil(trace)))
    pickle.loads((source / "train").read_bytes())
    assert trace.exists(), "the pickle of this test is not dangerous"
    trace.unlink()
    message = r"train: the pickle asks for (posix|nt|os)\.system; refused, nothing was run"
    refused(source, tmp_path / "out", message)
    for code in (
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    ):
        (source / "train").write_bytes(code)
        refused(source, tmp_path / "out", "the pickle asks for")
    objects = np.empty(1, object)
    (source / "train").write_bytes(batch(data=objects))
    refused(source, tmp_path / "out", "array of object, need numbers")
    assert not trace.exists()


def test_damaged_pickles(tmp_path):
    good = batch()
    for damaged, message in [
        (b"", "train: not a readable pickle"),
        (good[:-50], "train: not a readable pickle"),
        (b"no pickle", "train: not a readable pickle"),
        (pickle.dumps([1, 2]), "holds a list, need a dict"),
        (pickle.dumps({b"data": IMAGES.reshape(12, -1)}, 2), "no entry fine_labels or labels"),
        (batch(data=[1, 2]), "data must be a uint8 array"),
        (batch(data=IMAGES.astype(np.float32)), "data must be a uint8 array"),
        (batch(data=IMAGES.reshape(12, -1)[:, :7].copy()), r"flat squares, got \[12, 7\]"),
        (batch(fine_labels=[1, 2]), r"one integer label for each of 12 images"),
        (batch(fine_labels=[0.5] * 12), r"one integer label for each of 12 images"),
        (batch(fine_labels=[3] * 12), "the label 3, and there are 3 classes"),
    ]:
        source = write_cifar(tmp_path / "source", damaged)
        refused(source, tmp_path / "out", message)
    write_cifar(tmp_path / "source", good)
    (tmp_path / "source" / "meta").unlink()
    (tmp_path / "source" / "data_batch_1").write_bytes(good)
    refused(tmp_path / "source", tmp_path / "out", "batches.meta: there is no such file")


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_of_either_byte_order_keep_their_values(tmp_path, protocol):
    path = tmp_path / "train"
    for kind in (">i4", "<i4", "i8", ">u2", ">f4", "<f8", "u1", "bool"):
        expected = np.arange(6).reshape(2, 3).astype(kind)
        entries = {"a": expected, "b": expected.T, "c": expected[1, 2], "again": [expected]}
        path.write_bytes(pickle.dumps(entries, protocol))
        read, usual = cifar.load(path), pickle.loads(path.read_bytes())
        for name in ("a", "b", "c"):
            assert np.array_equal(read[name], entries[name]), (kind, name)
            assert read[name].dtype == usual[name].dtype, (kind, name)
            assert type(read[name]) is type(usual[name])
        assert np.array_equal(read["again"][0], expected)
    labels = LABELS.astype(">i4")
    source = write_cifar(tmp_path / "source", batch(fine_labels=labels))
    store = prepare(PrepareConfig(source=str(source), out=tmp_path / "out", size=8))
    assert store.labels().tolist() == LABELS.tolist()


def test_the_state_of_a_dtype_cannot_make_numbers_pointers(tmp_path):
    """A made-up state: items of 1 byte, and flags that call for reference counting."""
    state = (3, ">", None, None, None, 1, 1, 0x3F)

    class Forged:
        def __reduce__(self):
            return np.dtype, ("i4", False, True), state

    class Holder:
        def __reduce__(self):
            rebuild, made, _ = np.arange(3, dtype=np.int32).__reduce__()
            return rebuild, made, (1, (3,), Forged(), False, np.arange(3, dtype=">i4").tobytes())

    path = tmp_path / "train"
    path.write_bytes(pickle.dumps({"a": Holder()}, 2))
    read = cifar.load(path)["a"]
    assert read.tolist() == [0, 1, 2]
    assert (read.dtype.itemsize, read.dtype.hasobject, read.dtype.flags) == (4, False, 0)


def test_random_damage_to_a_pickle_is_a_pickle_or_a_data_error(tmp_path):
    path, data = tmp_path / "train", np.frombuffer(batch(), np.uint8)
    for _ in range(300):
        damaged = data.copy()
        damaged[RNG.integers(0, 200, 2)] = RNG.integers(0, 256, 2)
        path.write_bytes(damaged.tobytes())
        try:
            assert isinstance(cifar.load(path), dict)
        except DataError as error:
            assert str(path) in str(error)


def test_both_cifar_sets_in_one_folder_are_not_guessed_between(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", batch())
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(batch())
    refused(tmp_path, tmp_path / "out", "holds both .* and .*; name one")
