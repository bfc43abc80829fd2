"""This machine; python -m bench.gpu.machine prints the stages that are left to run."""

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.gpu import results
from krrst_fast.errors import DataError, KrrstError

ROOT = Path(__file__).resolve().parents[2]
# What a time, or the verdict of a test, depends on.
_SOURCES = (
    *("setup.py", "pyproject.toml", "bench/*.py", "bench/gpu.sh", "bench/gpu/*.py", "kernels/*.py"),
    *("krrst_fast/**/*.py", "csrc/**/*", "tests/*.py"),
)


def output_of(*command: str) -> str | None:
    """Return the output of a command, or None if it cannot be run."""
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
    """Return a digest of all measured and measuring code, committed or not."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """Return the commit that is checked out, or None without a repository."""
    return output_of("git", "rev-parse", "HEAD")


def versions() -> dict[str, str | None]:
    """Return versions, without importing the packages."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    nvcc = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version")
    found["nvcc"] = (nvcc or "").partition("release ")[2].partition(",")[0] or None
    return found


def gpu() -> dict[str, Any] | None:
    """Describe the GPU that torch would use, or return None. CUDA is then started: do not fork."""
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
    """Return the version of the driver."""
    output = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return output.splitlines()[0].strip() if output else None


def describe(dry_run: bool) -> dict[str, Any]:
    """Describe this machine and the code.

    Raises:
        DataError: It has no GPU, and this is no dry run.
    """
    about = None if dry_run else gpu()
    if about is None and not dry_run:
        raise DataError("bench/gpu.sh: torch sees no GPU here; --dry-run tries it all on the CPU")
    sizes = "toy" if dry_run else "full"
    return {
        **{"gpu": about["name"] if about else None, "about": about, "versions": versions()},
        **{"sizes": sizes, "sources": sources(), "commit": commit()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the stages that are left, in their order, and on a second line the target of nvcc."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("stages", nargs="*")
    asked = parser.parse_args(argv)
    names = asked.stages or list(results.STAGES)
    try:
        for name in names:
            if name not in results.STAGES:
                every = ", ".join(results.STAGES)
                raise DataError(f"bench/gpu.sh: no stage {name!r}; there are {every}")
        here = describe(asked.dry_run)
        asked.out.mkdir(parents=True, exist_ok=True)
        if not (asked.out / results.FILE).exists() and (asked.kept / results.FILE).exists():
            shutil.copy2(asked.kept / results.FILE, asked.out)
        found = results.Results.begin(asked.out, here)
    except (KrrstError, OSError) as error:
        print(str(error).partition("\n")[0], file=sys.stderr)
        return 2
    for name in names if asked.again else ():
        found.forget(name)
    built = (asked.kept / "site" / "krrst_fast").is_dir() and found.done("build")
    todo = [name for name in results.STAGES if name in names and not found.done(name)]
    # Whatever runs needs what the build makes; on a new machine it is not there.
    todo = todo if built or not todo or todo[0] == "build" else ["build", *todo]
    print(*todo)
    print((here["about"] or {}).get("target", ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
