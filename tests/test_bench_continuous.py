"""`asv continuous` on two commits: it catches a planted slow-down, and cries at nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from asv import util

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = "bench_ridge_solve.RidgeSolve.track_ratio_to_reference"
ROW = r"\(Shape\(m=30.*'torch', 'float32'\)"
PLANTED = """

def _slow(solve):
    def slow(*arguments, **settings):
        time.sleep(0.02)
        return solve(*arguments, **settings)

    return slow


import time
ridge_solve = _slow(ridge_solve)
"""
GIT = {
    f"GIT_{who}_{what}": f"{who.lower()}@example.org"
    for who in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("git") is None, reason="there is no git"),
]


def _environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        **GIT,
        "HOME": str(home),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "OMP_WAIT_POLICY": "PASSIVE",
        # The checkouts hold no compiled modules, and "torch" is measured.
        "KRRST_FAST_EXTENSION": "0",
    }


def _commit(repository: Path, message: str) -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            env=_environment(repository.parent),
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    git("init", "-q", ".")
    git("add", "-A")
    git("commit", "-q", "-m", message)
    return git("rev-parse", "HEAD")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder to run asv in, and three commits of the package by name."""
    folder = tmp_path_factory.mktemp("project")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("krrst_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / "repository" / name, ignore=ignore)
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=ignore)
    shutil.copy(Path(__file__).with_name("asv_checkout.py"), folder)
    commits = {"before": _commit(folder / "repository", "before")}
    (folder / "repository" / "NOTES").write_text("nothing that computes\n")
    commits["the same"] = _commit(folder / "repository", "a note")
    with (folder / "repository" / "krrst_fast" / "ops" / "ridge_solve.py").open("a") as file:
        file.write(PLANTED)
    commits["slow"] = _commit(folder / "repository", "a planted slow-down")
    settings = util.load_json(str(ROOT / "asv.conf.json"), js_comments=True)
    settings |= {
        "repo": "repository",
        "plugins": [".asv_checkout"],
        "environment_type": "checkout",
        "matrix": {},
        "build_command": [],
        "install_command": [],
        "uninstall_command": [],
    }
    (folder / "asv.conf.json").write_text(json.dumps(settings))
    return folder, commits


def _asv(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asv", *arguments],
        cwd=folder,
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _continuous(folder: Path, before: str, after: str) -> subprocess.CompletedProcess[str]:
    _asv(folder, "machine", "--yes", "--machine", "here").check_returncode()
    return _asv(
        *(folder, "continuous", before, after, "--machine", "here", "--factor", "3"),
        *("--bench", BENCHMARK + ROW),
    )


def measured(folder: Path, commit: str) -> float:
    """Our time by the reference's, as asv stored it."""
    (stored,) = (folder / ".asv" / "results" / "here").glob(f"{commit[:8]}-*.json")
    results = json.loads(stored.read_text())["results"][BENCHMARK]
    (ratio,) = (value for value in results[0] if value == value)
    return ratio


@pytest.mark.parametrize("after,found", [("the same", 0), ("slow", 1)])
def test_a_planted_slow_down_is_caught(
    project: tuple[Path, dict[str, str]], after: str, found: int
) -> None:
    folder, commits = project
    done = _continuous(folder, commits["before"], commits[after])
    said = done.stdout + done.stderr
    assert done.returncode == found, said
    assert ("PERFORMANCE DECREASED" in said) is bool(found), said
    changed = [line for line in said.splitlines() if line.startswith("| +")]
    assert [BENCHMARK in line for line in changed] == [True] * found, said
    assert measured(folder, commits["before"]) < 3, said
    assert (measured(folder, commits[after]) > 9) is bool(found), said
