"""Tensors on the disk: states of runs, safetensors, and what torch saved; nothing is unpickled."""

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError, KrrstError
from krrst_fast.runs.files import atomic_path
from krrst_fast.runs.seal import WRONG, Sink, sealed_safetensors, warn_unsealed

_MAGIC = b"krrst_fast state, sha256 "
_HEAD = len(_MAGIC) + 64 + 1
"""Bytes of the first line of a saved state: the words above, and the digest of all that follows."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a dict of tensors and plain values; a reader sees the old file or the new one, whole.

    The first line holds a digest of the rest, which `load_state` compares.

    Raises:
        OSError: It could not be written, as on a full disk.
    """
    # Unbuffered: the file is closed without a last write that could fail a second time.
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
        sink = Sink(file)
        file.write(_MAGIC + 64 * b"0" + b"\n")
        try:
            torch.save(dict(state), sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            # Torch closes its archive after Ctrl-C too, and finds it incomplete.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            if sink.error is None:
                raise
            raise OSError(sink.error.errno, sink.error.strerror, str(path)) from None
        file.seek(len(_MAGIC))
        file.write(sink.digest.hexdigest().encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save a safetensors file atomically, with its checksum in the metadata.

    Raises:
        OSError: It could not be written, as on a full disk.
    """
    from safetensors.torch import save

    # Through memory: the library's own writer turns a full disk into an error of its own.
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(sealed_safetensors(save(plain, dict(metadata))))


def load_torch(
    path: Path,
    *,
    what: str,
    failure: type[KrrstError],
    map_location: str | torch.device = "cpu",
    mmap: bool = False,
) -> Any:
    """Load what `torch.save` wrote. Nothing but tensors and plain values is unpickled.

    Args:
        path: The file.
        what: Kind of the file, for the message.
        failure: The error to raise.
        map_location: The device that its tensors come to.
        mmap: Map the tensors into memory, where the file allows it.

    Raises:
        KrrstError: Of type `failure`: the file is missing or damaged.
    """
    try:
        mapped = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise failure(f"{path}: there is no such {what}") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        # Also an OSError, from a seek past the start; one that names the file is about opening it.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise failure(f"{path}: not a readable {what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Return one line on why torch could not load a file, without its advice to run the code."""
    text = str(error).strip()
    if "weights_only" in text or "Weights only" in text:
        named = re.search(r"GLOBAL (\S+)", text)
        what = f" ({named[1]})" if named else ""
        return f"it is damaged, or holds more than tensors and plain values{what}"
    return text.partition("\n")[0] or type(error).__name__


def load_state(
    path: Path, *, map_location: str | torch.device = "cpu", sealed: bool = False
) -> dict[str, Any]:
    """Load what `save_state` wrote, or a dict that torch saved, which has no checksum.

    Args:
        path: The file.
        map_location: The device that its tensors come to.
        sealed: Warn if the file has no checksum, as those of earlier versions.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    what = "checkpoint"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            data = file.read() if head.startswith(_MAGIC) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such {what}") from None
    if head.startswith(_MAGIC):
        digest = hashlib.sha256(data).hexdigest()
        if head != _MAGIC + digest.encode() + b"\n":
            raise CheckpointError(f"{path}: not a readable {what} ({WRONG})")
        try:
            state = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
        except Exception as error:
            reason = _reason(error)
            raise CheckpointError(f"{path}: not a readable {what} ({reason})") from error
    else:
        state = load_torch(path, what=what, failure=CheckpointError, map_location=map_location)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if sealed and not head.startswith(_MAGIC):
        warn_unsealed(path, what)
    return state
