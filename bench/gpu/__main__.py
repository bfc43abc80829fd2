"""`python -m bench.gpu`: what `bench/gpu.sh` calls."""

import argparse
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from bench.gpu import machine, report
from bench.gpu.run import NAMES, STAGES, Request, run
from krrst_fast.errors import KrrstError

REPORT = "report"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    stages = "\n".join(f"  {stage.name:10} {stage.what}" for stage in STAGES)
    parser = Parser(
        prog="bench/gpu.sh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Builds, checks and measures everything that needs a GPU; in under 9 minutes.\n"
        "Called again, it goes on where it stopped.",
        epilog=f"stages, all of them if none is named:\n{stages}\n"
        f"  {REPORT:10} gpu.json and gpu.md from what there is\n\n"
        "--python PYTHON, the interpreter, is read by the shell script.",
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: build/gpu, or gpu-dry")
    parser.add_argument("--dry-run", action="store_true", help="everything, tiny, on the CPU")
    parser.add_argument(
        "--images", type=Path, metavar="STORE", help="by krrst prepare; else digits"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="with report: docs/results, krrst_fast/measured.json and the README's table",
    )
    found = parser.parse_args(argv)
    unknown = [name for name in found.stages if name not in (*NAMES, REPORT)]
    if unknown:
        parser.error(f"no stage {unknown[0]!r}; there are {', '.join((*NAMES, REPORT))}")
    if found.publish and found.stages != [REPORT]:
        parser.error("--publish goes with report alone")
    if found.out is None:
        found.out = machine.ROOT / "build" / ("gpu-dry" if found.dry_run else "gpu")
    if found.out.exists() and not found.out.is_dir():
        parser.error(f"--out {found.out}: a file of that name exists")
    return found


def check_store(path: Path) -> None:
    """Raise DataError if it is none."""
    with warnings.catch_warnings():
        # The checkout has no extension: what is measured is what will be built.
        warnings.simplefilter("ignore", RuntimeWarning)
        from krrst_fast.data.store import open_store
    open_store(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for: 0 if all is well, 1 if something failed, 2 if it cannot begin."""
    asked = arguments(argv)
    out = asked.out.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if asked.publish:
            for path in report.publish(out):
                print(path)
            return 0
        code = 0
        if asked.stages != [REPORT]:
            if asked.images is not None:
                check_store(asked.images)
            images = asked.images.resolve() if asked.images else None
            stages = [name for name in asked.stages if name != REPORT] or NAMES
            code = run(
                Request(
                    out=out,
                    dry_run=asked.dry_run,
                    images=images,
                    again=asked.again,
                    stages=tuple(stages),
                )
            )
        if not asked.stages or REPORT in asked.stages:
            print(report.write(out))
        return code
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
