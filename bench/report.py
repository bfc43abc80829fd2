"""asv's results as one page that loads nothing, and as the README's table: python -m bench.report

asv run -E existing --set-commit-hash "$(git rev-parse HEAD)"
python -m bench.report --out report.html --readme README.md
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from bench.charts import digits
from bench.page import Part, part
from bench.results import read
from krrst_fast.errors import DataError, KrrstError
from krrst_fast.files import write_text

BEGIN = "<!-- bench.report: from here to the end mark is written by a program -->"
END = "<!-- bench.report: end -->"
COMMAND = "asv run -E existing --set-commit-hash HEAD; python -m bench.report --readme README.md"
COLUMNS = (
    *("computation", "against", "reference ms", "krrst_fast ms", "times as fast"),
    *("error of the reference", "of krrst_fast"),
)
TITLES = {
    "KRR": "KRR loss and gradients",
    "FewShot": "few-shot heads and gradients",
    "FewShotLoop": "few-shot heads and gradients",
    "Reuse": "one fit, many queries",
}


def render(parts: Sequence[Part]) -> str:
    """The page.

    Raises:
        KrrstError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise KrrstError(f"bench.report: needs jinja2: pip install '.[bench]' ({error})") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    return template.render(
        parts=parts,
        date=date.today().isoformat(),
        digits=digits,
    )


def table(one: Part) -> Iterator[str]:
    """The promised rows in Markdown, and below them what they were measured with."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield "|---" * len(COLUMNS) + "|"
    for promise in one.promises:
        line, suite = promise.line, promise.suite
        cells = [
            f"{TITLES.get(suite.name, 'fit and predict')}: {line.size}",
            suite.against,
            _milliseconds(line.reference_seconds),
            _milliseconds(line.seconds),
            f"**{digits(line.times or 0, 2)}**",
            _scientific(line.reference_error),
            _scientific(line.error),
        ]
        yield f"| {' | '.join(cells)} |"
    latest, machine = one.series.latest, one.series.machine
    words = [
        machine.get("cpu", "an unnamed processor"),
        *(f"{latest.versions['threads']} threads" for _ in "1" if "threads" in latest.versions),
        *(f"torch {latest.versions['torch']}" for _ in "1" if "torch" in latest.versions),
        f"commit {latest.commit[:8]}",
    ]
    yield ""
    yield f"{', '.join(words)}: `{COMMAND}`."


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else digits(seconds * 1e3)


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def rewrite(readme: Path, lines: Sequence[str], marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put the lines between the two marks of a file.

    Raises:
        DataError: it cannot be read, or has not both marks, once, in their order.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"bench.report: {readme} cannot be read: {error}") from error
    begin, end = marks
    if (text.count(begin), text.count(end)) != (1, 1) or text.index(begin) > text.index(end):
        raise DataError(f"bench.report: {readme} needs one line {begin!r} and below it one {end!r}")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    write_text(readme, f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{after}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=Path(".asv/results"), metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path(".asv/report.html"), metavar="PAGE")
    parser.add_argument("--readme", type=Path, help="rewrite the table between its two marks")
    parser.add_argument("--machine", help="of this one alone; else of all, the latest first")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 2 if there is nothing to write it from."""
    options = arguments(argv)
    try:
        series = read(options.results)
        chosen = [one for one in series if options.machine in (None, one.latest.machine)]
        if not chosen:
            names = sorted({one.latest.machine for one in series})
            raise DataError(f"bench.report: no machine {options.machine!r}; there are {names}")
        if not options.out.parent.is_dir() or options.out.is_dir():
            raise DataError(f"bench.report: {options.out} must be a file in a folder that is there")
        parts = [part(one) for one in chosen]
        write_text(options.out, render(parts))
        print(options.out)
        if options.readme is not None:
            rewrite(options.readme, list(table(parts[0])))
            print(options.readme)
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
