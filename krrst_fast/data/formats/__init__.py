"""Recognition of the format of a file or folder."""

from pathlib import Path

from krrst_fast.data.formats import (
    cifar,
    digits,
    folder,
    npz,
    parquet,
    released,
    tars,
    tinyimagenet,
)
from krrst_fast.data.source import DIGITS, Source, held_out_as_test
from krrst_fast.errors import DataError

KNOWN = (
    "CIFAR pickles, TinyImageNet, an image folder, WebDataset tars, npz archives, "
    "Parquet and Arrow files, X_tr_SIZE.pth tensors"
)


def open_source(source: str, size: int) -> Source:
    """Return the splits of `source`, not yet decoded; the held-out one is called test.

    Raises:
        DataError: Nothing is there, or nothing that is known.
    """
    if source == DIGITS:
        return digits.read(size)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"prepare: {source}: there is no such file or folder")
    return held_out_as_test(_of_folder(path, size) if path.is_dir() else _of_file(path, size))


def _of_file(path: Path, size: int) -> Source:
    if path.suffix == ".npz":
        return npz.read([path])
    if path.suffix == ".tar":
        return tars.read([path], path.parent)
    if path.suffix in parquet.SUFFIXES:
        return parquet.read([path], path.parent)
    if tensors := released.find(path, size):
        return released.read(tensors)
    raise DataError(f"prepare: {path}: not a format that is known ({KNOWN}); unpack archives first")


def _of_folder(path: Path, size: int) -> Source:
    if pickles := cifar.find(path):
        return cifar.read(pickles)
    if tensors := released.find(path, size):
        return released.read(tensors)
    if archives := _files(path, "*.tar"):
        return tars.read(archives, path)
    if archives := _files(path, "*.npz"):
        return npz.read(archives)
    if tables := parquet.find(path):
        return parquet.read(tables, path)
    if tinyimagenet.matches(path):
        return tinyimagenet.read(path)
    return folder.read(path)


def _files(path: Path, pattern: str) -> list[Path]:
    """List files of a pattern in the folder, or in its folders called train, val or test."""
    folders = (path, *folder.split_folders(path).values())
    return [file for place in folders for file in sorted(place.glob(pattern)) if file.is_file()]
