"""Numbers and tables in Markdown, and their place between two marks of a file."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def digits(value: float, count: int = 3) -> str:
    """Format `count` significant digits, with a power of ten outside 0.001 to 100,000."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, count - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    mantissa, _, exponent = f"{value:.{count - 1}e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def scientific(value: float | None) -> str:
    """Format an error: 1.2e-3; "-" for None."""
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def cells(*values: Any) -> str:
    """Format a line of a table."""
    return f"| {' | '.join(str(x).replace('|', '/') for x in values)} |"


def head(*names: str) -> Iterator[str]:
    """Format the first two lines of a table."""
    yield cells(*names)
    yield "|---" * len(names) + "|"


def between(path: Path, begin: str, end: str) -> tuple[str, str]:
    """Return the text of a file before a mark and after another.

    Raises:
        DataError: The file cannot be read, or does not have each mark once and in this order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"bench: {path} cannot be read: {error}") from error
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise DataError(f"bench: {path} needs one line {begin!r} and below it one {end!r}")
    return text.split(begin)[0], text.split(end)[1]


def rewrite(path: Path, lines: Iterable[str], begin: str, end: str) -> None:
    """Replace the text between two marks of a file.

    Raises:
        DataError: As `between`.
    """
    from krrst_fast.runs.files import write_text  # imports torch, which takes seconds

    before, after = between(path, begin, end)
    write_text(path, f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}")
