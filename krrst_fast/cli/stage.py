"""A command whose settings are the fields of a dataclass."""

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command that is a config and a function of it."""

    name: str
    about: str
    config: str
    """Where its config class is, as module:name."""
    positionals: tuple[str, ...]
    switches: Mapping[str, str]
    inputs: tuple[str, ...]
    """Settings that are files or folders to be read, if they are given."""
    refuse: Callable[[Any, frozenset[str]], None]
    """Raises an error if the output cannot be written; takes the config and the switches."""
    call: Callable[[Any, frozenset[str], str], None]
    """Does it and prints: takes the config, the switches, and ` --run NAME` or nothing."""
    has_presets: bool = True
    """Whether the named runs have settings for it."""


def run_stage(stage: Stage, argv: list[str]) -> None:
    """Run a command with the words after its name."""
    from krrst_fast.cli.settings import parse

    runs: Mapping[str, Mapping[str, Any]] = {}
    if stage.has_presets:
        from krrst_fast.cli.presets import PRESETS

        runs = {run: preset.settings(stage.name) for run, preset in PRESETS.items()}
    module, name = stage.config.split(":")
    parsed = parse(
        getattr(import_module(module), name),
        argv,
        prog=f"krrst {stage.name}",
        about=stage.about,
        runs=runs,
        positionals=stage.positionals,
        switches={**stage.switches, "print-config": "print all settings as YAML and stop"},
    )
    if "print-config" in parsed.switches:
        print(parsed.as_yaml())
    else:
        run = f" --run {parsed.run}" if parsed.run else ""
        config = parsed.config()
        for field in stage.inputs:
            given = getattr(config, field)
            for path in given if isinstance(given, tuple) else (given,):
                if path is not None and str(path) != "digits":
                    shown = field.upper() if field in stage.positionals else f"--{field}"
                    require_there(
                        f"{stage.name}: {shown}: {path}", Path(path), is_set=field == "run"
                    )
        stage.refuse(config, parsed.switches)
        stage.call(config, parsed.switches, run)


def require_there(where: str, path: Path, *, is_set: bool = False) -> None:
    """Raise DataError, before anything imports torch, if there is nothing at a path.

    Args:
        where: The setting and the path, for the message.
        path: The path.
        is_set: Whether the name of a shipped set will do.
    """
    from krrst_fast.distill.shipped import is_shipped, nothing_at

    # A folder whose replacement was killed is still there under another name, and is put back.
    if path.exists() or any(path.parent.glob(f".{glob.escape(path.name)}.*")):
        return
    if not is_set:
        raise DataError(f"{where}: there is no such file or folder")
    if not is_shipped(path):
        raise DataError(f"{where}: {nothing_at(path)}")
