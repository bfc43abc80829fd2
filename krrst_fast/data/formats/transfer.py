"""The sets that transfer is measured on, as their authors publish them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from krrst_fast.data.formats import arrays, folder, matfile
from krrst_fast.data.source import LeftOut, Source, Split, read_lines
from krrst_fast.errors import DataError


@dataclass(frozen=True)
class Listed:
    """The images of a split, as the set's own lists have them."""

    split: str
    images: list[tuple[Path, int]]
    """Their files, and labels that count from 0."""
    file: Path
    """The list that names them."""


class TransferSet(NamedTuple):
    """A published set: its name, files that only it has, where they may lie, how it is read."""

    name: str
    marks: tuple[str, ...]
    """One of these paths is there."""
    below: tuple[str, ...]
    """Folders below the one that is named, in which the set may lie."""
    read: Callable[[Path], tuple[Source, set[Path]]]
    """Returns the source, and the files and folders that it comes from."""


def find(path: Path) -> tuple[TransferSet, Path] | None:
    """Return the set that lies at `path` and its own folder, or None."""
    for known in SETS:
        for place in (path, *(path / name for name in known.below)):
            if any((place / mark).is_file() for mark in known.marks):
                return known, place
    return None


def read(known: TransferSet, place: Path, path: Path) -> Source:
    """Read a set that was found at `path`, or below it.

    Raises:
        DataError: A file is missing or damaged, or labels and images do not belong together.
    """
    source, used = known.read(place)
    beside = folder.beside(path, used, f"lies beside {known.name}")
    return replace(source, left_out=(*source.left_out, *beside))


def aircraft(root: Path) -> tuple[Source, set[Path]]:
    """Read FGVC-Aircraft (Maji et al. 2013) by variants: trainval and test."""
    listed = [root / f"images_variant_{split}.txt" for split in ("trainval", "test")]
    classes = tuple(_lines(root / "variants.txt"))
    label_of = {name: label for label, name in enumerate(classes)}
    _refuse_twice(root / "variants.txt", classes)
    splits = []
    for name, file in zip(("train", "test"), listed):
        images: list[tuple[Path, int]] = []
        for line in _lines(file):
            number, _, variant = line.partition(" ")
            if variant not in label_of:
                raise DataError(f"prepare: {file}: {line!r} names no variant of variants.txt")
            images.append((root / "images" / f"{number}.jpg", label_of[variant]))
        splits.append(Listed(name, images, file))
    used = {root / "images", root / "variants.txt", *listed}
    return _source("FGVC-Aircraft", splits, classes, [root / "images"]), used


def birds(root: Path) -> tuple[Source, set[Path]]:
    """Read CUB-200-2011 (Wah et al. 2011)."""
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    files = [root / name for name in names]
    images, labels, is_train, named = (_numbered(file) for file in files)
    for file, values in ((files[1], labels), (files[2], is_train)):
        if alone := sorted(images.keys() ^ values.keys(), key=int):
            where = files[0] if alone[0] in images else file
            raise DataError(
                f"prepare: {file}: must number the images of {files[0].name}: {len(alone)} numbers "
                f"are in one of the two alone, such as {alone[0]} in {where.name}"
            )
    if set(named) != {str(number + 1) for number in range(len(named))}:
        raise DataError(f"prepare: {files[3]}: must number its {len(named)} classes from 1")
    classes = tuple(named[str(number + 1)] for number in range(len(named)))
    label_of = dict(zip(labels, _from_one(files[1], labels.values(), len(classes)).tolist()))
    _refuse_codes(files[2], is_train.values(), ("0", "1"))
    splits = [
        Listed(
            name,
            [(root / "images" / images[k], label_of[k]) for k in images if is_train[k] == wanted],
            files[0],
        )
        for name, wanted in (("train", "1"), ("test", "0"))
    ]
    return _source("CUB-200-2011", splits, classes, [root / "images"]), {root / "images", *files}


def cars(root: Path) -> tuple[Source, set[Path]]:
    """Read Stanford Cars (Krause et al. 2013): cars_annos.mat, or the devkit's two lists."""
    if (root / "cars_annos.mat").is_file():
        return _cars_in_one(root)
    kit = root / "devkit" if (root / "devkit").is_dir() else root
    classes = _car_classes(kit / "cars_meta.mat", "class_names")
    train = kit / "cars_train_annos.mat"
    splits = [_cars_of("train", root / "cars_train", train, classes)]
    used, left = {root / "cars_train", train, kit / "cars_meta.mat"}, []
    name = "cars_test_annos_withlabels.mat"
    test = next((at for at in (root / name, kit / name) if at.is_file()), None)
    if test is not None:
        splits.append(_cars_of("test", root / "cars_test", test, classes))
        used |= {root / "cars_test", test}
    elif (root / "cars_test").is_dir():
        left = [LeftOut(str(root / "cars_test"), f"its labels, {name}, are not there")]
        used.add(root / "cars_test")
    folders = [root / f"cars_{listed.split}" for listed in splits]
    return _source("Stanford Cars", splits, classes, folders, left), used


def _car_classes(path: Path, variable: str) -> tuple[str, ...]:
    return tuple(matfile.texts(path, variable, matfile.read(path, [variable])[variable]))


def _cars_of(split: str, images: Path, path: Path, classes: Sequence[str]) -> Listed:
    rows = matfile.read(path, ["annotations"])["annotations"]
    names = matfile.texts(path, "fname", matfile.field(path, "annotations", rows, "fname"))
    labels = _from_one(path, matfile.field(path, "annotations", rows, "class"), len(classes))
    return Listed(split, [(images / n, int(k)) for n, k in zip(names, labels)], path)


def _cars_in_one(root: Path) -> tuple[Source, set[Path]]:
    path = root / "cars_annos.mat"
    rows = matfile.read(path, ["annotations"])["annotations"]
    classes = _car_classes(path, "class_names")
    column = {n: matfile.field(path, "annotations", rows, n) for n in ("class", "test")}
    paths = matfile.field(path, "annotations", rows, "relative_im_path")
    names = matfile.texts(path, "relative_im_path", paths)
    labels = _from_one(path, column["class"], len(classes))
    is_test = matfile.integers(path, "test", column["test"])
    _refuse_codes(path, is_test.tolist(), (0, 1))
    splits = [
        Listed(
            split,
            [(root / n, int(k)) for n, k, code in zip(names, labels, is_test) if code == wanted],
            path,
        )
        for wanted, split in enumerate(("train", "test"))
    ]
    source = _source("Stanford Cars", splits, classes, [root / "car_ims"])
    return source, {root / "car_ims", path}


def dogs(root: Path) -> tuple[Source, set[Path]]:
    """Read Stanford Dogs (Khosla et al. 2011): Images/, and lists of files and labels."""
    place = root / "lists" if (root / "lists").is_dir() else root
    files = {split: place / f"{split}_list.mat" for split in ("train", "test")}
    splits: list[Listed] = []
    names_of: dict[int, str] = {}
    for split, path in files.items():
        found = matfile.read(path, ["file_list", "labels"])
        names = matfile.texts(path, "file_list", found["file_list"])
        labels = _from_one(path, found["labels"], None)
        if len(names) != len(labels):
            raise DataError(f"prepare: {path}: {len(names)} files and {len(labels)} labels")
        for name, label in zip(names, labels):
            breed = name.partition("/")[0]
            if names_of.setdefault(int(label), breed) != breed:
                raise DataError(f"prepare: {path}: label {label + 1} is of more than one breed")
        rows = [(root / "Images" / name, int(label)) for name, label in zip(names, labels)]
        splits.append(Listed(split, rows, path))
    breeds = Counter(names_of.values())
    if twice := [breed for breed, count in breeds.items() if count > 1]:
        raise DataError(f"prepare: {place}: {twice[0]} has more than one label")
    classes = tuple(names_of.get(label, str(label + 1)) for label in range(max(names_of) + 1))
    used = {root / "Images", *files.values(), place / "file_list.mat"}
    return _source("Stanford Dogs", splits, classes, [root / "Images"]), used


def flowers(root: Path) -> tuple[Source, set[Path]]:
    """Read Oxford Flowers-102 (Nilsback and Zisserman 2008): its train and val parts are train."""
    labels_file, parts_file = root / "imagelabels.mat", root / "setid.mat"
    labels = _from_one(labels_file, matfile.read(labels_file, ["labels"])["labels"], None)
    found = matfile.read(parts_file, ["trnid", "valid", "tstid"])
    parts = {name: matfile.integers(parts_file, name, found[name]) for name in found}
    if any(len(p) and not 1 <= p.min() <= p.max() <= len(labels) for p in parts.values()):
        raise DataError(f"prepare: {parts_file}: names images beyond the {len(labels)} labelled")
    splits = []
    for split, ids in (
        ("train", np.concatenate([parts["trnid"], parts["valid"]])),
        ("test", parts["tstid"]),
    ):
        rows = [(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1])) for i in ids.tolist()]
        splits.append(Listed(split, rows, parts_file))
    classes = tuple(str(label + 1) for label in range(int(labels.max()) + 1))
    source = _source("Flowers-102", splits, classes, [root / "jpg"])
    return source, {root / "jpg", labels_file, parts_file}


def svhn(root: Path) -> tuple[Source, set[Path]]:
    """Read SVHN's cropped digits (Netzer et al. 2011): X [32, 32, 3, N], y [N] with 10 for 0."""
    files = {split: root / f"{split}_32x32.mat" for split in ("train", "test")}
    splits = []
    for split, path in files.items():
        found = matfile.read(path, ["X", "y"])
        images, digits = found["X"], matfile.integers(path, "y", found["y"])
        if images.ndim != 4 or images.shape[2] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"prepare: {path}: X must be uint8 [H, W, 3, N], got {images.dtype} "
                f"{list(images.shape)}"
            )
        if len(digits) and not 1 <= digits.min() <= digits.max() <= 10:
            raise DataError(f"prepare: {path}: y must be from 1 to 10")
        splits.append(_array_split(split, path, np.moveaxis(images, 3, 0), digits % 10))
    extra = root / "extra_32x32.mat"
    left = [LeftOut(str(extra), "is of SVHN's extra part")] if extra.is_file() else []
    classes = tuple(str(digit) for digit in range(10))
    return Source("SVHN", tuple(splits), classes, tuple(left)), {*files.values(), extra}


def stl10(root: Path) -> tuple[Source, set[Path]]:
    """Read STL-10 (Coates et al. 2011), planes of 96x96 pixels, column after column.

    Its unlabelled images are left out: they are a set of their own.
    """
    classes = tuple(_lines(root / "class_names.txt"))
    splits, used = [], {root / "class_names.txt"}
    for split in ("train", "test"):
        path, labels_path = root / f"{split}_X.bin", root / f"{split}_y.bin"
        for file in (path, labels_path):
            if not file.is_file():
                raise DataError(f"prepare: {file}: there is no such file")
        if path.stat().st_size % (3 * 96 * 96):
            raise DataError(
                f"prepare: {path}: is cut short: images of 3x96x96 bytes end within one"
            )
        images = np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96)
        labels = _from_one(labels_path, np.fromfile(labels_path, np.uint8), len(classes))
        splits.append(_array_split(split, path, images.transpose(0, 3, 2, 1), labels))
        used |= {path, labels_path}
    rest = root / "unlabeled_X.bin"
    left = [LeftOut(str(rest), "is of STL-10's unlabelled part")] if rest.is_file() else []
    return Source("STL-10", tuple(splits), classes, tuple(left)), {*used, rest}


def _array_split(split: str, path: Path, images: npt.NDArray, labels: npt.NDArray) -> Split:
    given = arrays.as_labels(str(path), labels, len(images))
    items = arrays.items(str(path), arrays.blocks_of(images), images.shape, given)
    return Split(split, items, len(images))


def _source(
    name: str,
    listed: Sequence[Listed],
    classes: Sequence[str],
    folders: Sequence[Path],
    left_out: Sequence[LeftOut] = (),
) -> Source:
    """Return a set of image files, once its lists have been compared with each other and the disk.

    Args:
        name: The set.
        listed: Its splits.
        classes: Their names by label.
        folders: Where its images lie; those that are in no list are left out, and counted.
        left_out: What else is.

    Raises:
        DataError: An image is listed and not there (none is worth a silent gap), or listed twice:
            in both splits it would be tested on what was trained on.
    """
    taken: dict[Path, Listed] = {}
    splits = []
    for part in listed:
        for path, _ in part.images:
            if not any(_lies_in(path, place) for place in folders):
                names = " and ".join(place.name for place in folders)
                raise DataError(f"prepare: {part.file}: {path} does not lie in {names}")
            if (other := taken.setdefault(path, part)) is not part:
                raise DataError(
                    f"prepare: {part.file}: {path} is listed in {other.split} and in {part.split}"
                )
        _refuse_twice(part.file, [str(path) for path, _ in part.images])
        missing = [path for path, _ in part.images if not path.is_file()]
        if missing:
            raise DataError(
                f"prepare: {part.file}: names {len(part.images)} images, of which {len(missing)} "
                f"are not there, such as {missing[0]}"
            )
        splits.append(folder.split(part.split, part.images))
    missed = [entry for place in folders for entry in folder.unlisted(place, taken)]
    return Source(name, tuple(splits), tuple(classes), (*left_out, *missed))


def _lies_in(path: Path, place: Path) -> bool:
    return place in path.parents and ".." not in path.relative_to(place).parts


def _refuse_twice(path: Path, names: Iterable[str]) -> None:
    """Raise DataError where a list names something more than once."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        more = f", as are {len(twice) - 1} others" if len(twice) > 1 else ""
        raise DataError(f"prepare: {path}: {twice[0]} is listed more than once{more}")


def _refuse_codes(path: Path, codes: Iterable[object], known: Sequence[object]) -> None:
    """Raise DataError where a split is written in another way than those known."""
    wrong = sorted({str(code) for code in codes if code not in known})
    if wrong:
        raise DataError(
            f"prepare: {path}: splits must be {' or '.join(map(str, known))}, got {wrong[0]}"
        )


def _from_one(path: Path, values: Iterable[object], classes: int | None) -> npt.NDArray[np.int64]:
    """Return labels that count from 1 as labels that count from 0."""
    labels = matfile.integers(path, "the labels", _numbers(path, values)) - 1
    most = arrays.MOST_CLASSES if classes is None else classes
    if not len(labels) or labels.min() < 0 or labels.max() >= most:
        ends = f"{labels.min() + 1} to {labels.max() + 1}" if len(labels) else "none"
        raise DataError(f"prepare: {path}: labels must be from 1 to {most}, got {ends}")
    return labels


def _numbers(path: Path, values: Iterable[object]) -> Iterable[object]:
    values = list(values)
    if not any(isinstance(value, str) for value in values):
        return values
    try:
        return [int(str(value)) for value in values]
    except ValueError:
        raise DataError(f"prepare: {path}: the labels must hold whole numbers") from None


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"prepare: {path}: there is no such file")
    return [line.strip() for line in read_lines(path) if line.strip()]


def _numbered(path: Path) -> dict[str, str]:
    """Read lines of a number and a text."""
    rows = [line.split(maxsplit=1) for line in _lines(path)]
    if any(len(row) != 2 or not row[0].isdecimal() for row in rows):
        raise DataError(f"prepare: {path}: each line must be a number and a value")
    _refuse_twice(path, [f"number {row[0]}" for row in rows])
    return {row[0]: row[1] for row in rows}


SETS = (
    TransferSet("FGVC-Aircraft", ("images_variant_test.txt",), ("data",), aircraft),
    TransferSet("CUB-200-2011", ("train_test_split.txt",), ("CUB_200_2011",), birds),
    TransferSet(
        "Stanford Cars",
        ("cars_annos.mat", "devkit/cars_train_annos.mat", "cars_train_annos.mat"),
        ("stanford_cars",),
        cars,
    ),
    TransferSet("Stanford Dogs", ("lists/train_list.mat", "train_list.mat"), (), dogs),
    TransferSet("Flowers-102", ("imagelabels.mat",), (), flowers),
    TransferSet("SVHN", ("train_32x32.mat", "test_32x32.mat"), (), svhn),
    TransferSet("STL-10", ("train_X.bin",), ("stl10_binary",), stl10),
)
SIGNS = frozenset(name.partition("/")[0] for known in SETS for name in (*known.marks, *known.below))
"""Names of entries of a folder without which it is none of these sets."""
NAMES = ", ".join(known.name for known in SETS)
