"""Settings of one command: a named run, then YAML files, then flags, each overriding the last."""

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krrst_fast.config import from_dict, to_dict, typed
from krrst_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a command line asks for: the fields of its config, and switches such as --resume."""

    config_class: type
    values: dict[str, Any]
    """Settings by name, sections as mappings; those left out take the default of the class."""
    switches: frozenset[str]
    run: str | None
    """The named run it started from."""
    positionals: tuple[str, ...]

    def config(self) -> Any:
        """The config, whole and checked.

        Raises:
            ConfigError: a setting is missing, of the wrong type, or out of its range.
        """
        missing = [
            name.upper() if name in self.positionals else f"--{name}"
            for name in _required(self.config_class)
            if name not in self.values
        ]
        if missing:
            raise ConfigError(f"{' and '.join(missing)} must be given: a flag or a config key")
        return from_dict(self.config_class, self.values)

    def as_yaml(self) -> str:
        """Every setting, as a file that --config reads."""
        import yaml

        typed(self.config_class, self.values)
        given = _plain(_defaults(self.config_class) | self.values)
        names = [field.name for field in dataclasses.fields(self.config_class)]
        values = {name: given[name] for name in names if name in given}
        missing = [name for name in _required(self.config_class) if name not in self.values]
        note = f"# still to be given: {', '.join(missing)}\n" if missing else ""
        return note + yaml.safe_dump(values, sort_keys=False, default_flow_style=None).rstrip()


def parse(
    config_class: type,
    argv: Sequence[str],
    *,
    prog: str,
    about: str,
    runs: Mapping[str, Mapping[str, Any]],
    positionals: tuple[str, ...] = (),
    switches: Mapping[str, str],
) -> Parsed:
    """Read the command line of one command. `--help` prints and exits.

    Args:
        runs: the settings of each named run, for --run.
        positionals: fields that are given without a flag, in this order.
        switches: names of flags without a value, and what they do.

    Raises:
        ConfigError: a flag or a key is unknown, or has a value of the wrong type.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--run")
    early.add_argument("--config", action="append", default=[])
    try:
        chosen, rest = early.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    values: dict[str, Any] = dict(_named(runs, chosen.run))
    for path in chosen.config:
        values = _merge(values, _read_yaml(config_class, Path(path)))
    parser = _parser(config_class, values, prog, about, runs, positionals, switches)
    flags = {f"--{name}": hint for name, hint in _flags(config_class)}
    known = ["--help", *(f"--{name}" for name in switches), *flags]
    rest = [_known_flag(token, known) for token in rest]
    # `--overwrite` alone means true, and does not swallow a positional that follows it.
    for at, (token, after) in reversed(list(enumerate(zip(rest, [*rest[1:], ""])))):
        if flags.get(token) is bool and after not in ("true", "false"):
            rest[at] = f"{token}=true"
    try:
        given = parser.parse_args(rest).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    on = frozenset(name for name in switches if given.pop(name.replace("-", "_")))
    return Parsed(
        config_class=config_class,
        values=_merge(values, given),
        switches=on,
        run=chosen.run,
        positionals=positionals,
    )


def _named(runs: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in runs:
        raise ConfigError(f"--run: there is no run {name!r}; there are {', '.join(runs)}")
    return _plain(runs[name])


def _read_yaml(config_class: type, path: Path) -> dict[str, Any]:
    import yaml
    from jsonargparse import get_loader

    try:
        values = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({_flat(str(error))})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, got {values!r}")
    try:
        typed(config_class, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _parser(
    config_class: type,
    values: Mapping[str, Any],
    prog: str,
    about: str,
    runs: Mapping[str, Mapping[str, Any]],
    positionals: tuple[str, ...],
    switches: Mapping[str, str],
) -> Any:
    from jsonargparse import ArgumentParser

    words = "".join(f"[{name.upper()}] " for name in positionals)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} {words}[--run NAME] [--config FILE] [--SETTING VALUE ...]",
        description=about,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    sources = parser.add_argument_group("where settings come from")
    for name, help in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    _add_fields(parser, parser, config_class, values, "", positionals)
    # Read before this parser is made, and here for the help alone; last, so that a field called
    # `run` is found before the flag.
    names = ", ".join(runs)
    sources.add_argument("--run", metavar="NAME", dest="run_name", help=f"one of {names}")
    sources.add_argument(
        "--config", metavar="FILE", dest="config_file", help="YAML settings, over those of --run"
    )
    parser.set_defaults({"run_name": argparse.SUPPRESS, "config_file": argparse.SUPPRESS})
    return parser


def _add_fields(
    parser: Any,
    group: Any,
    config_class: type,
    values: Mapping[str, Any],
    prefix: str,
    positionals: tuple[str, ...],
) -> None:
    """A flag for each field, with the value it would have; sections come last, each in a group."""
    hints, notes = typing.get_type_hints(config_class), _notes(config_class)
    values = _plain(_defaults(config_class)) | dict(values)
    sections = []
    for field in dataclasses.fields(config_class):
        name, hint = field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections.append((name, typing.cast(type, hint)))
            continue
        shown = f"[{_shown(values[name])}]" if name in values else "(must be given)"
        note = f"{notes.get(name, '')} {shown}".strip()
        plain: dict[str, Any] = {"type": hint, "help": note, "default": argparse.SUPPRESS}
        if name in positionals:
            group.add_argument(name, nargs="?", metavar=name.upper(), **plain)
        else:
            group.add_argument(f"--{prefix}{name}", metavar=_metavar(hint), **plain)
    for name, section in sections:
        title = f"--{prefix}{name}.*"
        about = (section.__doc__ or "").partition("\n")[0]
        below = parser.add_argument_group(title, about)
        _add_fields(parser, below, section, values.get(name, {}), f"{prefix}{name}.", ())


class _Help(argparse.HelpFormatter):
    """Wide enough for flags of sections."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)


def _notes(config_class: type) -> dict[str, str]:
    """The text under each field of a dataclass."""
    try:
        from docstring_parser import parse_from_object
    except ModuleNotFoundError:  # an optional part of jsonargparse; the help is terse without it
        return {}
    notes = parse_from_object(config_class).params
    return {note.arg_name: _flat(note.description or "") for note in notes}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _metavar(hint: Any) -> str:
    """A short word for the type of a flag, such as INT or {sgd,ridge}."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, args)) + "}"
    if typing.get_origin(hint) is tuple:
        return f"[{_metavar(args[0])},...]"
    if args:
        return _metavar(args[0])
    return {"bool": "{true,false}", "Path": "PATH"}.get(hint.__name__, hint.__name__.upper())


def _required(config_class: type) -> list[str]:
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(config_class)
        if field.default is missing and field.default_factory is missing
    ]


def _defaults(config_class: type) -> dict[str, Any]:
    defaults = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as YAML has them: paths as text, tuples as lists, sections as mappings."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_dict(value)
        if isinstance(value, Mapping):
            return _plain(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {key: plain(value) for key, value in values.items()}


def _flags(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The names and types of all settings, those of sections too."""
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _known_flag(token: str, known: Sequence[str]) -> str:
    """The token, with - for _ allowed in flags; ConfigError for a flag that does not exist."""
    if not token.startswith("--") or token == "--":
        return token
    name, equals, value = token.partition("=")
    spelling = {flag.replace("-", "_"): flag for flag in known}
    flag = spelling.get(name.replace("-", "_"))
    if flag is None:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no flag {name}{hint}")
    return flag + equals + value


def _flat(text: str) -> str:
    return " ".join(text.split())


def _one_line(text: str) -> str:
    """An error of jsonargparse in our words: the flag, what it takes, what came."""
    text = _flat(text)
    found = re.match(r'Parser key "([^"]+)": (.*)', text)
    if not found:
        text = text.removeprefix("argument ").replace("unrecognized", "unexpected")
        return text.replace(": expected one argument", " needs a value")
    key, problem = found.groups()
    came = re.search(r"(?:Given value|Got value): (.*)$", problem)
    needs = re.findall(r"Expected an? (.*?)(?:\. Got|\. Given| - | Given|$)", problem)
    if not came or not needs:
        return f"--{key}: {problem}"
    words = [_type_name(need) for need in needs if need != "<class 'NoneType'>"]
    return f"--{key} must be {' or '.join(words)}, got {came[1]}"


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    literal = re.fullmatch(r"Literal\[(.*)\]", text)
    if literal:
        return "one of " + literal[1].replace("'", "")
    names = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "tuple": "a list such as [1,2]",
    }
    return names.get(text, text)
