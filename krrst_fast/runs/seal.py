"""Checksums inside the files that they are of, so that a copied or renamed file keeps its own.

A sealed file holds the SHA-256 of all its bytes, computed with zeros in the place of the digits. So
a change of any bit is found: of the contents, of their frame, and of the checksum itself.
"""

import hashlib
import json
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from krrst_fast.errors import KrrstError

KEY = "krrst_checksum"
"""Name of the checksum in JSON objects and in the metadata of safetensors files."""
_MARK = b"krrst sha256 "
BLANK = _MARK.decode() + 64 * "0"
"""Value of `KEY` in bytes that are to be sealed."""
WRONG = "the checksum is wrong: the file is damaged or was changed by hand"
_SEAL = re.compile(rf'"{KEY}": ?"krrst sha256 ([0-9a-f]{{64}})"'.encode())
ROW_KEY = "crc32"
"""Name of the checksum of one row of a log, its last item."""


def seal(data: bytes) -> bytes:
    """Replace the one `BLANK` in `data` by the checksum of all of it."""
    start = data.rindex(BLANK.encode()) + len(_MARK)
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + 64 :]


def check_seal(
    path: Path,
    data: bytes,
    *,
    failure: type[KrrstError],
    head: int | None = None,
    what: str = WRONG,
) -> bool:
    """Compare the checksum in `data`; return False if it has none, as files from elsewhere.

    Args:
        path: Named in the error.
        data: The whole file.
        failure: The error to raise.
        head: The checksum lies in so many first bytes; None looks for it everywhere.
        what: The rest of the message.

    Raises:
        KrrstError: Of type `failure`: the checksum is another one, or is itself damaged.
    """
    found = list(_SEAL.finditer(data, 0, len(data) if head is None else head))
    if not found:
        # One damaged byte cannot be in both: the key, and what its value begins with.
        if data.find(KEY.encode(), 0, head) < 0 and data.find(_MARK, 0, head) < 0:
            return False
    else:
        start, stop = found[-1].span(1)
        digest = hashlib.sha256(data[:start] + 64 * b"0" + data[stop:]).hexdigest()
        if digest.encode() == found[-1][1]:
            return True
    raise failure(f"{path}: {what}")


def warn_unsealed(path: Path, what: str) -> None:
    """Warn that a file of an earlier version was read unchecked."""
    warnings.warn(
        f"{path}: this {what} was written without a checksum, by an earlier version or by hand; "
        "whether it is damaged cannot be told",
        stacklevel=3,
    )


def sealed_safetensors(data: bytes) -> bytes:
    """Return a safetensors file with a checksum in its metadata, and its header in one order.

    The library's own order of the metadata changes from run to run.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.setdefault("__metadata__", {})[KEY] = BLANK
    # The order of the tensors is that of their bytes; offsets count from the end of the header.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return seal(len(text).to_bytes(8, "little") + text + data[8 + length :])


def check_safetensors(path: Path, *, failure: type[KrrstError]) -> bool:
    """Compare the checksum of a safetensors file; return False if it has none.

    Raises:
        KrrstError: Of type `failure`: the checksum is another one.
        OSError: The file cannot be read.
    """
    data = path.read_bytes()
    # A damaged length must not hide the checksum: it is then looked for in the whole file.
    length = 8 + int.from_bytes(data[:8], "little")
    head = length if length <= len(data) and data[length - 1 : length] in (b"}", b" ") else None
    what = f"not a readable safetensors file ({WRONG})"
    return check_seal(path, data, failure=failure, head=head, what=what)


class Sink:
    """A file for torch.save; hashes what is written, and remembers an OSError torch would hide."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        view = memoryview(data).cast("B")
        try:
            while view.nbytes:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
            raise
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def row_line(row: Mapping[str, Any]) -> bytes:
    """Return a row of a log as a line of JSON with its own checksum."""
    crc = f"{zlib.crc32(json.dumps(dict(row)).encode()):08x}"
    return json.dumps({**row, ROW_KEY: crc}).encode() + b"\n"


def check_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without its checksum; rows of earlier versions have none.

    Raises:
        ValueError: The checksum is wrong.
    """
    if not row:
        return row
    *names, last = row
    rest = {name: row[name] for name in names}
    right = row[last] == f"{zlib.crc32(json.dumps(rest).encode()):08x}"
    if ROW_KEY in row or right:
        # Right under another name: the name is what is damaged.
        if not right or last != ROW_KEY:
            raise ValueError("the checksum is wrong")
        return rest
    return row
