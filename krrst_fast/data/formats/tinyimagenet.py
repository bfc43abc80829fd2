"""TinyImageNet's layout: train/<class>/images/, and val/images/ labelled by a text file."""

from collections import Counter
from pathlib import Path

from krrst_fast.data.formats import folder
from krrst_fast.data.source import Source, read_lines
from krrst_fast.errors import DataError

_ANNOTATIONS = Path("val", "val_annotations.txt")


def matches(path: Path) -> bool:
    """Return whether the folder is laid out like TinyImageNet."""
    return (path / _ANNOTATIONS).is_file()


def read(path: Path) -> Source:
    """Train and val; the images of test/ have no labels and are left out."""
    if not (path / "train").is_dir():
        raise DataError(f"{path}: {_ANNOTATIONS} is there, and train is missing")
    train = folder.list_files(path / "train")
    if train.images and not train.classes:
        bare = train.images[0][0].name
        raise DataError(
            f"{path / 'train'}: need a folder for each class, got images such as {bare}"
        )
    val_classes = _annotations(path / _ANNOTATIONS)
    val = folder.list_files(path / "val")
    classes = tuple(sorted(train.classes | set(val_classes.values())))
    label_of = {name: label for label, name in enumerate(classes)}
    unlisted = [p.name for p, _ in val.images if p.name not in val_classes]
    missing = set(val_classes) - {p.name for p, _ in val.images}
    if unlisted or missing:
        name = unlisted[0] if unlisted else min(missing)
        where = "not listed" if unlisted else "listed and missing"
        raise DataError(f"{path / _ANNOTATIONS}: does not match val/images: {name} is {where}")
    splits = (
        folder.split("train", ((p, label_of[group or ""]) for p, group in train.images)),
        folder.split("val", ((p, label_of[val_classes[p.name]]) for p, _ in val.images)),
    )
    used = {path / "train", path / "val"}
    beside = folder.beside(path, used, "is of TinyImageNet's test split, which has no labels")
    val_files = [entry for entry in val.left_out if entry.name != str(path / _ANNOTATIONS)]
    return Source("TinyImageNet", splits, classes, (*train.left_out, *val_files, *beside))


def _annotations(path: Path) -> dict[str, str]:
    """Read the class by file name from the first two columns between tabs."""
    rows = [line.split("\t") for line in read_lines(path) if line]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{path}: each line must be a file name, a tab and a class")
    classes = {row[0]: row[1] for row in rows}
    if len(classes) < len(rows):
        twice = next(name for name, count in Counter(row[0] for row in rows).items() if count > 1)
        raise DataError(f"{path}: lists {twice} twice")
    return classes
