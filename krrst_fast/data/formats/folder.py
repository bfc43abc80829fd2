"""Folders of image files: train/ and test/ (or val/) of one folder a class, or any part of that."""

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from krrst_fast.data.kinds import IMAGE_SUFFIXES, left_out
from krrst_fast.data.source import (
    UNLABELLED,
    Item,
    LeftOut,
    Source,
    Split,
    sample_order,
    split_of,
)
from krrst_fast.errors import DataError


@dataclass
class Files:
    """The files below a folder: images with their class folder, None for images outside of one."""

    root: Path
    images: list[tuple[Path, str | None]] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    left_out: list[LeftOut] = field(default_factory=list)


def read(path: Path, splits: dict[str, Path], *, nested: bool) -> Source:
    """Read a folder: sorted sub-folders are the classes; without any it is unlabelled.

    Args:
        path: The folder.
        splits: Folders directly below it by the name of their split; none: all of it is train.
        nested: Take all folders inside of a class folder for that class.

    Raises:
        DataError: It cannot be read, or, without `nested`, a class folder seems to hold classes or
            splits of its own.
    """
    found = {name: list_files(root) for name, root in (splits or {"train": path}).items()}
    if not nested:
        for files in found.values():
            _refuse_nested(files, "splits" if splits else "classes")
    missed = [entry for files in found.values() for entry in files.left_out]
    if splits:
        missed += beside(path, set(splits.values()), "lies beside the splits")
    classes = sorted(set().union(*(files.classes for files in found.values())))
    label_of = {name: label for label, name in enumerate(classes)}
    parts = [
        split(name, ((file, label_of.get(group or "", UNLABELLED)) for file, group in files.images))
        for name, files in found.items()
    ]
    return Source("image folder", tuple(parts), tuple(classes) or None, tuple(missed))


def split(name: str, images: Iterable[tuple[Path, int]]) -> Split:
    """Return a split of image files and labels, in the order that all formats share."""
    ordered = sorted(images, key=lambda pair: sample_order(pair[0]))
    return Split(name, _items(ordered), len(ordered))


def _items(images: list[tuple[Path, int]]) -> Iterator[Item]:
    return (Item(str(path), path, label) for path, label in images)


def list_files(root: Path) -> Files:
    """List all image files below a split's folder; the first folder level is the class.

    Raises:
        DataError: Images lie both in class folders and beside them, or a folder cannot be listed.
    """
    files = Files(root)
    for entry, is_folder in entries(root):
        if not is_folder:
            _sort_in(files, entry, None)
        elif not _is_hidden(entry):
            before = len(files.images)
            for below in walk(entry, around=root):
                _sort_in(files, below, entry.name)
            if len(files.images) == before:
                files.left_out.append(LeftOut(str(entry), "a folder without images"))
            else:
                files.classes.add(entry.name)
        else:
            files.left_out.append(LeftOut(str(entry), "a hidden folder"))
    bare = next((path for path, group in files.images if group is None), None)
    if bare is not None and files.classes:
        raise DataError(f"{root}: holds class folders, and images beside them, such as {bare.name}")
    return files


def _refuse_nested(files: Files, flag: str) -> None:
    """Raise DataError if a class folder holds two folders of images or more, or a split.

    They may be classes, or splits that would be mixed. One folder of images, as in TinyImageNet,
    or folders beside images of the class, are read as parts of it.
    """
    places: dict[str, dict[Path, None]] = {}
    for file, group in files.images:
        if group is not None:
            places.setdefault(group, {})[file.parent] = None
    for group, folders in places.items():
        top = files.root / group
        found = [place.relative_to(top) for place in folders]
        # What all of them lie in: a/data of a/data/cat and a/data/dog.
        shared = Path(os.path.commonpath(found))
        inner = {place.parts[len(shared.parts)] if place != shared else "" for place in found}
        if split := next((part for place in found for part in _called_splits(place)), None):
            shared, what = split.parent, f"a folder called {split.name}, like a split"
        elif len(inner) > 1 and "" not in inner:
            names = " and ".join(sorted(inner)[:2])
            what = f"{len(inner)} folders of images, such as {names}"
        else:
            continue
        raise DataError(
            f"prepare: {files.root}: would {group} be one class? {top / shared} holds {what}; "
            f"name {top / shared} if that is the image set, or --layout {flag} takes each folder "
            f"of {files.root} for one class"
        )


def _called_splits(place: Path) -> list[Path]:
    """Return the folders on a relative path, its last one included, that are called like splits."""
    return [part for part in (*reversed(place.parents), place) if split_of(part.name)]


def _sort_in(files: Files, entry: Path | LeftOut, group: str | None) -> None:
    """Add an entry of the folder `group` to the images or to what is left out."""
    if isinstance(entry, LeftOut):
        files.left_out.append(entry)
    elif entry.suffix.lower() not in IMAGE_SUFFIXES:
        if not _is_hidden(entry):
            files.left_out.append(left_out(entry))
    elif _is_hidden(entry):
        files.left_out.append(LeftOut(str(entry), "a hidden image"))
    else:
        files.images.append((entry, group))


def walk(folder: Path, around: Path | None = None) -> Iterator[Path | LeftOut]:
    """Yield the files below a folder, in a fixed order; links to folders are followed once.

    A link that leads to `around`, to a folder above it, or to one that was walked through already
    is left out: else a circle of links had no end.
    """
    above = (around, *around.resolve().parents) if around is not None else ()
    seen = {_identity(parent) for parent in above}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        if _identity(place) in seen:
            yield LeftOut(str(place), "a link to a folder that is read already")
            continue
        seen.add(_identity(place))
        folders = []
        for entry, is_folder in entries(place):
            if not is_folder:
                yield entry
            elif not _is_hidden(entry):
                folders.append(entry)
            else:
                yield LeftOut(str(entry), "a hidden folder")
        waiting += reversed(folders)


def holds_images(folder: Path) -> bool:
    """Return whether any file below the folder is named like an image, hidden ones aside."""
    return any(
        isinstance(entry, Path) and entry.suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(entry)
        for entry in walk(folder)
    )


def beside(path: Path, used: set[Path], why: str) -> list[LeftOut]:
    """List what lies in a folder beside the files and folders that are read from it."""
    missed: list[LeftOut] = []
    for entry, is_folder in entries(path):
        if entry in used:
            continue
        if not is_folder:
            below: Iterable[Path | LeftOut] = [entry]
        elif _is_hidden(entry):
            below = [LeftOut(str(entry), "a hidden folder")]
        elif any(entry in other.parents for other in used):
            missed += beside(entry, used, why)
            continue
        else:
            below = walk(entry, around=path)
        missed += _unread(below, why)
    return missed


def unlisted(root: Path, listed: Collection[Path]) -> list[LeftOut]:
    """List what lies below the folder of a set's images and is not among those that it lists."""
    below = (item for item in walk(root) if isinstance(item, LeftOut) or item not in listed)
    return list(_unread(below, "is in no list"))


def _unread(items: Iterable[Path | LeftOut], why: str) -> Iterator[LeftOut]:
    """Say of files that are not read why not, hidden ones that are no images aside."""
    for item in items:
        if isinstance(item, LeftOut):
            yield item
        elif item.suffix.lower() in IMAGE_SUFFIXES:
            reason = "a hidden image" if _is_hidden(item) else f"an image that {why}"
            yield LeftOut(str(item), reason)
        elif not _is_hidden(item):
            yield left_out(item)


def entries(folder: Path) -> list[tuple[Path, bool]]:
    """List a folder by name, as file systems have no order; True marks a folder."""
    try:
        with os.scandir(folder) as listed:
            found = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"prepare: {folder}: cannot be listed ({error.strerror})") from error
    return [(Path(entry.path), _is_folder(entry)) for entry in found]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself is no folder.
        return False


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def _identity(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
