"""Settings: a named run, then files, then flags; and a clear word about each that is wrong."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("docstring_parser")

from krrst_fast.cli.settings import Parsed, parse
from krrst_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The networks."""

    size: int = 10
    """How many."""
    widths: tuple[int, ...] = (8, 16)
    reset: Literal["paper", "released"] = "paper"


@dataclass(frozen=True, kw_only=True)
class Work:
    """Some work."""

    source: Path
    """Where it comes from."""
    out: Path
    steps: int = 100
    lr: float = 1e-4
    flip: bool = True
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    methods: tuple[Literal["a", "b"], ...] = ("a", "b")
    pool: Pool = field(default_factory=Pool)


HUGE = "1" + "0" * 400
"""A whole number that no float can hold."""
RUNS = {"small": {"steps": 5, "pool": Pool(size=3)}, "empty": {}}


def _parse(*argv: object) -> Parsed:
    return parse(
        Work,
        [str(arg) for arg in argv],
        prog="krrst work",
        about="Do it.",
        runs=RUNS,
        positionals=("source",),
        switches={"resume": "go on", "print-config": "print"},
    )


def test_each_layer_overrides_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("steps: 7\nlr: 3e-4\npool: {reset: released}\n")
    flags = ["x", "--out", "y", "--lr", "1e-2"]
    assert _parse("x", "--out", "y").config() == Work(source=Path("x"), out=Path("y"))
    small = _parse(*flags, "--run", "small").config()
    assert (small.steps, small.lr, small.pool) == (5, 1e-2, Pool(size=3))
    for words in ([*flags, "--config", file], ["--config", file, *flags]):
        mixed = _parse("--run=small", *words).config()
        assert (mixed.steps, mixed.lr) == (7, 1e-2), "a flag wins wherever it stands"
        assert mixed.pool == Pool(size=3, reset="released"), "sections are merged key by key"
    second = tmp_path / "b.yaml"
    second.write_text("steps: 8\nlr: 1e3\n")
    twice = _parse("x", "--out", "y", "--config", file, "--config", second).config()
    assert (twice.steps, twice.lr, twice.pool.reset) == (8, 1000.0, "released")


def test_a_field_may_be_called_run() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Judge:
        run: Path
        seeds: int = 5

    for argv in (["here", "--run", "small"], ["--run=small", "--seeds", "2", "here"]):
        parsed = parse(
            Judge,
            argv,
            prog="krrst judge",
            about="",
            runs={"small": {"seeds": 2}},
            positionals=("run",),
            switches={},
        )
        assert parsed.config() == Judge(run=Path("here"), seeds=2) and parsed.run == "small"


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert _parse("--config", tmp_path / "a.yaml").values == {}


def test_flags_in_all_their_spellings() -> None:
    parsed = _parse(
        *["--flip", "x", "--pool.widths", "[1, 2]", "--limit=3", "--methods=[b]", "--resume"],
        *["--out", "y", "--lr", "-1", "--pool.reset", "released"],
    )
    config = parsed.config()
    assert parsed.switches == {"resume"} and parsed.run is None
    assert config == Work(
        source=Path("x"),
        out=Path("y"),
        lr=-1.0,
        limit=3,
        methods=("b",),
        pool=Pool(widths=(1, 2), reset="released"),
    )
    assert _parse("--flip", "false").values == {"flip": False}
    assert _parse("--limit", "null").values == {"limit": None}


def test_printed_settings_are_a_file_that_gives_them_again(tmp_path: Path) -> None:
    parsed = _parse("--run", "small", "--lr", "3e-7", "--limit", 4)
    text = parsed.as_yaml()
    assert text.startswith("# still to be given: source, out\nsteps: 5\n")
    (tmp_path / "a.yaml").write_text(text)
    again = _parse("--config", tmp_path / "a.yaml")
    assert again.as_yaml() == text
    whole = _parse("x", "--out", "y", "--config", tmp_path / "a.yaml")
    assert whole.config() == Work(
        source=Path("x"), out=Path("y"), steps=5, lr=3e-7, limit=4, pool=Pool(size=3)
    )
    assert whole.as_yaml().startswith("source: x\nout: y\nsteps: 5\n")


def test_a_list_needs_no_brackets() -> None:
    for text in ("3,4", "3,4,", "[3,4]", "[3, 4]", "3, 4"):
        config = _parse("x", "--out", "y", "--pool.widths", text).config()
        assert config.pool.widths == (3, 4)
    assert _parse("x", "--out", "y", "--pool.widths", "3").config().pool.widths == (3,)
    for text in ("0.5,1", "0.5, 1,", "[0.5, 1]"):
        assert _parse("--mean", text, "x", "--out", "y").config().mean == (0.5, 1.0)
    assert _parse("--mean", "null").values == {"mean": None}
    for text in ("a,b", "a, b", " a ,b,", "[a, b]"):
        assert _parse("--methods", text, "x", "--out", "y").config().methods == ("a", "b")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--run", "smal"], "--run: there is no run 'smal'; there are small, empty"),
        (["--run"], "--run needs a value"),
        (["--stesp", "3"], "there is no flag --stesp; did you mean --steps?"),
        (["--pool.sise=3"], "there is no flag --pool.sise; did you mean --pool.size?"),
        (["--pool.size_of_it=3"], "there is no flag --pool.size_of_it; did you mean --pool.size?"),
        (["--qqq"], "there is no flag --qqq"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "many"], "--steps must be a whole number, got 'many'"),
        (["--steps", "1.5"], "--steps must be a whole number, got 1.5"),
        (["--steps", "true"], "--steps must be a whole number, got True"),
        (["--lr", "fast"], "--lr must be a number, got 'fast'"),
        (["--lr", "1e-3x"], "--lr must be a number, got '1e-3x'"),
        (["--lr", "nan"], "--lr must be a number, got 'nan'"),
        (["--steps", "1_000"], "--steps must be a whole number, got '1_000'"),
        (["--pool.widths", "[3,"], "--pool.widths must be a list such as [1, 2], got '[3,'"),
        (["--limit", ""], "--limit must be a whole number"),
        (["--flip=2"], "--flip must be true or false, got 2"),
        (["--limit", "few"], "--limit must be a whole number, got 'few'"),
        (["--pool.widths", "x"], "--pool.widths must be a list such as [1, 2], got 'x'"),
        (["--pool.widths", "true"], "--pool.widths must be a list such as [1, 2], got True"),
        (["--pool.widths", "3.5"], "--pool.widths[0] must be a whole number, got 3.5"),
        (["--pool.widths", "[3,x]"], "--pool.widths[1] must be a whole number, got 'x'"),
        (["--pool.reset", "no"], "--pool.reset must be one of paper, released, got 'no'"),
        (["--pool.widths", "3,x"], "--pool.widths[1] must be a whole number, got 'x'"),
        (["--mean", "0.5, x"], "--mean[1] must be a number, got 'x'"),
        (
            ["--mean", f"1,{HUGE}"],
            "--mean[1] must be a number of at most 1.8e308, got one beyond that",
        ),
        (["--lr", HUGE], "--lr must be a number of at most 1.8e308, got one beyond that"),
        (["--steps", f"-{HUGE}"], "--steps must be a whole number of 64 bits, got one beyond that"),
        (["--methods", "a, c"], "--methods[1] must be one of a, b, got 'c'"),
        (["--methods", "a,,b"], "--methods[1] must be one of a, b, got ''"),
        (["--methods", "[a,c]"], "--methods[1] must be one of a, b, got 'c'"),
        (["x", "y"], "unexpected arguments: y"),
        (["--resume=3"], "--resume"),
    ],
)
def test_wrong_flags_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}") as caught:
        _parse(*argv)
    assert "\n" not in str(caught.value)


def test_missing_settings_are_named_as_they_are_given() -> None:
    with pytest.raises(ConfigError, match="^SOURCE and --out must be given"):
        _parse().config()
    with pytest.raises(ConfigError, match="^--out must be given"):
        _parse("x").config()


def test_help_shows_what_a_run_sets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _parse("--run", "small", "--help")
    assert stopped.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in (
        "usage: krrst work [SOURCE] [--run NAME] [--config FILE] [--SETTING VALUE ...]",
        "SOURCE Where it comes from. (must be given)",
        "--run NAME one of small, empty",
        "--steps INT [5]",
        "--flip {true,false} [true]",
        "--limit INT [none]",
        "--pool.*: The networks.",
        "--pool.size INT How many. [3]",
        "--pool.widths [INT,...] [8,16]",
        "--pool.reset {paper,released} [paper]",
        "--resume go on",
    ):
        assert words in text, text


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr: fast", ["mine.yaml: lr must be a number, got 'fast'"]),
        ("stesp: 3", ["mine.yaml: there is no setting 'stesp'; did you mean 'steps'?"]),
        ("pool: {sise: 3}", ["no setting 'pool.sise'; did you mean 'pool.size'?"]),
        ("pool: 3", ["mine.yaml: pool must be a mapping of settings, got 3"]),
        ("steps: yes", ["mine.yaml: steps must be a whole number, got 'yes'"]),
        ("steps: 1:30", ["mine.yaml: steps must be a whole number, got '1:30'"]),
        ("steps: 012", ["mine.yaml: steps must be a whole number, got '012'"]),
        ("lr: 1e-3x", ["mine.yaml: lr must be a number, got '1e-3x'"]),
        (f"lr: {HUGE}", ["mine.yaml: lr must be a number of at most 1.8e308, got one beyond that"]),
        ("lr: .inf", ["mine.yaml: lr must be a finite number, got inf"]),
        ("- lr", ["mine.yaml: must hold a mapping of settings, got ['lr']"]),
        ("lr: [", ["mine.yaml: not a YAML file"]),
        ("just words", ["mine.yaml: must hold a mapping"]),
    ],
)
def test_wrong_files_are_named(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        _parse("--config", tmp_path / "mine.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields that depend on each other."""

    kind: str = "none"
    layer: str | None = None

    def __post_init__(self) -> None:
        if self.layer is not None and self.kind == "none":
            raise ConfigError("Section: layer must be null without a kind")


@dataclass(frozen=True, kw_only=True)
class Sectioned:
    """Settings with such a section."""

    section: Section = Section()


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Settings whose section is not by default what its class is by default."""

    pool: Pool = field(default_factory=lambda: Pool(reset="released"))


def sectioned(*argv: str) -> Section:
    made = parse(Sectioned, argv, prog="krrst work", about="", runs={}, switches={})
    return made.config().section


def test_fields_of_a_section_are_compared_when_all_are_known(tmp_path: Path) -> None:
    flags = ("--section.layer", "3", "--section.kind", "net")
    assert sectioned(*flags) == sectioned(*flags[2:], *flags[:2]) == Section(kind="net", layer="3")
    file = tmp_path / "layer.yaml"
    file.write_text("section: {layer: fc}")
    assert sectioned("--config", str(file), *flags[2:]).layer == "fc"
    for wrong in (flags[:2], ("--config", str(file))):
        with pytest.raises(ConfigError, match="^Section: layer must be null without a kind$"):
            sectioned(*wrong)


def test_a_section_keeps_the_defaults_of_its_owner_where_a_flag_changes_a_part() -> None:
    def given(*argv: str) -> Parsed:
        return parse(Owner, argv, prog="krrst work", about="", runs={}, switches={})

    parsed = given("--pool.size", "7")
    assert parsed.config().pool == Pool(size=7, reset="released")
    assert "reset: released" in parsed.as_yaml() and "size: 7" in parsed.as_yaml()


def test_text_that_may_be_null_may_look_like_a_number() -> None:
    for text in ("4", "1e3", "true", "layer4.0"):
        assert sectioned("--section.kind", "net", "--section.layer", text).layer == text
    assert sectioned("--section.kind", "net", "--section.layer", "null").layer is None
