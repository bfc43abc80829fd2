"""What the sub-folders of an image folder are: splits, classes, or the set itself."""

import os
from pathlib import Path

from krrst_fast.data.formats import cifar, folder, parquet, released, tinyimagenet, transfer
from krrst_fast.data.kinds import IMAGE_SUFFIXES
from krrst_fast.data.source import Layout, split_in, split_of
from krrst_fast.errors import DataError

_DECIDE = "--layout classes or --layout splits decides"


def sub_folders(path: Path) -> list[Path]:
    """List the folders below `path` that are not hidden, by name."""
    found = folder.entries(path)
    return [entry for entry, is_folder in found if is_folder and not entry.name.startswith(".")]


def split_folders(path: Path) -> list[Path]:
    """List the folders below `path` that are named like a split."""
    return [entry for entry in sub_folders(path) if split_of(entry.name)]


def archives(path: Path, suffix: str) -> list[Path]:
    """List the files of a suffix in the folder, or in its folders named like splits."""
    places = (path, *split_folders(path))
    return [p for place in places for p in sorted(place.glob(f"*{suffix}")) if p.is_file()]


def splits(path: Path, layout: Layout) -> dict[str, Path]:
    """Return the splits of an image folder; none if its folders are classes.

    Folders named like splits are splits if nothing beside them holds images. Where something
    does, a single one that holds bare images is a class that is called so.

    Raises:
        DataError: The folder does not say which, or two folders are the same split.
    """
    if layout == "classes":
        return {}
    named = [entry for entry in split_folders(path) if folder.holds_images(entry)]
    if layout == "splits":
        if not named:
            raise DataError(f"prepare: {path}: --layout splits, and no folder train, val or test")
        return _by_name(path, named)
    if not named:
        _refuse_words_of_splits(path)
        return {}
    others = [e for e in sub_folders(path) if e not in named and folder.holds_images(e)]
    bare = _bare_images(path)
    if not others and not bare:
        return _by_name(path, named)
    if len(named) == 1 and not bare and not _holds_classes(named[0]):
        return {}
    other = (others or bare)[0].name
    raise DataError(
        f"prepare: {path}: is {named[0].name} a split or a class? It lies beside {other}; {_DECIDE}"
    )


def _refuse_words_of_splits(path: Path) -> None:
    """Raise DataError if all folders are called like training_set and test_set, or val2017."""
    folders = sub_folders(path)
    if len(folders) < 2 or not all(split_in(entry.name) for entry in folders):
        return
    if sum(folder.holds_images(entry) for entry in folders) > 1:
        first, second, *_ = (entry.name for entry in folders)
        raise DataError(
            f"prepare: {path}: are {first} and {second} splits or classes? Call them train and "
            "test if they are splits; --layout classes takes them as classes"
        )


def _by_name(path: Path, named: list[Path]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for entry in named:
        name = split_of(entry.name)
        assert name is not None
        if name in folders:
            both = f"{folders[name].name} and {entry.name}"
            raise DataError(f"prepare: {path}: the folders {both} both hold the split {name}")
        folders[name] = entry
    return folders


def _holds_folders(path: Path) -> bool:
    """Return whether images lie in several folders of this one, and none lie bare beside them."""
    filled = sum(folder.holds_images(entry) for entry in sub_folders(path))
    return filled > 1 and not _bare_images(path)


def _holds_classes(path: Path) -> bool:
    return any(folder.holds_images(entry) for entry in sub_folders(path))


def _bare_images(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def unwrapped(path: Path) -> Path:
    """Return the folder of the image set where `path` only wraps it, as an unpacked zip does.

    What is wrapped is known by its format or splits, or by two folders of images or more: all of
    them would be one class otherwise.

    Raises:
        DataError: More than one folder below `path` has splits of its own, or one lies beside
            other images: read as classes they would mix train with test.
    """
    if is_set(path):
        return path
    folders = sub_folders(path)
    sets = [entry for entry in folders if is_set(entry)]
    if not sets:
        filled = [entry for entry in folders if folder.holds_images(entry)]
        if len(filled) != 1 or _bare_images(path):
            return path
        inner = unwrapped(filled[0])
        return inner if is_set(inner) or _holds_folders(inner) else path
    others = [e for e in folders if e not in sets and folder.holds_images(e)] + _bare_images(path)
    if len(sets) == 1 and not others:
        return sets[0]
    beside = [entry.name for entry in (*sets[1:], *others)]
    raise DataError(
        f"prepare: {path}: {sets[0].name} is an image set of its own, and {beside[0]} lies beside "
        f"it; name one of them, or --layout classes takes each folder as a class"
    )


def is_set(path: Path) -> bool:
    """Return whether the folder itself says how it is read: a format, or splits."""
    # Each class folder of a large set is asked: the names in it are read once, in most cases.
    if not any(map(_says_something, os.listdir(path))):
        return False
    if cifar.find(path) or tinyimagenet.matches(path) or released.find_all(path):
        return True
    if transfer.find(path):
        return True
    if any(folder.holds_images(entry) for entry in split_folders(path)):
        return True
    found = archives(path, ".tar") or archives(path, ".npz") or parquet.find(path)
    return bool(found) and not folder.holds_images(path)


def _says_something(name: str) -> bool:
    archive = name.endswith((".tar", ".npz", *parquet.SUFFIXES))
    known = name == "data" or name in cifar.NAMES or name in transfer.SIGNS
    return archive or known or bool(split_of(name)) or name[:2] == "X_"
