"""Folders of image files: train/ and test/ (or val/) of one folder a class, or any part of that."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from krrst_fast.data.source import (
    UNLABELLED,
    Item,
    Source,
    Split,
    sample_order,
    split_of,
)
from krrst_fast.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)


@dataclass
class Files:
    """The files below a folder: images with their class folder, None for images outside of one."""

    root: Path
    images: list[tuple[Path, str | None]] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    ignored: list[str] = field(default_factory=list)


def read(path: Path) -> Source:
    """Read a folder: sorted sub-folders are the classes; without any it is unlabelled."""
    roots = split_folders(path)
    found = {name: list_files(root) for name, root in (roots or {"train": path}).items()}
    ignored = [name for files in found.values() for name in files.ignored]
    if roots:
        used = set(roots.values())
        ignored += [str(p) for p in sorted(path.iterdir()) if p not in used and _visible(p)]
    classes = sorted(set().union(*(files.classes for files in found.values())))
    label_of = {name: label for label, name in enumerate(classes)}
    splits = [
        split(name, ((file, label_of.get(group or "", UNLABELLED)) for file, group in files.images))
        for name, files in found.items()
    ]
    return Source("image folder", tuple(splits), tuple(classes) or None, tuple(ignored))


def split(name: str, images: Iterable[tuple[Path, int]]) -> Split:
    """Return a split of image files and labels, in the order that all formats share."""
    ordered = sorted(images, key=lambda pair: sample_order(pair[0]))
    return Split(name, _items(ordered), len(ordered))


def _items(images: list[tuple[Path, int]]) -> Iterator[Item]:
    return (Item(str(path), path, label) for path, label in images)


def split_folders(path: Path) -> dict[str, Path]:
    """Return the folders below `path` that are named like a split."""
    folders: dict[str, Path] = {}
    for entry in sorted(path.iterdir()):
        name = split_of(entry.name)
        if name and entry.is_dir():
            if name in folders:
                both = f"{folders[name].name} and {entry.name}"
                raise DataError(f"{path}: the folders {both} both hold the split {name}")
            folders[name] = entry
    return folders


def list_files(root: Path) -> Files:
    """List all image files below a split's folder; the first folder level is the class.

    Raises:
        DataError: Images lie both in class folders and beside them.
    """
    files = Files(root)
    for folder, _, names in os.walk(root):
        below = Path(folder).relative_to(root).parts
        group = below[0] if below else None
        for name in names:
            path = Path(folder, name)
            if not _visible(path):
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                files.ignored.append(str(path))
                continue
            files.images.append((path, group))
            if group is not None:
                files.classes.add(group)
    bare = next((path for path, group in files.images if group is None), None)
    if bare is not None and files.classes:
        raise DataError(f"{root}: holds class folders, and images beside them, such as {bare.name}")
    files.ignored.sort()
    return files


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")
