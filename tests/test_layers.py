"""The layout holds: imports go one way, devices are asked in one place, files stay readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "krrst_fast"

# The house: a part imports its own row and the rows above it.
LIBRARY = (
    ("errors", "precision", "reference", "planner", "triangular", "_native", "_C", "_C_cuda"),
    ("operators", "convolutions", "cholesky", "backends", "kernels"),
    ("ops",),
    ("estimator", "head"),
)
METHOD = (
    ("runs",),
    ("data", "models"),
    ("targets",),
    ("distill",),
    ("exchange",),
    ("baselines",),
    ("evaluate",),
)
# What a person sees. The names of the package are public: importing them imports what they need.
SCREEN = (
    ("report",),
    ("selftest", "selftest_checks", "cli"),
    ("__main__", "__init__"),
)
ROWS = (*LIBRARY, *METHOD, *SCREEN)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
MOST_LOOSE_MODULES = 12
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def _part(path: Path) -> str:
    """The name in ROWS of the part that a file belongs to."""
    if not path.is_relative_to(PACKAGE):
        return "kernels"
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _parts_used(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in _imported(path) if name.startswith("krrst_fast.")}
    return {name for name in names if not name.startswith("__")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = _part(path)
    assert part in ROW_OF, f"{part} has no row: add it to ROWS and CONTRIBUTING.md"
    for used in _parts_used(path) - {part}:
        assert ROW_OF[used] <= ROW_OF[part], f"{part} imports {used}, which is above it"


def test_rows_name_only_what_exists() -> None:
    parts = {_part(path) for path in FILES} | {"_native", "_C", "_C_cuda", "kernels"}
    assert set(ROW_OF) <= parts, f"no such module: {set(ROW_OF) - parts}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_place_knows_about_devices(path: Path) -> None:
    if _part(path) in ("backends", "kernels"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asked = [node.lineno for node in ast.walk(tree) if getattr(node, "attr", "") == "is_cuda"]
    assert asked == [], "only the backends read is_cuda"
    assert not [name for name in _imported(path) if name.split(".")[0] == "triton"]


def test_nothing_imports_the_top_level_kernels() -> None:
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert not [name for name in _imported(path) if name.split(".")[0] == "kernels"], path


def test_files_are_short() -> None:
    suffixes = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}
    folders = ("krrst_fast", "kernels", "csrc", "tests", "bench", "tools")
    for folder in folders:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_few_modules_are_loose() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    assert len(loose) <= MOST_LOOSE_MODULES, loose


def test_no_string_stream_in_a_compiled_module() -> None:
    """csrc/check.h says why."""
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.is_file() and path.name != "check.h":
            text = path.read_text(encoding="utf-8")
            found = [
                name for name in ("STD_TORCH_CHECK", "stringstream", "iostream") if name in text
            ]
            assert not found, f"{path.name}: {found}"
