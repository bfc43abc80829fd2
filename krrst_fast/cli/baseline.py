"""`krrst baseline METHOD`: a set that another method learns."""

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

from krrst_fast.baselines.registry import FREE_SETTINGS, METHODS, Method
from krrst_fast.cli.stage import Stage, run_stage
from krrst_fast.errors import CheckpointError, ConfigError


def run_baseline(argv: list[str], about: str, *, switches: Mapping[str, str]) -> None:
    """Run the method that the first word names, with the settings after it."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("-h", "--help", "help"):
        print(_overview(about))
    elif name in METHODS:
        run_stage(_stage(name, METHODS[name], switches), rest)
    else:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
        what = f"there is no method {name!r}" if name else "METHOD must be given"
        raise ConfigError(f"baseline: {what}; {hint}")


def _overview(about: str) -> str:
    width = max(map(len, METHODS), default=0)
    rows = [f"  {name:{width}}  {method.about}" for name, method in METHODS.items()]
    return "\n".join(
        [
            "usage: krrst baseline METHOD --store STORE --out OUT [--SETTING VALUE ...]",
            "",
            about,
            "",
            *rows,
            "",
            "krrst baseline METHOD --help lists the settings of one.",
        ]
    )


def _stage(name: str, method: Method, switches: Mapping[str, str]) -> Stage:
    reads = ("store", "target") if "target" in _settings(method) else ("store",)
    return Stage(
        name=f"baseline {name}",
        about=method.about,
        config=method.config,
        positionals=(),
        switches=switches,
        inputs=reads,
        refuse=partial(_refuse, name),
        call=partial(_call, name, method),
        has_presets=False,
    )


def _settings(method: Method) -> set[str]:
    module, config = method.config.split(":")
    return {field.name for field in fields(getattr(import_module(module), config))}


def _refuse(name: str, config: Any, switches: frozenset[str]) -> None:
    from krrst_fast.runs.files import read_json
    from krrst_fast.runs.folder import check_folder

    path = config.out / "config.json"
    if "resume" in switches and path.is_file():
        saved = read_json(path)
        before = saved.get("method") if isinstance(saved, dict) else None
        if before not in (None, name):
            raise CheckpointError(f"{path}: of a run of {before}; resume it by that method")
    free = (*FREE_SETTINGS, "method")
    check_folder(config.out, config, resume="resume" in switches, free=free)


def _call(name: str, method: Method, config: Any, switches: frozenset[str], run: str) -> None:
    from krrst_fast.baselines.learn import learn
    from krrst_fast.runs.files import read_jsonl
    from krrst_fast.runs.log import loss_at_end

    module, learner = method.learner.split(":")
    make, progress = getattr(import_module(module), learner), "quiet" not in switches
    if method.trains_first:
        make = partial(make, progress=progress)
    made = learn(config, make, resume="resume" in switches, progress=progress)
    print(
        f"wrote {config.out}: {len(made.images)} images with {made.targets.shape[1]} targets each"
    )
    loss = loss_at_end(read_jsonl(config.out / "metrics.jsonl"))
    if loss is not None:
        print(f"loss at the end: {loss:.4g} (mean of the last tenth of the logged steps)")
    rival = shlex.quote(f"{name}={config.out}")
    print(f"next: krrst evaluate RUN --store LABELLED_STORE --rivals {rival}")
