"""The stages that are commands of others: the build, the selftest, the tests."""

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.machine import ROOT

# The files whose tests a GPU is needed for: no others are collected, some of which import packages
# that only development needs.
_ON_A_GPU = re.compile(r"mark\.gpu|\bkernels: Callable|\bgpu_calls\b")
_OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)

TEST_GROUPS = 6

Rows = dict[str, dict[str, Any]]


class Setting(NamedTuple):
    """What a command depends on: the folder, the environment that stages get, the GPU if any."""

    out: Path
    env: Mapping[str, str]
    gpu: Mapping[str, Any] | None


class Command(NamedTuple):
    """A command and what is made of its exit code and its words."""

    arguments: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    rows: Callable[[int | None, str], Rows]


def site(out: Path) -> Path:
    """Where the package is built: what an installation would hold, and nobody else's."""
    return out / "site"


def build(setting: Setting) -> Command:
    """All modules for this GPU; in a dry run the Python files, and what was compiled in place.

    Into a folder of its own, from which `krrst_fast.kernels` can be imported, as it cannot from a
    checkout; with setup.py, because pip may not be there.
    """
    out, gpu = setting.out, setting.gpu
    shutil.rmtree(site(out), ignore_errors=True)
    site(out).mkdir(parents=True)
    env = {**setting.env, "KRRST_FAST_BUILD": "0"}
    if gpu is None:
        (site(out) / "krrst_fast").mkdir()
        for path in (ROOT / "krrst_fast").glob("*.so"):
            shutil.copy2(path, site(out) / "krrst_fast")
    else:
        env |= {"KRRST_FAST_BUILD": "1", "KRRST_FAST_CUDA": "1"}
        env["TORCH_CUDA_ARCH_LIST"] = gpu["target"]
        # nvcc and the widest kernels take the memory of a compiler each.
        env.setdefault("MAX_JOBS", str(min(os.cpu_count() or 1, 16)))
    arguments = [sys.executable, "setup.py", "build", "--build-lib", str(site(out))]
    arguments += ["--build-base", str(out / "objects")]

    def rows(code: int | None, words: str) -> Rows:
        modules = sorted(path.name for path in (site(out) / "krrst_fast").glob("*.so"))
        warnings = [line for line in words.splitlines() if "warning" in line.lower()]
        row: dict[str, Any] = {"modules": modules, "warnings": warnings}
        row["target"] = env.get("TORCH_CUDA_ARCH_LIST")
        if code != 0:
            row["wrong"] = ["it does not build"]
        return {"build": row}

    return Command(arguments, env, ROOT, rows)


def selftest(setting: Setting) -> Command:
    """Every operator against the formula in float64; in a dry run by plain PyTorch alone."""
    device = "cuda" if setting.gpu else "cpu"
    env = setting.env if setting.gpu else {**setting.env, "KRRST_FAST_EXTENSION": "0"}
    told = setting.out / "selftest.told.json"
    told.unlink(missing_ok=True)
    arguments = [sys.executable, "-m", "krrst_fast.selftest", "--device", device]

    def rows(code: int | None, words: str) -> Rows:
        if not told.exists():
            return {"selftest": {"wrong": [f"it ended with exit code {code}"]}}
        found = json.loads(told.read_text(encoding="utf-8"))
        told.unlink()
        wrong = [f"{x['check']}, {x['backend']}" for x in found["checks"] if not x["ok"]]
        row = {"checks": len(found["checks"]), "choices": found["choices"], "wrong": wrong}
        return {"selftest": row | {"machine": found["machine"]}}

    return Command([*arguments, "--json", str(told)], env, setting.out, rows)


def gpu_test_files() -> list[Path]:
    """The test files in which something needs a GPU."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path for path in files if _ON_A_GPU.search(path.read_text(encoding="utf-8"))]


def tests(setting: Setting) -> Command:
    """`pytest -m gpu`; in a dry run they are found, and not run."""
    logs = setting.out / "tests"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    options = ["-m", "gpu", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    options += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    options += [] if setting.gpu else ["--collect-only", "-q"]
    groups = TEST_GROUPS if setting.gpu else 1
    arguments = [sys.executable, "-m", "bench.gpu.suites", str(logs), str(groups)]
    arguments += [*map(str, gpu_test_files()), "--", *options]

    def rows(code: int | None, words: str) -> Rows:
        told = [path.read_text("utf-8", "replace") for path in sorted(logs.glob("*.log"))]
        return {"tests": outcomes(code, words + "\n".join(told))}

    return Command(arguments, setting.env, setting.out, rows)


def outcomes(code: int | None, words: str) -> dict[str, Any]:
    """Counted line by line, so that a run which was ended counts as far as it came."""
    found = [(name, outcome.lower()) for name, outcome in _OUTCOME.findall(words)]
    collected = re.findall(r"^collected (?:.* )?(\d+) (?:items?|selected)$", words, re.MULTILINE)
    # Each failure is named a second time in the summary.
    wrong = dict.fromkeys(name for name, outcome in found if outcome in ("failed", "error"))
    wrong |= dict.fromkeys(re.findall(r"^ERROR (\S+)", words, re.MULTILINE))
    if code not in (0, 1, None) or (code == 1 and not wrong):
        wrong[f"pytest ended with exit code {code}"] = None
    row: dict[str, Any] = {"outcomes": dict(Counter(outcome for _, outcome in found))}
    return row | {"collected": sum(map(int, collected)), "wrong": list(wrong)}


def sanitizer(setting: Setting) -> Command:
    """Our kernels under compute-sanitizer; in a dry run the calls alone."""
    device = "cuda" if setting.gpu else "cpu"

    def rows(code: int | None, words: str) -> Rows:
        refused = re.search(r"^refused: (.+)$", words, re.MULTILINE)
        ended = dict(re.findall(r"^tool (\w+): exit code (-?\d+)$", words, re.MULTILINE))
        row: dict[str, Any] = {"tools": {name: int(one) for name, one in ended.items()}}
        row["calls"] = [int(one) for one in re.findall(r"^(\d+) calls$", words, re.MULTILINE)]
        if refused:
            return {"sanitizer": row | {"refused": refused[1]}}
        wrong = [f"{name}: exit code {one}" for name, one in ended.items() if one != "0"]
        return {"sanitizer": row | {"wrong": wrong}}

    arguments = [sys.executable, "-m", "bench.gpu.sanitized", device]
    return Command(arguments, setting.env, setting.out, rows)


COMMANDS: Mapping[str, Callable[[Setting], Command]] = {
    "build": build,
    "selftest": selftest,
    "tests": tests,
    "sanitizer": sanitizer,
}
