"""What was measured, on what: for the file of every stage, and to know a stage that is done."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What a time depends on.
_SOURCES = (
    *("setup.py", "pyproject.toml", "bench/*.py", "bench/gpu/*.py", "kernels/*.py"),
    *("krrst_fast/**/*.py", "csrc/**/*"),
)


def said(*command: str) -> str | None:
    """What a command prints, or None if it cannot be run."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def sources() -> str:
    """A digest of all code that is measured or measures, whether it is committed or not."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """The commit that is checked out; None where there is no repository."""
    return said("git", "rev-parse", "HEAD")


def versions() -> dict[str, str | None]:
    """Of what matters and can be asked without importing it."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    told = said("nvcc", "--version") or said("/usr/local/cuda/bin/nvcc", "--version") or ""
    found["nvcc"] = told.partition("release ")[2].partition(",")[0] or None
    return found


def gpu() -> dict[str, Any] | None:
    """The GPU that torch would use, or None. Starts CUDA: not for a process that lives on."""
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "architecture": f"sm_{about.major}{about.minor}",
        # What wgmma needs is in the target with an a.
        "target": f"{about.major}.{about.minor}{'a' if about.major == 9 else ''}",
        "multiprocessors": about.multi_processor_count,
        "memory_gb": round(about.total_memory / 1e9, 1),
        "l2_mb": round(getattr(about, "L2_cache_size", 0) / 1e6, 1),
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def driver() -> str | None:
    """The version of the driver."""
    told = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return told.splitlines()[0].strip() if told else None


def other_gpu() -> dict[str, Any] | None:
    """`gpu`, asked by a process of its own."""
    command = [sys.executable, "-m", "bench.gpu.machine"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    print(json.dumps(gpu()))
