"""The distribution: what is in it, what it needs, what importing it costs."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
}


def _requirements() -> list[Requirement]:
    texts = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    for extra in PROJECT["project"]["optional-dependencies"].values():
        texts += extra
    return [Requirement(text) for text in texts]


def test_every_package_folder_is_listed() -> None:
    folders = {p.parent for p in (ROOT / "krrst_fast").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == found | {"krrst_fast.kernels"}
    assert (ROOT / "kernels/__init__.py").exists(), "editable installs need it"


def test_build_takes_the_torch_that_is_there() -> None:
    names = {Requirement(text).name for text in PROJECT["build-system"]["requires"]}
    assert "torch" not in names
    torch = next(r for r in _requirements() if r.name == "torch")
    assert "2.13.0" in torch.specifier and "2.9.0" not in torch.specifier


def test_pins_are_what_runs_here_and_lack_nothing() -> None:
    todo, seen = _requirements(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in PINS, f"{name} is not in constraints.txt"
        distribution = metadata.distribution(name)
        assert distribution.version.partition("+")[0] == PINS[name], name
        for text in distribution.requires or []:
            below = Requirement(text)
            marker = below.marker
            extras = requirement.extras or {""}
            # GPU builds of torch bring packages that are tied to them.
            tied = re.match("nvidia-|cuda-|triton", below.name)
            if not tied and (marker is None or any(marker.evaluate({"extra": e}) for e in extras)):
                todo.append(below)
    assert set(PINS) - {entry[0] for entry in seen} <= {"wheel"}, "pins that nothing needs"


def test_versions_agree() -> None:
    version = PROJECT["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert metadata.version("krrst-fast") == version


def test_command_is_installed() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="krrst")
    assert entry.value == "krrst_fast.cli.main:main"
    assert callable(entry.load())


@pytest.mark.parametrize(
    "module, unwanted",
    [
        (
            "krrst_fast",
            ["triton", "docstring_parser", "PIL", "sklearn", "matplotlib", "tqdm", "jinja2"],
        ),
        (
            "krrst_fast.ops.fit",
            ["triton", "docstring_parser", "PIL", "sklearn", "matplotlib", "jinja2"],
        ),
        ("krrst_fast.distill", ["triton", "docstring_parser", "sklearn", "matplotlib", "jinja2"]),
        ("krrst_fast.cli.main", ["torch", "numpy", "docstring_parser", "yaml"]),
    ],
)
def test_import_is_light(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print([n for n in {unwanted} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_cuda_that_is_demanded_and_impossible_is_an_error() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    command = [sys.executable, "setup.py", "--version"]
    for switch, status, message in (("1", 1, "has no CUDA"), ("auto", 0, ""), ("0", 0, "")):
        env = {**os.environ, "KRRST_FAST_CUDA": switch, "KRRST_FAST_BUILD": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == status and message in done.stderr, done.stderr
        assert switch == "1" or "CUDA" not in done.stderr


def test_sources_are_in_the_source_distribution() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split()
    for name in ("csrc", "kernels", "tests", "tools", "constraints.txt", "Makefile", "README.md"):
        assert name in manifest and (ROOT / name).exists(), name


@pytest.mark.parametrize("failing", [1, 2, 3, 4, None])
def test_any_command_that_fails_fails_the_packaging_step(
    tmp_path: Path, failing: int | None
) -> None:
    """The step's function, called as CI does, with a python whose n-th call fails."""
    if not (script := ROOT / ".ci" / "run").exists():
        pytest.skip("not part of the source distribution")
    function = re.search(r"^package\(\) \(\n.*?^\)\n", script.read_text(), re.DOTALL | re.MULTILINE)
    assert function is not None
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    calls = tmp_path / "calls"
    python.write_text(
        f"#!/bin/sh\necho call >> '{calls}'\n[ $(wc -l < '{calls}') -ne {failing or 0} ]\n"
    )
    python.chmod(0o755)
    code = f"{function[0]}\nif package; then exit 0; else exit 7; fi"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == (7 if failing else 0), done.stderr
    assert calls.read_text().count("call") == (failing or 4), "nothing runs after a failure"
