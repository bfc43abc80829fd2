"""Versions and hardware of a run, written beside every result."""

import platform
import resource
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from krrst_fast.errors import ConfigError
from krrst_fast.runs.files import read_json, write_json
from krrst_fast.runs.version import version

_EARLIER = {"networks": "plain PyTorch", "convolutions": "in TF32"}
"""What runs did that recorded no such choice: their version had none, and torch's default is TF32.

Without a GPU convolutions are not recorded.
"""


def describe() -> dict[str, Any]:
    """Return versions, processor, threads and GPU as JSON values."""
    return {
        "krrst_fast": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extension": extension(),
    }


def record(out: Path, device: torch.device, **choices: str) -> None:
    """Write environment.json into a run folder; a run that goes on elsewhere gets another one.

    `choices` are what was chosen for this environment, and are written too.

    The second environment is environment.2.json, and so on. A warning says what makes the bits
    differ from those of a run that was not interrupted.
    """
    now = {**describe(), "device": str(device), **choices}
    paths = recorded(out)
    if not paths:
        write_json(out / "environment.json", now, sealed=True)
        return
    then = read_json(paths[-1])
    if then.get("device") == now["device"]:
        then = {**_EARLIER, **then}
    changes = [
        f"{name} was {then[name]} and is {now[name]}"
        for name in now
        if name in then and now[name] != then[name]
    ]
    if changes:
        warnings.warn(
            f"{out}: goes on in another environment, so the bits may differ from those of an "
            f"uninterrupted run: {'; '.join(changes)}",
            stacklevel=3,
        )
        write_json(out / f"environment.{len(paths) + 1}.json", now, sealed=True)


def recorded(out: Path) -> list[Path]:
    """Return the files of the environments that a run has had, the first one first."""
    found = [out / "environment.json"]
    while found[-1].exists():
        found.append(out / f"environment.{len(found) + 1}.json")
    return found[:-1]


def extension() -> str | None:
    """Return the compiled modules that are built, such as "_C, _native", or None."""
    names = [n for n in ("_C", "_C_cuda", "_native") if find_spec(f"krrst_fast.{n}")]
    return ", ".join(names) or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Return the peak memory in MB (10^6 bytes): of torch on a GPU, of the process on a CPU."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one.

    Raises:
        ConfigError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device: must be auto, cpu, cuda[:index] or mps, got {name!r}")
    if device.type == "mps" and not (torch.backends.mps.is_available() and not device.index):
        raise ConfigError(f"device: {name!r} was asked for and torch sees no such GPU of Apple's")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device: {name!r} was asked for and torch sees {count} GPUs")
    return device


def solving_device(device: torch.device) -> torch.device:
    """Return where ridge systems of tensors on `device` are solved.

    That is the CPU for MPS, which has no float64; the networks stay on MPS.
    """
    return torch.device("cpu") if device.type == "mps" else device
