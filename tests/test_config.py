"""Strict configs: every wrong key and type is named, and nothing is guessed."""

import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from krrst_fast.data import PrepareConfig, ViewConfig
from krrst_fast.distill import DistillConfig
from krrst_fast.errors import ConfigError
from krrst_fast.evaluate import EvaluateConfig
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import config_hash, from_dict, require, to_dict, typed
from krrst_fast.targets import TargetConfig


@dataclass(frozen=True, kw_only=True)
class Inner:
    widths: tuple[int, ...] = (4, 8)
    norm: Literal["batch", "none", 1] = "batch"


@dataclass(frozen=True, kw_only=True)
class Outer:
    out: Path
    steps: int = 10
    lr: float = 0.1
    flip: bool = True
    limit: int | None = None
    weights: Path | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    methods: tuple[Literal["a", "b"], ...] = ("a",)
    inner: Inner = field(default_factory=Inner)


def test_round_trip() -> None:
    config = Outer(out=Path("x"), limit=3, weights=Path("y"), inner=Inner(widths=(1,), norm=1))
    plain = to_dict(config)
    assert plain == {
        "out": "x",
        "steps": 10,
        "lr": 0.1,
        "flip": True,
        "limit": 3,
        "weights": "y",
        "pair": [0.0, 1.0],
        "methods": ["a"],
        "inner": {"widths": [1], "norm": 1},
    }
    assert from_dict(Outer, plain) == config
    assert type(from_dict(Outer, plain | {"lr": 1}).lr) is float


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stesp": 3}, "there is no setting 'stesp'; did you mean 'steps'?"),
        ({"inner": {"width": [3]}}, "no setting 'inner.width'; did you mean 'inner.widths'?"),
        ({"zzz": 3}, "there is no setting 'zzz'$"),
        ({3: 3}, "there is no setting '3'$"),
        ({"steps": "ten"}, "steps must be a whole number, got 'ten'"),
        ({"steps": 1.0}, "steps must be a whole number, got 1.0"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": None}, "steps must be a whole number, got None"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": float("-inf")}, "lr must be a finite number, got -inf"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"flip": "yes"}, "flip must be true or false, got 'yes'"),
        ({"limit": "3"}, "limit must be a whole number, got '3'"),
        ({"limit": False}, "limit must be a whole number, got False"),
        ({"weights": 3}, "weights must be a path, got 3"),
        ({"pair": [1]}, "pair must have 2 items, got [1]"),
        ({"pair": [1, "x"]}, "pair[1] must be a number, got 'x'"),
        ({"pair": "12"}, "pair must be a list such as [1, 2], got '12'"),
        ({"methods": ["a", "c"]}, "methods[1] must be one of a, b, got 'c'"),
        ({"inner": {"norm": True}}, "inner.norm must be one of batch, none, 1, got True"),
        ({"inner": {"norm": [1]}}, "inner.norm must be one of"),
        ({"inner": 3}, "inner must be a mapping of settings, got 3"),
        ({"inner": {"widths": 32}}, "inner.widths must be a list such as [1, 2], got 32"),
    ],
)
def test_wrong_settings_are_named(change: dict[Any, Any], message: str) -> None:
    expected = re.escape(message).replace(r"\$", "$")
    with pytest.raises(ConfigError, match=expected):
        from_dict(Outer, {"out": "x"} | change)


def test_missing_and_partial() -> None:
    with pytest.raises(ConfigError, match="out is missing"):
        from_dict(Outer, {"steps": 3})
    assert typed(Outer, {"steps": 3, "pair": [1, 2]}) == {"steps": 3, "pair": (1.0, 2.0)}
    with pytest.raises(ConfigError, match="the whole must be a mapping"):
        from_dict(Outer, [1, 2])  # type: ignore[arg-type]


def test_a_part_of_a_section_changes_that_part_of_the_owners_default() -> None:
    target = from_dict(TargetConfig, {"store": "s", "out": "o", "model": {"stem": "imagenet"}})
    assert target.model == ModelConfig(kind="resnet18", stem="imagenet")
    assert from_dict(Outer, {"out": "x", "inner": {"norm": 1}}).inner == Inner(norm=1)


def test_hash_sees_settings_and_not_spellings() -> None:
    base = Outer(out=Path("x"), lr=1.0)
    assert config_hash(base) == config_hash(Outer(out=Path("x"), lr=1))
    assert config_hash(base) == config_hash(from_dict(Outer, to_dict(base)))
    assert config_hash(base) != config_hash(Outer(out=Path("y"), lr=1.0))
    assert config_hash(base, ignore=("out",)) == config_hash(
        Outer(out=Path("y"), lr=1.0), ignore=("out",)
    )
    other = Outer(out=Path("x"), lr=1.0, inner=Inner(widths=(4, 9)))
    assert config_hash(base) != config_hash(other)


def test_require_names_class_field_need_and_value() -> None:
    config = Inner(widths=())
    require(True, config, "widths", "not empty")
    with pytest.raises(ConfigError, match=r"Inner: widths must be not empty, got \(\)"):
        require(False, config, "widths", "not empty")


def test_settings_given_in_python_get_the_types_they_have_in_a_file() -> None:
    config = DistillConfig(
        store="a",  # type: ignore[arg-type]
        target=Path("b"),
        out="c",  # type: ignore[arg-type]
        num_images=np.int64(3),  # type: ignore[arg-type]
        lr=np.float32(0.5),  # type: ignore[arg-type]
        pool={"size": 2, "model": {"widths": [4, 8]}},  # type: ignore[arg-type]
    )
    assert (config.store, config.out, config.lr) == (Path("a"), Path("c"), 0.5)
    assert type(config.num_images) is int and type(config.lr) is float
    assert (config.pool.size, config.pool.model.widths) == (2, (4, 8))
    source = PrepareConfig(source=Path("x") / "y", out="z").source  # type: ignore[arg-type]
    assert source == str(Path("x") / "y")
    assert from_dict(DistillConfig, json.loads(json.dumps(to_dict(config)))) == config


PATHS = {"store": "a", "target": "b", "out": "c"}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (partial(DistillConfig, **PATHS, num_images="3"), "num_images must be a whole number"),
        (partial(DistillConfig, **PATHS, num_images=3.5), "num_images must be a whole number"),
        (partial(DistillConfig, **PATHS, num_images=True), "num_images must be a whole number"),
        (partial(DistillConfig, **PATHS, num_images=3, lr="1"), "lr must be a number, got '1'"),
        (partial(DistillConfig, **PATHS, num_images=3, lr=float("nan")), "lr must be a finite"),
        (
            partial(DistillConfig, **PATHS, num_images=3, pool={"sise": 3}),
            "did you mean 'pool.size'",
        ),
        (partial(DistillConfig, **PATHS, num_images=3, pool=3), "pool must be a mapping"),
        (partial(DistillConfig, **PATHS | {"out": 7}, num_images=3), "out must be a path, got 7"),
        (partial(TargetConfig, store="a", out="b", seed=None), "seed must be a whole number"),
        (partial(TargetConfig, store="a", out="b", projector=3), "projector must be a list"),
        (partial(EvaluateConfig, run="a", store="b", methods="none"), "methods must be a list"),
        (partial(PrepareConfig, source="a", out="b", overwrite="no"), "overwrite must be true or"),
        (partial(PrepareConfig, source=None, out="b"), "source must be text, got None"),
        (partial(ViewConfig, padding="4"), "padding must be a whole number"),
        (partial(ModelConfig, widths=8), "widths must be a list"),
    ],
)
def test_settings_of_another_type_are_refused_by_name(make: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{make.func.__name__}: .*{re.escape(told)}"):
        make()
