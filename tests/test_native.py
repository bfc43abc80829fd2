"""The torch-free module: the tar index against tarfile, and views in NumPy memory."""

import io
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast import reference
from krrst_fast.data.formats.tars import entries_by_tarfile
from krrst_fast.errors import DataError

native = pytest.importorskip("krrst_fast._native", reason="the extension is not built")


OTHERS = [
    ("folder", tarfile.DIRTYPE, ""),
    ("link", tarfile.SYMTYPE, "0.jpg"),
    ("hard", tarfile.LNKTYPE, "größe/0.jpg"),
    ("far", tarfile.SYMTYPE, "d/" * 90 + "0.jpg"),
    ("pipe", tarfile.FIFOTYPE, ""),
]


def write_tar(path: Path, names: list[str], tar_format: int = tarfile.PAX_FORMAT) -> None:
    """Files of growing length, a folder, links of both kinds and a pipe between them."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = i * 300
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
        for name, kind, target in OTHERS:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            if len(target) <= 100 or tar_format != tarfile.USTAR_FORMAT:
                tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.cls"), io.BytesIO())


NAMES = {
    "short": ["0.jpg", "folder/1.jpg", "2.jpg"],
    "prefix": ["a" * 90 + "/" + "b" * 90, "c/" * 60 + "d.jpg"],
    "long": ["e" * 300 + ".jpg", "f/" * 200 + "g.jpg"],
    "other alphabets": ["größe.jpg", "数字/零.png"],
}


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize(
    ("tar_format", "kind"),
    [(f, kind) for f in FORMATS for kind in NAMES if (f, kind) != ("ustar", "long")],
)
def test_the_index_is_that_of_tarfile(tmp_path, tar_format, kind):
    path, names = tmp_path / "a.tar", NAMES[kind]
    write_tar(path, names, FORMATS[tar_format])
    found = native.index_tar(str(path))
    assert found == entries_by_tarfile(path)
    others = [(name, target) for name, _, target in OTHERS[1:]]
    if tar_format == "ustar":
        others.remove(("far", OTHERS[3][2]))
    expected = [*((name, "") for name in names), *others, ("last.cls", "")]
    assert [(name, target) for name, _, _, _, target in found] == expected
    data = path.read_bytes()
    for i, (_, offset, size, _, _) in enumerate(found[: len(names)]):
        assert data[offset : offset + size] == bytes([i]) * (i * 300)


def test_lengths_above_eight_gib_are_read_from_binary_fields(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "big.tar"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(512 + info.size + 1024)
    assert native.index_tar(str(path)) == [("big.jpg", 512, 9 << 30, "0", "")]


@pytest.mark.parametrize("reader", [native.index_tar, entries_by_tarfile])
def test_a_tar_cut_anywhere_is_refused(tmp_path, reader):
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    write_tar(whole, ["0.jpg", "1.jpg", "2.jpg"])
    data = whole.read_bytes()
    end = max(offset for _, offset, *_ in native.index_tar(str(whole)))
    for length in (0, 1, 511, 600, 1500, 1536 + 100, end - 512 - 1):
        cut.write_bytes(data[:length])
        with pytest.raises((ValueError, DataError), match="tar|empty|header|end of data"):
            reader(cut if reader is entries_by_tarfile else str(cut))


def test_every_damaged_byte_of_a_header_is_noticed(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, ["0.jpg", "1.jpg", "2.jpg"])
    data = bytearray(path.read_bytes())
    second = native.index_tar(str(path))[1][1] - 512
    for position in [*range(second, second + 160, 7), *range(second + 257, second + 345, 11)]:
        damaged = data.copy()
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        if 148 <= position - second < 156:
            continue
        for read in (lambda: native.index_tar(str(path)), lambda: entries_by_tarfile(path)):
            with pytest.raises(ValueError, match="tar"):
                read()


def test_random_damage_never_crashes_the_scanner(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, NAMES["long"] + NAMES["other alphabets"])
    data, draw = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = np.frombuffer(data, np.uint8).copy()
        places = draw.integers(0, len(damaged), 4)
        damaged[places] = draw.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes())
        try:
            found = native.index_tar(str(path))
        except ValueError:
            refused += 1
            continue
        assert all(offset >= 0 and offset + size <= len(data) for _, offset, size, *_ in found)
    assert 0 < refused < 300


def test_a_missing_tar_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        native.index_tar(str(tmp_path / "none.tar"))


def draw(batch: int = 6, padding: int = 2):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 3, 7, 4), np.uint8)
    index, flip = rng.integers(0, 5, batch), rng.integers(0, 2, batch).astype(bool)
    return images, index, rng.integers(0, 2 * padding + 1, (batch, 2)), flip


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


def test_gather_views_equals_the_reference_in_every_bit():
    args = draw()
    out = np.full((6, 3, 7, 4), np.nan, np.float32)
    native.gather_views(*args, padding=2, mean=MEAN, std=STD, out=out)
    expected = reference.views(*(torch.from_numpy(a) for a in args), 2, MEAN, STD)
    assert np.array_equal(out, expected.numpy())


def test_gather_views_lets_other_threads_run():
    """No thread is made to hand over the GIL, so the main one runs only if the calls give it up."""
    calls, batch = 50, 50
    images, done, started = np.zeros((1, 3, 256, 256), np.uint8), [], threading.Event()
    out = np.empty((batch, 3, 256, 256), np.float32)
    args = images, np.zeros(batch, np.int64), np.zeros((batch, 2), np.int64), np.zeros(batch, bool)

    def work() -> None:
        started.set()
        for call in range(calls):
            native.gather_views(*args, padding=0, mean=MEAN, std=STD, out=out)
            done.append(call)

    worker, interval = threading.Thread(target=work), sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        worker.start()
        started.wait()
        seen = len(done)
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen < calls == len(done)


def test_gather_views_refuses_what_would_be_a_wild_access():
    images, index, offset, flip = draw()
    out = np.empty((6, 3, 7, 4), np.float32)
    good = {"padding": 2, "mean": MEAN, "std": STD, "out": out}
    for args, changes, message in [
        ((images, index + 5, offset, flip), {}, "an index is not that of an image"),
        ((images, index, offset - 5, flip), {}, "an offset is not from 0 to 2"),
        ((images, index, offset, flip), {"padding": -1}, "padding must not be negative"),
        ((images[0], index, offset, flip), {}, r"images must be \[N, C, H, W\]"),
        ((images, index[:3], offset, flip), {}, r"must be \[B\], \[B, 2\] and \[B\]"),
        ((images, index, offset, flip), {"mean": [0.5]}, "one number for each channel"),
        ((images, index, offset, flip), {"std": [0.5, 0.0, 0.5]}, "std must be above zero"),
        ((images, index, offset, flip), {"out": out[:5]}, r"out must be \[B, C, H, W\]"),
    ]:
        with pytest.raises(ValueError, match=f"gather_views: .*{message}"):
            native.gather_views(*args, **(good | changes))
    for bad in (out.astype(np.float64), out.transpose(0, 1, 3, 2).copy().transpose(0, 1, 3, 2)):
        with pytest.raises(TypeError):
            native.gather_views(images, index, offset, flip, **(good | {"out": bad}))


def test_build_info_names_this_version():
    from importlib.metadata import version

    info = native.build_info()
    assert info["version"] == version("krrst-fast")
    assert info["standard"] >= 201703 and info["compiler"] and info["isa"]


def test_the_module_needs_no_torch():
    code = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('krrst_fast._native', {native.__file__!r});"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "assert module.build_info()['version']; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
