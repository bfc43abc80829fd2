"""What prepare does with input that is not as it should be: one clear error, nothing left over."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.formats import tars
from krrst_fast.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = RNG.integers(0, 3, 12)


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve JPEGs of three classes."""
    for i, (image, label) in enumerate(zip(IMAGES, LABELS)):
        path = tmp_path / "source" / f"class{label}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image))
    return tmp_path / "source"


def run(source, out: Path, **settings):
    return prepare(PrepareConfig(**{"source": str(source), "out": out, "size": 8} | settings))


def refused(source, out: Path, message: str, error=DataError, **settings) -> None:
    """prepare fails with one line that matches, and leaves nothing beside what was there."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        run(source, out, **settings)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_a_missing_or_empty_source(tmp_path):
    refused(tmp_path / "none", tmp_path / "out", "none: there is no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "empty: there is no image$")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    refused(tmp_path / "empty", tmp_path / "out", "there is no image, only .*notes.txt")
    refused(tmp_path / "empty" / "notes.txt", tmp_path / "out", "not a format that is known")


def test_a_truncated_jpeg_is_named_when_refusing(folder, tmp_path):
    bad = sorted(folder.rglob("*.jpg"))[5]
    bad.write_bytes(bad.read_bytes()[:300])
    refused(
        folder, tmp_path / "out", rf"{bad.name}: not a readable image \((?i:truncated).*on_error"
    )


def test_a_truncated_jpeg_is_left_out_counted_and_named_when_skipping(folder, tmp_path, capsys):
    good = run(folder, tmp_path / "good").images()
    for name in ("004.jpg", "007.jpg"):
        (bad,) = folder.rglob(name)
        bad.write_bytes(bad.read_bytes()[:300])
    store = run(folder, tmp_path / "out", on_error="skip")
    keep = [i for i in range(12) if i not in (4, 7)]
    assert torch.equal(store.images(), good[keep])
    assert store.labels().tolist() == LABELS[keep].tolist()
    assert [Path(row["name"]).name for row in store.skipped] == ["004.jpg", "007.jpg"]
    assert all("truncated" in row["reason"].lower() for row in store.skipped)
    warning = capsys.readouterr().err
    assert warning.startswith("krrst: warning: prepare: skipped 2 of 12 images: ")
    assert "004.jpg" in warning and warning.count("\n") == 1


def test_nothing_but_damaged_images_is_an_error_even_when_skipping(folder, tmp_path):
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    message = "none of 12 images can be decoded; the first, .*000.jpg: .*no image format"
    refused(folder, tmp_path / "out", message, on_error="skip")


def test_an_unreadable_or_dangling_file_is_named(folder, tmp_path):
    (folder / "class0" / "900.jpg").symlink_to(tmp_path / "nowhere.jpg")
    refused(folder, tmp_path / "out", "900.jpg: cannot be read")
    assert run(folder, tmp_path / "out", on_error="skip").count() == 12


def test_images_beside_class_folders_are_not_silently_dropped(folder, tmp_path):
    (folder / "stray.jpg").write_bytes(jpeg(IMAGES[0]))
    refused(folder, tmp_path / "out", "class folders, and images beside them, such as stray.jpg")


def test_two_folders_of_one_split_are_refused(folder, tmp_path):
    for old, new in (("class0", "val"), ("class1", "validation"), ("class2", "train")):
        (folder / old).rename(folder / new)
    refused(folder, tmp_path / "out", "val and validation both hold the split val")


def test_images_of_differing_sizes_and_kinds_become_one_size(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i, shape in enumerate([(1, 1), (1, 50), (90, 2), (8, 8), (33, 17)]):
        Image.fromarray(np.full(shape, 10 * i, np.uint8)).save(source / f"{i}.png")
        Image.fromarray(np.full((*shape, 3), 10 * i, np.uint8)).save(source / f"{i + 5}.png")
    store = run(source, tmp_path / "out")
    assert store.images().shape == (10, 3, 8, 8)
    expected = torch.tensor([10 * (i % 5) for i in range(10)], dtype=torch.uint8)
    assert torch.equal(store.images(), expected.view(-1, 1, 1, 1).expand(10, 3, 8, 8))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


@pytest.fixture(params=["native", "tarfile"])
def either_index(request, monkeypatch):
    """With the extension's index of a tar, and without."""
    if request.param == "native":
        pytest.importorskip("krrst_fast._native", reason="the extension is not built")
    else:
        monkeypatch.setattr(tars, "_entries", tars.entries_by_tarfile)


def test_damaged_and_truncated_tars(tmp_path, either_index):
    members = [(f"{i}.jpg", jpeg(IMAGES[i])) for i in range(12)]
    path = write_tar(tmp_path / "train.tar", members)
    data = path.read_bytes()
    for damaged, message in [
        (b"", "train.tar: .*empty"),
        (b"no tar at all" * 99, "train.tar: .*tar"),
        (data[: len(data) // 2], "train.tar: .*tar"),
        (data[:1536] + b"\xff" + data[1537:], "train.tar: .*tar"),
        (b"\x1f\x8b" + data, "train.tar: .*tar"),
    ]:
        path.write_bytes(damaged)
        refused(path, tmp_path / "out", message)
        refused(path, tmp_path / "out", message, on_error="skip")


def test_tars_whose_members_do_not_fit_together(tmp_path, either_index):
    image, path = jpeg(IMAGES[0]), tmp_path / "train.tar"
    for members, message in [
        ([("0.jpg", image), ("0.cls", b"tench")], "train.tar:0.cls: need an integer label, got"),
        ([("0.jpg", image), ("1.cls", b"1")], "1.cls belongs to no image"),
        ([("0.jpg", image), ("0.jpg", image)], "two members are called 0.jpg"),
        ([("0.jpg", image), ("0.cls", b"-3")], "0.cls: need a label from 0 to 999999, got -3"),
        ([("notes.txt", b"x")], "there is no image, only .*train.tar:notes.txt"),
    ]:
        refused(write_tar(path, members), tmp_path / "out", message)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    write_tar(path, [("0.jpg", image), ("0.cls", b"2")])
    refused(path, tmp_path / "out", "the label 2, and there are 2 classes")


class Evil:
    """A pickle of this runs a command when it is loaded the usual way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_damaged_npz_archives(tmp_path):
    path = tmp_path / "train.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    good = path.read_bytes()
    place = good.index(IMAGES[3].tobytes())
    for damaged in (b"", b"no archive", good[: len(good) // 2], good[:-10]):
        path.write_bytes(damaged)
        refused(path, tmp_path / "out", "train.npz: not a readable npz archive")
    path.write_bytes(good[:place] + b"\x00\x01\x02" + good[place + 3 :])
    refused(path, tmp_path / "out", "train.npz: not a readable npz archive .*CRC")
    for arrays, message in [
        ({"pixels": IMAGES}, "need an array called images or data"),
        ({"images": IMAGES, "labels": LABELS[:5]}, "one integer label for each of 12 images"),
        ({"images": IMAGES, "labels": LABELS / 2}, "one integer label for each of 12 images"),
        ({"images": IMAGES.reshape(12, 2, 2, 2, 24)}, r"images must be .* got \[12, 2, 2, 2, 24\]"),
        ({"images": np.asfortranarray(IMAGES)}, "must be a C-ordered array"),
        ({"images": np.array([None, {}])}, "must be a C-ordered array of numbers, got object"),
        (
            {"images": IMAGES, "labels": np.array([{}] * 12)},
            "labels.npy must be a C-ordered",
        ),
        ({"images": IMAGES.astype(np.int32)}, "uint8 or floats in .* got int32"),
        ({"images": IMAGES[:0]}, "there is no image"),
    ]:
        np.savez(path, **arrays)
        refused(path, tmp_path / "out", message)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00no header")
    refused(path, tmp_path / "out", "not a readable")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": (10**9, 8, 8, 3), "fortran_order": False, "descr": "|u1"}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    refused(path, tmp_path / "out", "does not have the length its header says")


def test_nan_pixels_are_refused_or_skipped_by_name(tmp_path):
    floats = IMAGES.astype(np.float32) / 255
    floats[5, 2, 2, 1] = np.nan
    np.savez(tmp_path / "train.npz", images=floats)
    message = r"train.npz\[5\]: holds NaN or infinite pixels"
    refused(tmp_path / "train.npz", tmp_path / "out", message)
    torch.save(torch.from_numpy(floats).permute(0, 3, 1, 2), tmp_path / "X_tr_8.pth")
    message = r"X_tr_8.pth\[5\]: holds NaN or infinite pixels"
    refused(tmp_path / "X_tr_8.pth", tmp_path / "out", message)
    store = run(tmp_path / "train.npz", tmp_path / "out", on_error="skip")
    assert store.count() == 11 and store.skipped[0]["name"].endswith("train.npz[5]")


def test_normalised_tensors_are_refused_with_the_way_back(tmp_path):
    normalised = (torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    torch.save(normalised, tmp_path / "X_tr_8.pth")
    message = r"float pixels must be in \[0, 1\], got -.*; undo a normalisation first \(x \* std"
    refused(tmp_path / "X_tr_8.pth", tmp_path / "out", message)


def test_damaged_tensor_files(tmp_path):
    path = tmp_path / "X_tr_8.pth"
    torch.save(torch.rand(12, 3, 8, 8), path)
    good = path.read_bytes()
    for damaged in (b"", b"no tensor", good[: len(good) // 2]):
        path.write_bytes(damaged)
        refused(path, tmp_path / "out", "X_tr_8.pth: not a readable tensor file")
    torch.save({"x": torch.rand(3)}, path)
    refused(path, tmp_path / "out", "holds a dict, need one tensor of rows")
    trace = tmp_path / "trace"
    torch.save(Evil(trace), path)
    refused(path, tmp_path / "out", "X_tr_8.pth: not a readable tensor file")
    assert not trace.exists()
    path.unlink()
    for size in (16, 32):
        torch.save(torch.rand(2, 3, size, size), tmp_path / f"X_tr_{size}.pth")
    refused(tmp_path, tmp_path / "out", r"image tensors of sizes \['16', '32'\], none of 8")


def test_tinyimagenet_annotations_that_do_not_match(tmp_path):
    source = tmp_path / "source"
    for name in ("train/a/images/a_0.png", "val/images/val_0.png", "val/images/val_1.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[0]).save(source / name)
    notes = source / "val" / "val_annotations.txt"
    for text, message in [
        ("val_0.png\ta\t0\n", "val_1.png is not listed"),
        ("val_0.png\ta\nval_1.png\ta\nval_2.png\ta\n", "val_2.png is listed and missing"),
        ("val_0.png\ta\nval_1.png\ta\nval_0.png\tb\n", "lists val_0.png twice"),
        ("val_0.png a\n", "each line must be a file name, a tab and a class"),
    ]:
        notes.write_text(text)
        refused(source, tmp_path / "out", message)


def test_tinyimagenet_without_class_folders(tmp_path):
    source = tmp_path / "source"
    for name in ("train/a_0.png", "val/images/val_0.png"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[0]).save(source / name)
    (source / "val" / "val_annotations.txt").write_text("val_0.png\ta\n")
    message = "train: need a folder for each class, got images such as a_0.png"
    refused(source, tmp_path / "out", message)


def test_an_existing_output_is_replaced_only_when_asked_and_only_if_a_store(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    refused(folder, out, "exists and is not empty", ConfigError)
    refused(
        folder, out, "not replaced, because it holds no index.json", ConfigError, overwrite=True
    )
    refused(folder, folder, "exists and is not empty", ConfigError)
    assert (out / "thesis.tex").read_text() == "x"
    store = tmp_path / "store"
    run(folder, store)
    refused(folder, store, "exists and is not empty", ConfigError)
    assert run(folder, store, overwrite=True, limit=3).count() == 3
    (folder / "class0" / "bad.jpg").write_bytes(b"")
    refused(folder, store, "bad.jpg", overwrite=True)
    assert open_store(store, verify=True).count() == 3


def test_a_source_inside_the_output_is_never_removed(folder, tmp_path):
    run(folder, tmp_path / "store")
    (tmp_path / "store" / "source").mkdir()
    source = tmp_path / "store" / "source"
    refused(source, tmp_path / "store", "lies in the output folder", ConfigError, overwrite=True)


def test_a_full_disk_leaves_no_half_store(tmp_path):
    """The limit on a file's length makes the write fail as a full disk does."""
    np.savez(tmp_path / "train.npz", images=np.zeros((2000, 8, 8, 3), np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="too large|No space"):
            run(tmp_path / "train.npz", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == before
    assert run(tmp_path / "train.npz", tmp_path / "out").count() == 2000


def test_a_killed_prepare_leaves_no_store_and_the_next_one_clears_up(folder, tmp_path):
    code = (
        "import os, sys, signal; from pathlib import Path;"
        "from krrst_fast.data import PrepareConfig, prepare, store;"
        "store.StoreWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "prepare(PrepareConfig(source=sys.argv[1], out=Path(sys.argv[2]), size=8))"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, str(folder), str(out)])
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(DataError, match="not an image store"):
        open_store(out)
    assert run(folder, out).count() == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_settings_out_of_range_are_named(tmp_path):
    for settings, message in [
        ({"size": 0}, "size must be from 1 to 4096, got 0"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be one of refuse, skip, got 'ignore'"),
        ({"source": ""}, "source must be a path, or digits, got ''"),
    ]:
        with pytest.raises(ConfigError, match=f"PrepareConfig: {message}"):
            PrepareConfig(**{"source": "digits", "out": tmp_path} | settings)


def test_memory_does_not_grow_with_the_set(tmp_path):
    """The archive holds 12 MB of pixels; what prepare has in hand stays a few chunks."""
    np.savez(tmp_path / "train.npz", images=RNG.integers(0, 256, (4000, 32, 32, 3), np.uint8))
    tracemalloc.start()
    try:
        store = run(tmp_path / "train.npz", tmp_path / "out", size=32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.count() == 4000
    assert peak < 7_000_000, f"peak {peak / 1e6:.1f} MB of 12.3 MB"


def test_the_index_says_where_the_images_came_from(folder, tmp_path):
    run(folder, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["source"] == {"path": str(folder), "format": "image folder"}
    assert index["format_version"] == 1 and index["count"] == 12 and index["skipped"] == []
