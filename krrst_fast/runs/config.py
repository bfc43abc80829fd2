"""Frozen dataclasses to plain JSON and back, strictly."""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from krrst_fast.errors import ConfigError

T = TypeVar("T")

_NAMES = {
    Path: "a path",
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text",
}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as nested dicts of JSON values: paths become strings, tuples lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build the dataclass `cls` from what `to_dict` made.

    Raises:
        ConfigError: A key is unknown or missing, or a value has another type than the field.
    """
    given = typed(cls, values, where)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in given:
            raise ConfigError(f"config: {where + field.name} is missing")
    try:
        return cls(**given)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"config: {where}{error}") from None


def typed(cls: type, values: Any, where: str = "", *, partial: bool = False) -> dict[str, Any]:
    """Check and convert some of the fields of the dataclass `cls`; the others may be missing.

    Fields that a section leaves out have the values of the section that is the default of `cls`,
    which need not be those of the section's own class.

    Args:
        cls: The dataclass.
        values: Some of its fields.
        where: Prefix of the names in errors.
        partial: Leave sections as mappings, of which fields may be missing too: a section is built,
            and its fields compared with each other, when all of them are known.

    Raises:
        ConfigError: A key is unknown, or a value has another type than the field.
    """
    if not isinstance(values, dict):
        what = where.removesuffix(".") or "the whole"
        raise ConfigError(f"config: {what} must be a mapping of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(unknown_key(f"{where}{key}", [where + name for name in names]))
    out = {}
    for key, value in values.items():
        section = dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        if section and partial:
            out[key] = typed(hints[key], value, f"{where}{key}.", partial=True)
        else:
            given = overlaid(_default_section(cls, key), value) if section else value
            out[key] = _typed(hints[key], given, where + key)
    return out


def overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = overlaid(old, value) if both else value  # type: ignore[arg-type]
    return merged


def _default_section(cls: Any, name: str) -> dict[str, Any]:
    """Return the settings of the section that a dataclass has by default; none without one."""
    (field,) = (field for field in dataclasses.fields(cls) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return to_dict(field.default_factory())
    return {} if field.default in (dataclasses.MISSING, None) else to_dict(field.default)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the message for a setting that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"config: there is no setting {key!r}{hint}"


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(args, value, where)
    if origin is Literal:
        # 1 == True == 1.0, but none stands for another.
        if not any(value == arg and type(value) is type(arg) for arg in args):
            choices = ", ".join(map(str, args))
            near = difflib.get_close_matches(str(value), list(map(str, args)), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"config: {where} must be one of {choices}, got {value!r}{hint}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            if typing.get_origin(args[0]) is Literal:
                _typed(args[0], value, where)  # a wrong word is the greater fault
                raise ConfigError(
                    f"config: {where} must be a list such as [{value}], got {value!r}"
                )
            raise ConfigError(f"config: {where} must be a list such as [1, 2], got {value!r}")
        item_hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(item_hints) != len(value):
            raise ConfigError(f"config: {where} must have {len(item_hints)} items, got {value!r}")
        return tuple(
            _typed(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(item_hints, value))
        )
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"config: {where} must be a mapping by name, got {value!r}")
        return {key: _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        return from_dict(typing.cast(type[Any], hint), value, where + ".")
    return _scalar(hint, value, where)


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    errors = []
    for hint in hints:
        if hint is not type(None):
            try:
                return _typed(hint, value, where)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint in (Path, str) and isinstance(value, str | Path):
        return hint(value)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
        # What goes on to torch has 64 bits.
        if not -(2**63) <= value < 2**63:
            raise ConfigError(
                f"config: {where} must be a whole number of 64 bits, got one beyond that"
            )
        return value
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ConfigError(
                f"config: {where} must be a number of at most 1.8e308, got one beyond that"
            ) from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"config: {where} must be {_NAMES.get(hint, hint)}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config: {where} must be a finite number, got {value!r}")
    return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one dict whose keys are dotted, such as `pool.lr`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def config_hash(config: Any, ignore: Collection[str] = ()) -> str:
    """Return a short fingerprint of every setting except the top-level ones in `ignore`."""
    # Through from_dict, so that lr=1 and lr=1.0 are one setting.
    config = from_dict(type(config), to_dict(config))
    values = {key: value for key, value in to_dict(config).items() if key not in ignore}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def settle(config: Any) -> None:
    """Give every field of a frozen dataclass the type it is annotated with, as a file of it would.

    Text becomes a path, a list a tuple, NumPy's numbers Python's, a mapping the section it fills.

    Raises:
        ConfigError: A value has another type, or is none of the choices; it names class and field.
    """
    name = type(config).__name__
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        if dataclasses.is_dataclass(hint) and isinstance(value, typing.cast(type, hint)):
            continue  # it has settled itself
        try:
            object.__setattr__(config, field, _typed(hint, value, field))
        except ConfigError as error:
            raise ConfigError(f"{name}: {str(error).removeprefix('config: ')}") from None


def require_at_least(low: float, config: Any, *fields: str) -> None:
    """Raise a ConfigError unless all these fields are at least `low`."""
    for field in fields:
        require(getattr(config, field) >= low, config, field, f"at least {low}")


def require_positive(config: Any, *fields: str) -> None:
    """Raise a ConfigError unless all these fields are positive."""
    for field in fields:
        require(getattr(config, field) > 0, config, field, "positive")


def require(condition: bool, config: Any, field: str, need: str) -> None:
    """Raise a ConfigError that names class, field, need and value unless `condition` holds."""
    if not condition:
        raise ConfigError(
            f"{type(config).__name__}: {field} must be {need}, got {getattr(config, field)!r}"
        )
