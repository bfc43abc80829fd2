"""Recognition of the format of a file or folder."""

from dataclasses import replace
from pathlib import Path

from krrst_fast.data.formats import (
    cifar,
    digits,
    folder,
    layout,
    npz,
    parquet,
    released,
    tars,
    tinyimagenet,
    transfer,
)
from krrst_fast.data.kinds import IMAGE_SUFFIXES, way_in
from krrst_fast.data.source import DIGITS, Layout, Source, held_out_as_test
from krrst_fast.errors import DataError

KNOWN = (
    "CIFAR pickles, TinyImageNet, an image folder, WebDataset tars, npz archives, "
    f"Parquet and Arrow files, X_tr_SIZE.pth tensors, {transfer.NAMES}"
)


def open_source(source: str, size: int, folders: Layout = "auto") -> Source:
    """Return the splits of `source`, not yet decoded; the held-out one is called test.

    Args:
        source: A path, or the word digits.
        size: Height and width of the store, which chooses among the authors' tensors.
        folders: What the sub-folders of an image folder are.

    Raises:
        DataError: Nothing is there, or nothing that is known.
    """
    if source == DIGITS:
        return digits.read(size)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"prepare: {source}: there is no such file or folder")
    if path.is_dir():
        return held_out_as_test(_of_folder(path, size, folders))
    if not path.is_file():
        raise DataError(f"prepare: {source}: neither a file nor a folder")
    return held_out_as_test(_of_file(path, size))


def _of_file(path: Path, size: int) -> Source:
    if path.suffix == ".npz":
        return npz.read([path])
    if path.suffix == ".tar":
        return tars.read([path], path.parent)
    if path.suffix in parquet.SUFFIXES:
        return parquet.read([path], path.parent)
    if tensors := released.find(path, size):
        return released.read(tensors)
    if hint := way_in(path):
        raise DataError(f"prepare: {path}: {path.suffix} is not read; {hint}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"prepare: {path}: is one image; name the folder of the images")
    raise DataError(f"prepare: {path}: not a format that is known ({KNOWN}); unpack archives first")


def _of_folder(path: Path, size: int, folders: Layout) -> Source:
    wrapper = path
    if folders != "classes":
        path = layout.unwrapped(path)
    source = _of_special(path, size) if folders != "classes" else None
    if source is None:
        source = folder.read(path, layout.splits(path, folders), nested=folders != "auto")
    if path != wrapper:
        beside = folder.beside(wrapper, {path}, "lies beside the image set")
        source = replace(source, left_out=(*source.left_out, *beside))
    if source.format == "image folder" and not any(split.count for split in source.splits):
        for entry in source.left_out:
            if hint := way_in(Path(entry.name)):
                alike = sum(other.reason == entry.reason for other in source.left_out) - 1
                more = f" and {alike} more like it" if alike else ""
                raise DataError(
                    f"prepare: {path}: there is no image, only {entry.name}{more}; {hint}"
                )
    return source


def _of_special(path: Path, size: int) -> Source | None:
    """Read a folder that is of another format than image files, and count what lies beside it."""
    if tinyimagenet.matches(path):
        return tinyimagenet.read(path)
    if found := transfer.find(path):
        return transfer.read(*found, path)
    if pickles := cifar.find(path):
        source, used = cifar.read(pickles), cifar.files(pickles)
    elif tensors := released.find(path, size):
        source, used = released.read(tensors), released.files(tensors)
    elif shards := layout.archives(path, ".tar"):
        source, used = tars.read(shards, path), {*shards, path / tars.CLASSES}
    elif shards := layout.archives(path, ".npz"):
        source, used = npz.read(shards), set(shards)
    elif tables := parquet.find(path):
        source, used = parquet.read(tables, path), set(tables)
    else:
        return None
    beside = folder.beside(path, used, f"lies beside the {source.format}")
    return replace(source, left_out=(*source.left_out, *beside))
