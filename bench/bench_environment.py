"""What the results of a run were measured with: asv keeps the machine, not the versions."""

import json
import platform
from pathlib import Path

import numpy
import torch

from bench.common import THREADS
from krrst_fast.environment import extension, version


def graphics() -> list[str]:
    """Names of the GPUs by the driver's own files: asking CUDA would start it before the fork."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def versions() -> dict[str, str]:
    """What a time depends on, in words."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "krrst_fast": version(),
        "extension": extension() or "none",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": ", ".join(graphics()) or "none",
    }


class Environment:
    """The number of threads. asv stores the `version` beside it, and it says all the rest."""

    version = json.dumps(versions())

    def track_threads(self) -> int:
        return THREADS

    track_threads.unit = "threads"  # type: ignore[attr-defined]
