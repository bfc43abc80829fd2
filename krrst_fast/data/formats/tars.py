"""WebDataset tars: `KEY.jpg` with the label in `KEY.cls` or `KEY.json`; the name says the split."""

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from krrst_fast.data.kinds import IMAGE_SUFFIXES, left_out
from krrst_fast.data.source import (
    MOST_CLASSES,
    UNLABELLED,
    Item,
    LeftOut,
    Part,
    Source,
    Split,
    by_split,
    natural,
    read_lines,
)
from krrst_fast.errors import DataError

Member = tuple[str, int, int]
"""Name, offset of the first byte, and length of a file in a tar."""
Entry = tuple[str, int, int, str, str]
"""A member as it is written: after these three its type, and the target if it is a link."""

_FILE, _HARD_LINK, _SYMBOLIC_LINK = "0", "1", "2"

CLASSES = "classes.txt"
_BLOCK = 512
_CHUNK = 1 << 20
_MOST_TEXT = 1 << 20
_MOST_LINKS = 40
_JSON_LABELS = ("cls", "label")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


@dataclass(frozen=True)
class _Sample:
    image: Member
    label: int


def read(files: list[Path], root: Path) -> Source:
    """Read the samples in the order of the tars' names, and in each in the order they lie in.

    `classes.txt` beside the tars, one name a line, says what the integer labels mean.
    """
    ordered = sorted(files, key=lambda file: natural(str(file)))
    splits = by_split(ordered, lambda path: str(path.relative_to(root)))
    missed: list[LeftOut] = []
    streams = []
    for name, parts in splits.items():
        shards = [(path, _samples(path, missed)) for path in parts]
        streams.append(Split(name, _items(shards), sum(len(samples) for _, samples in shards)))
    return Source("WebDataset tars", tuple(streams), _class_names(root), tuple(missed))


def _class_names(root: Path) -> tuple[str, ...] | None:
    path = root / CLASSES
    return tuple(read_lines(path)) if path.is_file() else None


def _samples(path: Path, missed: list[LeftOut]) -> list[_Sample]:
    """Join the image and label members of one tar by the name up to its first dot."""
    kinds: dict[str, dict[str, Member]] = {"image": {}, "cls": {}, "json": {}}
    for member in members(path, missed):
        name = PurePosixPath(member[0])
        stem, _, suffix = name.name.partition(".")
        suffix = suffix.lower()
        key = str(name.with_name(stem)) if stem else member[0]
        if f".{suffix}" in IMAGE_SUFFIXES:
            kind = kinds["image"]
        elif suffix in kinds:
            kind = kinds[suffix]
        else:
            missed.append(_left_out(f"{path}:{member[0]}", suffix))
            continue
        if key in kind:
            raise DataError(f"{path}: two members are called {member[0]}")
        kind[key] = member
    images, classes, notes = kinds.values()
    for key in classes.keys() - images.keys():
        raise DataError(f"{path}: {classes[key][0]} belongs to no image")
    labels = {}
    with path.open("rb") as file:
        for key, member in notes.items():
            label = _label_in_json(_text(path, file, member))
            if label is None:
                why = "a .json without an integer at cls or label"
            elif key not in images:
                why = "a .json without an image"
            elif key in classes:
                why = "a .json beside a .cls"
            else:
                labels[key] = _checked(path, member[0], label)
                continue
            missed.append(LeftOut(f"{path}:{member[0]}", why))
        for key, member in classes.items():
            labels[key] = _label(path, member[0], _text(path, file, member))
    return [_Sample(image, labels.get(key, UNLABELLED)) for key, image in images.items()]


def _left_out(name: str, suffix: str) -> LeftOut:
    if "." in suffix:
        return LeftOut(name, f"{ascii('.' + suffix)[1:-1]} is no single suffix, as .png is")
    return left_out(Path(name))


def _items(shards: list[tuple[Path, list[_Sample]]]) -> Iterator[Item]:
    for path, samples in shards:
        for sample in samples:
            name, offset, length = sample.image
            yield Item(f"{path}:{name}", Part(path, offset, length), sample.label)


def _text(path: Path, file: BinaryIO, member: Member) -> bytes:
    name, offset, length = member
    if length > _MOST_TEXT:
        raise DataError(f"{path}:{name}: is {length} bytes long, need a label")
    file.seek(offset)
    return file.read(length)


def _label(path: Path, name: str, text: bytes) -> int:
    if not re.fullmatch(rb"\s*[+-]?[0-9]{1,40}\s*", text):
        raise DataError(f"{path}:{name}: need an integer label, got {text[:40]!r}")
    return _checked(path, name, int(text))


def _label_in_json(text: bytes) -> int | None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    found = (values.get(key) for key in _JSON_LABELS)
    return next((value for value in found if type(value) is int), None)


def _checked(path: Path, name: str, label: int) -> int:
    """Return the label; one that cannot be that of a class is refused before it is counted."""
    if not UNLABELLED <= label < MOST_CLASSES:
        raise DataError(f"{path}:{name}: need a label from 0 to {MOST_CLASSES - 1}, got {label}")
    return label


def members(path: Path, missed: list[LeftOut]) -> list[Member]:
    """List the files of an uncompressed tar, and of tars that are joined to it, in their order.

    A link is the file that it leads to, as in a folder; hard links are how tar packs the second
    name of a file. Nothing outside of the tar is read.

    Args:
        path: The tar.
        missed: Gets the links that lead to no file of the tar, devices and the like.

    Raises:
        DataError: Not a tar, damaged, or cut short.
    """
    found = _entries(path)
    if all(kind == _FILE for _, _, _, kind, _ in found):
        return [(name, start, size) for name, start, size, _, _ in found]
    files = {_clean(name): (start, size) for name, start, size, kind, _ in found if kind == _FILE}
    links = {
        _clean(name): _leads_to(name, kind, target)
        for name, _, _, kind, target in found
        if kind in (_HARD_LINK, _SYMBOLIC_LINK)
    }
    members: list[Member] = []
    for name, start, size, kind, _ in found:
        place = _clean(name)
        if kind == _FILE:
            members.append((name, start, size))
        elif (last := _followed(place, links)) in files:
            members.append((name, *files[last]))
        else:
            why = "a link that leads to no file of its tar" if place in links else "no regular file"
            missed.append(LeftOut(f"{path}:{name}", why))
    return members


def _clean(name: str) -> str:
    return posixpath.normpath(name)


def _leads_to(name: str, kind: str, target: str) -> str:
    """Return the name in the tar that a link leads to: a symbolic one starts at its own folder."""
    start = posixpath.dirname(name) if kind == _SYMBOLIC_LINK else ""
    return _clean(posixpath.join(start, target))


def _followed(place: str, links: dict[str, str]) -> str:
    """Follow links to links, as far as Linux does; where they lead on, the end is a link again."""
    for _ in range(_MOST_LINKS):
        if place not in links:
            break
        place = links[place]
    return place


def _entries(path: Path) -> list[Entry]:
    if _starts_with(path, _COMPRESSED):
        raise DataError(f"{path}: a compressed tar; unpack it first: tar -xf FILE -C FOLDER")
    try:
        from krrst_fast._native import index_tar
    except ImportError:
        return entries_by_tarfile(path)
    try:
        found = index_tar(str(path))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    end = max(
        (_end(offset, length) for _, offset, length, kind, _ in found if kind == _FILE), default=0
    )
    # The extension stops at the end of the first tar; folders and links may lie behind its files.
    with path.open("rb") as file:
        return found if _next_header(file, end) is None else entries_by_tarfile(path)


def entries_by_tarfile(path: Path) -> list[Entry]:
    """Do what the extension's index_tar does, without it, and for joined tars as well."""
    found: list[tarfile.TarInfo] = []
    start: int | None = 0
    with path.open("rb") as file:
        while start is not None:
            file.seek(start)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    found += tar.getmembers()
                    end = tar.offset
            except tarfile.TarError as error:
                what = "not a readable tar" if start == 0 else f"damaged tar header at byte {start}"
                raise DataError(f"{path}: {what} ({error})") from error
            # tarfile takes a damaged header for the end of the archive.
            file.seek(end)
            if any(file.read(_BLOCK)):
                raise DataError(f"{path}: damaged tar header at byte {end}")
            start = _next_header(file, end)
    if any(member.issparse() for member in found):
        raise DataError(f"{path}: sparse members are not read")
    return [
        (
            member.name,
            member.offset_data,
            member.size if member.isreg() else 0,
            _FILE if member.isreg() else member.type.decode("latin-1"),
            member.linkname if member.islnk() or member.issym() else "",
        )
        for member in found
        if not member.isdir()
    ]


def _end(offset: int, length: int) -> int:
    return offset + -(-length // _BLOCK) * _BLOCK


def _next_header(file: BinaryIO, start: int) -> int | None:
    """Return where the next block that is not zero begins, from the block at `start` on."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        if used := chunk.lstrip(b"\0"):
            return start + (len(chunk) - len(used)) // _BLOCK * _BLOCK
        start += len(chunk)
    return None


def _starts_with(path: Path, marks: tuple[bytes, ...]) -> bool:
    with path.open("rb") as file:
        return file.read(max(map(len, marks))).startswith(marks)
