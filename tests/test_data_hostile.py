"""Files that are made to hang prepare or to fill its memory, and what it says of them."""

import io
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.errors import DataError


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def refused(source: Path, message: str, **settings) -> None:
    out = source.parent / "out"
    with pytest.raises(DataError, match=message) as caught:
        prepare(PrepareConfig(source=str(source), out=out, size=8, **settings))
    assert "\n" not in str(caught.value) and not out.exists()


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, monkeypatch, kind):
    picture(tmp_path / "a" / "0.png")
    odd = tmp_path / "a" / "p.jpg"
    if kind == "FIFO":
        os.mkfifo(odd)
    elif kind == "socket":
        # Its address may not be long.
        monkeypatch.chdir(odd.parent)
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(odd.name)
    else:
        odd.symlink_to("/dev/zero")
    if kind == "FIFO":
        # In a process of its own: one that hangs is ended, and fails the test.
        words = ("prepare", tmp_path / "a", tmp_path / "out", "--size", 8)
        command = [sys.executable, "-m", "krrst_fast", *map(str, words)]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 2 and answer.stderr.count("\n") == 1
        assert "p.jpg: cannot be read (a FIFO, need a file)" in answer.stderr
    refused(tmp_path / "a", rf"p.jpg: cannot be read \(a {kind}, need a file\)")
    settings = {"source": str(tmp_path / "a"), "out": tmp_path / "out", "on_error": "skip"}
    store = prepare(PrepareConfig(**settings))
    assert store.count() == 1 and store.left_out == {"cannot be decoded": 1}


@pytest.mark.parametrize(
    "name",
    ["a", "x/train.tar", "x/train.npz", "x/X_tr_8.pth", "x/meta", "x/val/val_annotations.txt"],
)
def test_a_fifo_in_the_place_of_an_archive_is_never_opened(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name.partition("/")[0], "no image|neither a file nor a folder")


def test_a_fifo_among_pickles_is_named(tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["a"]}))
    os.mkfifo(folder / "train")
    refused(folder, "train: not a regular file")


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (header, idat, b"IEND")
    body = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12_001, 12_000), "declares 12001 x 12000 = 144012000 pixels, more than 128000000; "),
        ((50_000, 50_000), "declares 2500000000 pixels, more than 128000000; --max_pixels 25000"),
    ],
)
def test_a_bomb_is_refused_with_its_size_and_the_flag(tmp_path, shape, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png_header(*shape))
    refused(tmp_path / "a", f"0.png: {message}")
    picture(tmp_path / "a" / "1.png")
    before = Image.MAX_IMAGE_PIXELS
    config = PrepareConfig(source=str(tmp_path / "a"), out=tmp_path / "o", on_error="skip")
    assert prepare(config).count() == 1
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(DataError, match="8 x 8 = 64 pixels, more than 63; --max_pixels 64 takes"):
        prepare(PrepareConfig(source=str(tmp_path / "a"), out=tmp_path / "p", max_pixels=63))
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_photo_of_108_megapixels_is_not_too_large(tmp_path):
    """Its pixels are missing, which is found only when they are decoded."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(png_header(12_000, 9_000))
    refused(tmp_path / "a", "0.png: not a readable image")


@pytest.mark.parametrize("label", ["99999999999999999999", "1000000", "-2", "9" * 5000])
def test_a_label_that_no_class_has_is_named(tmp_path, label):
    path = tmp_path / "train.tar"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    for suffix, text in (("cls", label), ("json", f'{{"label": {label}}}')):
        with tarfile.open(path, "w") as tar:
            for name, body in (("0.png", file.getvalue()), (f"0.{suffix}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
        if suffix == "json" and len(label) > 4300:
            store = prepare(PrepareConfig(source=str(path), out=tmp_path / "o", size=8))
            assert sum(store.left_out.values()) == 1, "Python reads no number of 5000 digits"
        else:
            refused(path, f"0.{suffix}: need a")


def test_labels_of_arrays_that_no_class_has_are_named(tmp_path):
    for labels in ([0, 1 << 40], np.array([0, 1 << 63], np.uint64), [-2, 0]):
        np.savez(tmp_path / "train.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=labels)
        refused(tmp_path / "train.npz", "need labels from 0 to 999999, got")


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"shape": shape, "fortran_order": False, "descr": descr}
    )
    return file.getvalue()


def test_a_million_black_images_in_3_mb_are_refused_before_they_are_decompressed(tmp_path):
    path = tmp_path / "train.npz"
    body = header((1_000_000, 32, 32, 3)) + bytes(3 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", body)
    # Refused by what the archive's directory says: the rest of the zeros need not be there.
    claim_length(path, 3_072_000_128)
    message = "images.npy expands .* bytes to 3072000128, .* above 268435456 bytes at most 200"
    refused(path, message)
    claim_length(path, 3_072_000_128, packed=2_000_000_000)
    refused(path, message)


def claim_length(path: Path, length: int, packed: int | None = None) -> None:
    """Change the lengths of the only member in the directory of a zip archive."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, place + 24, length)
    if packed is not None:
        struct.pack_into("<I", data, place + 20, packed)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("array", "descr", "message"),
    [
        ((10**12, 8, 8, 3), "|u1", "does not have the length its header says"),
        ((10**12, 0, 8, 3), "|u1", "has 1000000000000 rows of no bytes"),
        ((10**12,), "|V0", "has 1000000000000 rows of no bytes"),
        ((-1, 8, 8, 3), "|u1", "does not have the length"),
    ],
)
def test_an_array_header_that_promises_too_much(tmp_path, array, descr, message):
    path = tmp_path / "train.npz"
    for name in ("images", "labels"):
        members = {
            "images.npy": header((2, 8, 8, 3)) + bytes(384),
            f"{name}.npy": header(array, descr),
        }
        with zipfile.ZipFile(path, "w") as archive:
            for member, body in members.items():
                archive.writestr(member, body)
        refused(path, f"{name}.npy {message}")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_members_that_lie_about_their_length(tmp_path, method):
    """The directory of the archive promises more rows than the member holds."""
    path = tmp_path / "train.npz"
    body = header((20, 8, 8, 3)) + bytes(10 * 192)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("images.npy", body)
    claim_length(path, len(body) + 10 * 192)
    refused(path, "train.npz: (not a readable npz archive|images.npy is shorter)")


def test_a_tensor_that_repeats_a_few_bytes_is_refused(tmp_path):
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(10**9, 3, 8, 8), tmp_path / "X_tr_8.pth")
    refused(tmp_path / "X_tr_8.pth", r"repeats 1 bytes as a tensor of \[1000000000, 3, 8, 8\]")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    picture(tmp_path / "a" / "b" / "0.png")
    (tmp_path / "a" / "c").mkdir()
    (tmp_path / "a" / "c").chmod(0)
    try:
        os.listdir(tmp_path / "a" / "c")
    except PermissionError:
        refused(tmp_path / "a", "c: (cannot be listed|Permission denied)")
    else:
        pytest.skip("root may list every folder")
    finally:
        (tmp_path / "a" / "c").chmod(0o700)


def test_text_that_is_none_is_named(tmp_path):
    folder = tmp_path / "a"
    picture(folder / "train" / "n01" / "0.png")
    picture(folder / "val" / "images" / "0.png")
    (folder / "val" / "val_annotations.txt").write_bytes(b"\xff\xfe0.png\tn01\n")
    refused(folder, "val_annotations.txt: not a text file")


def test_pickles_whose_entries_are_of_other_kinds(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    rows, laughs = np.zeros((2, 192), np.uint8), [0, 1]
    for _ in range(40):
        laughs = [laughs, laughs]
    for data, labels, names, message in [
        (rows, [0, 1], 5, "the names of the classes must be a list"),
        (rows[0, 0], [0, 1], ["a", "b"], "data must be a uint8 array of rows"),
        (rows, laughs, ["a", "b"], "need one integer label for each of 2 images"),
        (rows, [0, 7], ["a", "b"], "the label 7, and there are 2 classes"),
    ]:
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
        entries = {"data": np.asarray(data), "fine_labels": labels}
        (folder / "train").write_bytes(pickle.dumps(entries))
        refused(folder, message)
