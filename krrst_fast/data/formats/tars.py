"""WebDataset tars: `KEY.jpg` with `KEY.cls` beside it, the split in the tar's name."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from krrst_fast.data.formats.folder import IMAGE_SUFFIXES
from krrst_fast.data.source import UNLABELLED, Item, Source, Split, by_split, natural
from krrst_fast.errors import DataError

Member = tuple[str, int, int]
"""Name, offset of the first byte, and length of a file in a tar."""

_BLOCK = 512


@dataclass(frozen=True)
class _Sample:
    key: str
    image: Member
    label: Member | None


def read(files: list[Path], root: Path) -> Source:
    """Read the samples in the order of the tars' names, and in each in the order they lie in.

    `classes.txt` beside the tars, one name a line, says what the integer labels mean.
    """
    ordered = sorted(files, key=lambda file: natural(str(file)))
    splits = by_split(ordered, lambda path: str(path.relative_to(root)))
    ignored: list[str] = []
    streams = []
    for name, parts in splits.items():
        shards = [(path, _samples(path, ignored)) for path in parts]
        streams.append(Split(name, _items(shards), sum(len(samples) for _, samples in shards)))
    return Source("WebDataset tars", tuple(streams), _class_names(root), tuple(ignored))


def _class_names(root: Path) -> tuple[str, ...] | None:
    path = root / "classes.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else None


def _samples(path: Path, ignored: list[str]) -> list[_Sample]:
    """Join the image and label members of one tar by the name up to its first dot."""
    images: dict[str, Member] = {}
    labels: dict[str, Member] = {}
    for member in members(path):
        name = PurePosixPath(member[0])
        stem, _, suffix = name.name.partition(".")
        key = str(name.with_name(stem)) if stem else member[0]
        kind = images if f".{suffix.lower()}" in IMAGE_SUFFIXES else labels
        if kind is labels and suffix != "cls":
            ignored.append(f"{path}:{member[0]}")
        elif key in kind:
            raise DataError(f"{path}: two members are called {member[0]}")
        else:
            kind[key] = member
    for key in labels.keys() - images.keys():
        raise DataError(f"{path}: {labels[key][0]} belongs to no image")
    return [_Sample(key, image, labels.get(key)) for key, image in images.items()]


def _items(shards: list[tuple[Path, list[_Sample]]]) -> Iterator[Item]:
    for path, samples in shards:
        with path.open("rb") as file:

            def content(member: Member) -> bytes:
                file.seek(member[1])
                return file.read(member[2])

            for sample in samples:
                label = UNLABELLED
                if sample.label is not None:
                    label = _label(path, sample.label[0], content(sample.label))
                yield Item(f"{path}:{sample.image[0]}", content(sample.image), label)


def _label(path: Path, name: str, text: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}:{name}: need an integer label, got {text[:40]!r}") from None


def members(path: Path) -> list[Member]:
    """List the regular files of an uncompressed tar.

    Raises:
        DataError: Not a tar, damaged, or cut short.
    """
    try:
        from krrst_fast._native import scan_tar
    except ImportError:
        return members_by_tarfile(path)
    try:
        return scan_tar(str(path))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def members_by_tarfile(path: Path) -> list[Member]:
    """Do what `members` does, without the extension."""
    try:
        with tarfile.open(path, "r:") as tar:
            found = tar.getmembers()
            # tarfile takes a damaged header for the end of the archive.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(_BLOCK)):
                raise DataError(f"{path}: damaged tar header at byte {tar.offset}")
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a readable tar ({error})") from error
    if any(member.issparse() for member in found):
        raise DataError(f"{path}: sparse members are not read")
    return [(m.name, m.offset_data, m.size) for m in found if m.isreg()]
