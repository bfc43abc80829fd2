"""The memory that is left for this process: on the CPU as Linux tells it, on a GPU as torch does.

It is what is left at this moment: other processes may take it before it is used.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Version 1 writes the largest multiple of a page for "no limit".
_NO_LIMIT = 2**62


class _Version(NamedTuple):
    """The file names of a version of cgroups."""

    limits: tuple[str, ...]
    used: str
    reclaimable: str


_VERSIONS = {
    "cgroup2": _Version(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": _Version(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(device: str) -> int | None:
    """Return the bytes that this process can still take on a device, or None without a limit.

    Args:
        device: "cpu", "cuda" or "cuda:i".

    Raises:
        ValueError: Torch sees no such GPU.
    """
    return free_on_cpu() if device == "cpu" else free_on_gpu(device)


def free_on_cpu(root: Path = Path("/")) -> int | None:
    """Return the least of what cgroups, the machine and the limits of the process leave, in bytes.

    A file that is missing, unreadable or not understood is no limit.

    Args:
        root: The folder that holds `proc`, and where file systems are mounted.
    """
    left = [*_of_cgroups(root), *_of_machine(root), *_of_process(root)]
    return max(0, min(left)) if left else None


def free_on_gpu(device: str) -> int:
    """Return what the driver has left, and what torch has taken from it and not used, in bytes."""
    import torch  # here: the sizes of a problem are planned without it

    try:
        left, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"plan: device must be a GPU that torch sees, got {device!r}: {reason}"
        ) from None
    return left + unused


def _of_cgroups(root: Path) -> Iterator[int]:
    """Yield what the cgroups of the process and all above them leave."""
    for version, folder, top in _cgroups(root):
        names = _VERSIONS[version]
        while True:
            used = _number(folder / names.used)
            numbers = (_number(folder / name) for name in names.limits)
            limits = [limit for limit in numbers if limit is not None and limit < _NO_LIMIT]
            if used is not None and limits:
                # The page cache that was not used of late is given back when memory is needed.
                cache = _fields(folder / "memory.stat").get(names.reclaimable, 0)
                yield min(limits) - max(0, used - cache)
            if folder == top:
                break
            folder = folder.parent


def _cgroups(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield version, folder and topmost visible folder of the cgroups that count memory."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        version = "cgroup2" if number == "0" and not controllers else "cgroup"
        for kind, options, within, top in mounts:
            if kind != version or (kind == "cgroup" and "memory" not in options):
                continue
            # In a container the mount may show a part of the tree and the path be that in all of
            # it, or lead out of what can be seen.
            inside = PurePosixPath(path)
            below = inside.relative_to(within) if inside.is_relative_to(within) else inside
            hidden = ".." in below.parts
            yield version, top if hidden else top / str(below).lstrip("/"), top


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Yield type, options, the part of the tree, and place of the mounted file systems of cgroups.

    A line is "31 23 0:28 /part /sys/fs/cgroup rw shared:9 - cgroup cgroup rw,memory".
    """
    for line in _lines(root / "proc/self/mountinfo"):
        place, _, system = line.partition(" - ")
        first, last = place.split(), system.split()
        if len(first) < 5 or len(last) < 3 or last[0] not in _VERSIONS:
            continue
        # Spaces are written as \040.
        within, top = (re.sub(r"\\(\d{3})", lambda c: chr(int(c[1], 8)), x) for x in first[3:5])
        yield last[0], last[2].split(","), within, root / top.lstrip("/")


def _of_machine(root: Path) -> Iterator[int]:
    found = _fields(root / "proc/meminfo")
    if "MemAvailable" in found:
        yield found["MemAvailable"] * 1024


def _of_process(root: Path) -> Iterator[int]:
    """Yield what the limits of the address space and of the data of the process leave."""
    try:
        import resource
    except ImportError:  # Windows
        return
    used = _fields(root / "proc/self/status")
    for which, field in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(which)
        if limit != resource.RLIM_INFINITY and field in used:
            yield limit - used[field] * 1024


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines like "name: 12 kB" or "name 12"."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}


def _number(path: Path) -> int | None:
    """Return the number in a file; None for "max"."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
