"""Parquet and Arrow files of Hugging Face data sets: encoded images in a column."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krrst_fast.data.source import UNLABELLED, Item, Source, Split, by_split, natural, split_of
from krrst_fast.errors import DataError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".parquet", ".arrow")
_IMAGES = ("image", "img", "jpg", "png", "bytes")
_LABELS = ("label", "labels", "fine_label", "cls")
_END = b"\xff\xff\xff\xff\0\0\0\0"
_ROWS = 64
"""Images that are read at a time."""


def find(folder: Path) -> list[Path]:
    """List the files of a data set: in the folder, in its `data`, or in folders named as splits."""
    places = [folder, folder / "data"]
    places += [p for p in sorted(folder.iterdir()) if p.is_dir() and split_of(p.name)]
    for suffix in SUFFIXES:
        found = [p for place in places for p in sorted(place.glob(f"*{suffix}")) if p.is_file()]
        # `save_to_disk` keeps the results of earlier computations beside the data.
        if found := [p for p in found if not p.name.startswith("cache-")]:
            return found
    return []


def read(files: Sequence[Path], root: Path) -> Source:
    """Read files of which each is a split, or a part of one, as its path says; train by default.

    A row holds an image file, as bytes or as {bytes, path}, and may have a label: an integer, whose
    class names are taken from the metadata of a Hugging Face data set, or a word.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, or no column is clearly the image.
    """
    ordered = sorted(files, key=lambda path: natural(str(path.relative_to(root))))
    tables = {path: _Table(path) for path in ordered}
    first = tables[ordered[0]]
    for table in tables.values():
        if (table.image, table.label) != (first.image, first.label):
            raise DataError(f"{table.path}: its columns are not those of {first.path}")
        if (table.has_words, table.classes) != (first.has_words, first.classes):
            raise DataError(f"{table.path}: its labels or classes are not those of {first.path}")
    classes = first.classes
    numbers = None
    if first.has_words:
        words = {word for table in tables.values() for word in table.words()}
        classes = tuple(sorted(words, key=natural))
        numbers = {name: i for i, name in enumerate(classes)}
    splits = by_split(ordered, lambda path: str(path.relative_to(root)))
    return Source(
        "Parquet" if first.path.suffix == ".parquet" else "Arrow",
        tuple(
            Split(
                name,
                _items([tables[p] for p in parts], numbers),
                sum(tables[p].count for p in parts),
            )
            for name, parts in splits.items()
        ),
        classes,
    )


def _split(name: str, tables: Sequence["_Table"], numbers: dict[str, int] | None) -> Split:
    return Split(name, _items(tables, numbers), sum(table.count for table in tables))


def _items(tables: Sequence["_Table"], numbers: dict[str, int] | None) -> Iterator[Item]:
    for table in tables:
        for row, (image, label) in enumerate(table.rows()):
            name = f"{table.path}[{row}]"
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes):
                raise DataError(f"{name}: the image is not in the file: its bytes are missing")
            if label is None:
                label = UNLABELLED
            yield Item(name, data, label if numbers is None else numbers.get(label, UNLABELLED))


class _Table:
    """One file: which columns are the image and the label, and its rows.

    Attributes:
        path: The file.
        image, label: Names of the columns; there may be no label.
        count: Number of rows.
        has_words: The labels are words.
        classes: Class names from the metadata of a Hugging Face data set.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as table:
            schema = table.schema_arrow if path.suffix == ".parquet" else table.schema
            self.count = (
                table.metadata.num_rows
                if path.suffix == ".parquet"
                else sum(batch.num_rows for batch in table)
            )
        self.image = self._image_in(schema)
        features = _features(schema)
        self.label = self._label_in(schema, features)
        self.has_words, self.classes = False, None
        if self.label is not None:
            self.has_words = _kind(schema, self.label) == "words"
            names = features.get(self.label, {}).get("names")
            self.classes = tuple(map(str, names)) if names else None

    def _image_in(self, schema: "pyarrow.Schema") -> str:
        images = [name for name in schema.names if _kind(schema, name) == "image"]
        named = [name for name in _IMAGES if name in images]
        if named or len(images) == 1:
            return (named or images)[0]
        raise DataError(
            f"{self.path}: need one column of image files, called {' or '.join(_IMAGES)}; its "
            f"columns are {', '.join(schema.names)}"
        )

    def _label_in(self, schema: "pyarrow.Schema", features: dict[str, Any]) -> str | None:
        fit = [name for name in schema.names if _kind(schema, name) in ("number", "words")]
        if named := [name for name in _LABELS if name in fit]:
            return named[0]
        if unfit := [name for name in _LABELS if name in schema.names]:
            raise DataError(
                f"{self.path}: column {unfit[0]} must hold integers or words, got "
                f"{schema.field(unfit[0]).type}"
            )
        declared = [name for name in fit if "names" in features.get(name, {})]
        if len(declared) > 1:
            raise DataError(
                f"{self.path}: which column is the label? There are {', '.join(declared)}; call "
                "one of them label"
            )
        return declared[0] if declared else None

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open the file; damage that is found while it is read becomes a DataError."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"prepare: {self.path}: reading it needs pyarrow: pip install 'krrst-fast[parquet]'"
            ) from None
        try:
            if self.path.suffix == ".parquet":
                with pyarrow.parquet.ParquetFile(
                    self.path, memory_map=True, page_checksum_verification=True
                ) as table:
                    yield table
            else:
                # Without its end a stream reads like a shorter one.
                if not self._has_end():
                    raise EOFError("it is cut short")
                with pyarrow.memory_map(str(self.path)) as file:
                    yield pyarrow.ipc.open_stream(file)
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{self.path}: not a readable {self.path.suffix[1:]} file ({reason})"
            ) from error

    def _has_end(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - len(_END)))
            return file.read() == _END

    def _batches(self, columns: list[str], size: int) -> Iterator[dict[str, list[Any]]]:
        with self._opened() as table:
            if self.path.suffix == ".parquet":
                batches = table.iter_batches(batch_size=size, columns=columns)
            else:
                batches = (
                    batch.slice(first, size)
                    for batch in table
                    for first in range(0, batch.num_rows, size)
                )
            for batch in batches:
                yield {name: batch.column(name).to_pylist() for name in columns}

    def rows(self) -> Iterator[tuple[Any, Any]]:
        """Yield image and label of each row."""
        columns = [self.image] if self.label is None else [self.image, self.label]
        for batch in self._batches(columns, _ROWS):
            labels = batch[self.label] if self.label else [None] * len(batch[self.image])
            yield from zip(batch[self.image], labels, strict=True)

    def words(self) -> set[str]:
        """Return the labels that occur."""
        assert self.label is not None
        batches = self._batches([self.label], 1 << 16)
        return {word for batch in batches for word in batch[self.label] if word is not None}


def _kind(schema: "pyarrow.Schema", name: str) -> str | None:
    """Return what a column could be: an image, a number, words, or None of these."""
    from pyarrow import types

    found = schema.field(name).type
    if types.is_dictionary(found):  # as pandas has its categories
        found = found.value_type
    if types.is_struct(found):
        inside = [found.field(i) for i in range(found.num_fields)]
        held = [field for field in inside if field.name == "bytes"]
        return "image" if held and _is_bytes(held[0].type) else None
    if _is_bytes(found):
        return "image"
    if types.is_integer(found):
        return "number"
    return "words" if types.is_string(found) or types.is_large_string(found) else None


def _is_bytes(found: Any) -> bool:
    from pyarrow import types

    return types.is_binary(found) or types.is_large_binary(found)


def _features(schema: "pyarrow.Schema") -> dict[str, Any]:
    """Return what a Hugging Face data set says of its columns."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)}
