"""krrst evaluate --suite: several stores and students with the settings of a suite."""

import shlex
from collections.abc import Sequence

from krrst_fast.cli.settings import parse


def run_suite(argv: Sequence[str]) -> None:
    """Parse the command line, evaluate every cell, and print the tables."""
    from krrst_fast.errors import ConfigError
    from krrst_fast.evaluate.suite import SUITES, SuiteConfig, evaluate_suite

    # A suite is a named run of its own settings: --suite NAME stands for --run NAME.
    words = list(argv)
    for at, word in enumerate(words):
        if word.partition("=")[0] == "--suite":
            name = word.partition("=")[2] or "".join(words[at + 1 : at + 2])
            if name not in SUITES:
                raise ConfigError(f"--suite: there is no suite {name!r}, only {', '.join(SUITES)}")
            words.insert(at, f"--run={name}")
            break
    parsed = parse(
        SuiteConfig,
        words,
        prog="krrst evaluate",
        about="Evaluate distilled sets on several labelled stores and students, in one table.",
        runs=SUITES,
        positionals=("run",),
        switches={"quiet": "no progress bar", "print-config": "print all settings and stop"},
    )
    if "print-config" in parsed.switches:
        print(parsed.as_yaml())
        return
    config = parsed.config()
    print(evaluate_suite(config, progress="quiet" not in parsed.switches))
    print(f"\nwrote {config.folder / config.suite}.md, and a result for each cell beside it")
    print(f"next: krrst report {shlex.quote(str(config.runs[0]))}")
