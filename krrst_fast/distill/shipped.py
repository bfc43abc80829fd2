"""The distilled sets that come with the package: in `krrst_fast/sets/`, a file and a card each."""

import re
import warnings
from pathlib import Path

from krrst_fast.runs.files import recover_folder

FOLDER = Path(__file__).resolve().parent.parent / "sets"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def shipped_names() -> tuple[str, ...]:
    """Return the names of the shipped sets, in order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def is_shipped(path: str | Path) -> bool:
    """Return whether `path` means a shipped set: it is the name of one, and nothing lies there."""
    return str(path) in shipped_names() and not Path(path).exists()


def file_of_set(path: str | Path) -> Path:
    """Return the file of the shipped set that `path` means, or else `path`.

    What is on disk under the name of a shipped set is taken, with a warning.
    """
    if str(path) in shipped_names():
        recover_folder(Path(path))
    if is_shipped(path):
        return FOLDER / f"{path}.safetensors"
    if str(path) in shipped_names():
        warnings.warn(
            f"{path}: what is in the current directory is read, not the set of that name that "
            "comes with krrst_fast",
            stacklevel=3,
        )
    return Path(path)


def card_of(name: str | Path) -> str:
    """Return the card of a shipped set: what it is, how it was made, what it is worth."""
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def nothing_at(path: str | Path) -> str:
    """Return what is wrong with a path where nothing is; a mere name could be one of a set."""
    text = "there is no such file or folder"
    if _NAME.fullmatch(str(path)):
        text += f", and no shipped set of that name (shipped: {', '.join(shipped_names())})"
    return text
