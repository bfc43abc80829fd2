"""Settings of one command: a named run, then YAML files, then flags, each overriding the last."""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from krrst_fast.errors import ConfigError
from krrst_fast.runs.config import from_dict, overlaid, to_dict, typed


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A parsed command line: the fields of its config, and switches such as --resume."""

    config_class: type
    values: dict[str, Any]
    """Settings by name, sections as mappings; those left out take the default of the class."""
    switches: frozenset[str]
    run: str | None
    """The named run it started from."""
    positionals: tuple[str, ...]

    def config(self) -> Any:
        """Return the whole config, checked.

        Raises:
            ConfigError: A setting is missing, of the wrong type, or out of its range.
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
        """Return every setting as a file that --config reads."""
        import yaml

        typed(self.config_class, self.values)
        given = overlaid(_plain(_defaults(self.config_class)), _plain(self.values))
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
        runs: The settings of each named run, for --run; without any there is no --run.
        positionals: Fields that are given without a flag, in this order.
        switches: Names of flags without a value, and what they do.

    Raises:
        ConfigError: A flag or a key is unknown, or has a value of the wrong type.
    """
    early = Parser(add_help=False, allow_abbrev=False)
    early.set_defaults(run=None)
    if runs:
        early.add_argument("--run")
    early.add_argument("--config", action="append", default=[])
    chosen, rest = early.parse_known_args(argv)
    values: dict[str, Any] = dict(_named(runs, chosen.run))
    for path in chosen.config:
        values = overlaid(values, _read_yaml(config_class, Path(path)))
    parser = _parser(config_class, values, prog, about, runs, positionals, switches)
    flags = {f"--{name}": hint for name, hint in _flags(config_class)}
    known = ["--help", *(f"--{name}" for name in switches), *flags]
    rest = [_known_flag(token, known) for token in rest]
    # `--overwrite` alone means true, and does not swallow a positional that follows it.
    for at, (token, after) in reversed(list(enumerate(zip(rest, [*rest[1:], ""])))):
        if flags.get(token) is bool and after not in ("true", "false"):
            rest[at] = f"{token}=true"
    given = vars(parser.parse_intermixed_args(rest))
    on = frozenset(name for name in switches if given.pop(name.replace("-", "_")))
    for name, text in given.items():
        if isinstance(text, list):  # the words of a positional
            values[name] = text if len(text) > 1 else text[0]
        else:
            values = overlaid(values, _checked(config_class, name, text, flags[f"--{name}"]))
    return Parsed(
        config_class=config_class,
        values=values,
        switches=on,
        run=chosen.run,
        positionals=positionals,
    )


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message in the words of the other errors."""
        message = message.removeprefix("argument ").replace("unrecognized", "unexpected")
        raise ConfigError(message.replace(": expected one argument", " needs a value"))


def _checked(config_class: type, name: str, text: str, hint: Any) -> dict[str, Any]:
    """Return the value of a flag, nested by section, as a file would hold it."""
    words = hint in (str, Path) or typing.get_origin(hint) is typing.Literal
    try:
        value = text if words or not text else _load_yaml(text)
    except ConfigError:
        value = text
    kinds = _alternatives(hint)
    # A list needs no brackets; a word in it that is wrong is named.
    items = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), ())
    of = set(_alternatives(items[0])) if items else set()
    if items and isinstance(value, str) and value[:1] not in ("", "["):
        if typing.get_origin(items[0]) is typing.Literal or of <= {str, Path}:
            value = [word.strip() for word in text.removesuffix(",").split(",")]
        elif "," in value:
            value = _load_yaml(f"[{value}]")
        elif str in of:
            value = [value]
    elif items and isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    # A name may be a number, as those of layers are.
    if str in kinds and value is not None:
        value = text
    nested: dict[str, Any] = {}
    section = nested
    *sections, key = name.split(".")
    for word in sections:
        section = section.setdefault(word, {})
    section[key] = value
    try:
        typed(config_class, nested, partial=True)
    except ConfigError as error:
        raise ConfigError(f"--{str(error).removeprefix('config: ')}") from None
    return nested


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types that a setting may have: those of a union, or the one."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


# Scalars as in YAML 1.2: 1e-3 is a number, and yes, 012 and 1:30 are text.
_SCALARS = (
    ("bool", "true|false", "tf"),
    ("null", "null|~|", ["n", "~", ""]),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.inf|\.nan", "-+."),
)


def _load_yaml(text: str) -> Any:
    """Load a YAML text; raise ConfigError if it is none."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {}

    for tag, pattern, first in _SCALARS:
        Loader.add_implicit_resolver(
            f"tag:yaml.org,2002:{tag}", re.compile(f"(?:{pattern})$"), list(first)
        )
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not a YAML file ({_flat(str(error))})") from None


def _named(runs: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    if name is None:
        return {}
    if name not in runs:
        raise ConfigError(f"--run: there is no run {name!r}; there are {', '.join(runs)}")
    return _plain(runs[name])


def _read_yaml(config_class: type, path: Path) -> dict[str, Any]:
    try:
        values = _load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a YAML file ({error})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, got {values!r}")
    try:
        typed(config_class, values, partial=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('config: ')}") from None
    return values


def _parser(
    config_class: type,
    values: Mapping[str, Any],
    prog: str,
    about: str,
    runs: Mapping[str, Mapping[str, Any]],
    positionals: tuple[str, ...],
    switches: Mapping[str, str],
) -> Parser:
    words = "".join(f"[{name.upper()}] " for name in positionals)
    parser = Parser(
        prog=prog,
        usage=f"{prog} {words}{'[--run NAME] ' * bool(runs)}[--config FILE] [--SETTING VALUE ...]",
        description=about,
        allow_abbrev=False,
        formatter_class=_Help,
    )
    sources = parser.add_argument_group("where settings come from")
    for name, help in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    _add_fields(parser, parser, config_class, values, "", positionals)
    # `parse` has read these before; they are listed for --help.
    listed = [("config", "FILE", "YAML settings" + ", over those of --run" * bool(runs))]
    if runs:
        listed.insert(0, ("run", "NAME", f"one of {', '.join(runs)}"))
    for name, metavar, about in listed:
        sources.add_argument(
            f"--{name}", metavar=metavar, dest=f"_{name}", help=about, default=argparse.SUPPRESS
        )
    return parser


def _add_fields(
    parser: Any,
    group: Any,
    config_class: type,
    values: Mapping[str, Any],
    prefix: str,
    positionals: tuple[str, ...],
) -> None:
    """Add a flag for each field, with its value as the default; sections last, each in a group."""
    hints, notes = typing.get_type_hints(config_class), _notes(config_class)
    values = overlaid(_plain(_defaults(config_class)), values)
    sections = []
    for field in dataclasses.fields(config_class):
        name, hint = field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections.append((name, typing.cast(type, hint)))
            continue
        shown = f"[{_shown(values[name])}]" if name in values else "(must be given)"
        note = f"{notes.get(name, '')} {shown}".strip()
        plain: dict[str, Any] = {"help": note.replace("%", "%%"), "default": argparse.SUPPRESS}
        if name in positionals:
            group.add_argument(name, nargs=_count(hint), metavar=name.upper(), **plain)
        else:
            flag = f"{prefix}{name}"
            group.add_argument(f"--{flag}", metavar=_metavar(hint), dest=flag, **plain)
    for name, section in sections:
        title = f"--{prefix}{name}.*"
        about = (section.__doc__ or "").partition("\n")[0]
        below = parser.add_argument_group(title, about)
        _add_fields(parser, below, section, values.get(name, {}), f"{prefix}{name}.", ())


def _count(hint: Any) -> str:
    """Return how many words a positional takes: any number where it may be a list."""
    return "*" if any(typing.get_origin(kind) is tuple for kind in _alternatives(hint)) else "?"


class _Help(argparse.HelpFormatter):
    """Wide enough for flags of sections."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=100)


def _notes(config_class: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, also of fields that it inherits."""
    from docstring_parser import parse_from_object

    classes = [kind for kind in reversed(config_class.__mro__) if dataclasses.is_dataclass(kind)]
    notes = [note for kind in classes for note in parse_from_object(kind).params]
    return {note.arg_name: _flat(note.description or "") for note in notes}


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_shown, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _metavar(hint: Any) -> str:
    """Return a short word for the type of a flag, such as INT or {sgd,ridge}."""
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
    """Return settings as YAML writes them: paths as text, tuples as lists, sections as mappings."""

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
    """Return the names and types of all settings, those of sections too."""
    for name, hint in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield from _flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _known_flag(token: str, known: Sequence[str]) -> str:
    """Return the token with - for _ in a flag; raise ConfigError for a flag that does not exist."""
    if not token.startswith("--") or token == "--":
        return token
    name, equals, value = token.partition("=")
    spelling = {flag.replace("-", "_"): flag for flag in known}
    flag = spelling.get(name.replace("-", "_"))
    if flag is None:
        near = _nearest_flag(name, known)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"there is no flag {name}{hint}")
    return flag + equals + value


def _nearest_flag(name: str, known: Sequence[str]) -> str | None:
    """Return the flag that was meant: a section's first, a longer, shorter or misspelled one."""
    name = name.replace("-", "_")
    spelling = {flag.replace("-", "_"): flag for flag in known}
    for begins in (f"{name}.", name):
        longer = [flag for plain, flag in spelling.items() if plain.startswith(begins)]
        if longer:
            return longer[0]
    # One that was shortened: --probe.labels for --probe.labels_per_class.
    shorter = [plain for plain in spelling if name.startswith(plain) and "." in plain]
    if shorter:
        return spelling[max(shorter, key=len)]
    # A word of a setting in a section stands for it: --momentum for --pool.momentum.
    word = f".{name.strip('_')}."
    ends = [flag for plain, flag in spelling.items() if word in f".{plain.strip('_')}."]
    near = difflib.get_close_matches(name, list(spelling), n=1, cutoff=0.6)
    return ends[0] if ends else spelling[near[0]] if near else None


def _flat(text: str) -> str:
    return " ".join(text.split())
