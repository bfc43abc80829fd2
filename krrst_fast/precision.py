"""Full float32 arithmetic, whatever torch's global switches say.

The error of a ridged solve is the error of its products times a condition number: with TF32 or
bfloat16 in a product no digit is left. Autocast and torch's switches for float32 products are set
for whole programs; they are off while an operator computes.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# The libraries whose switch torch reads for a float32 product; "none" means that none was set.
_LIBRARIES = ("cuda", "mkldnn")
_FULL = ("ieee", "none")

# Read once, since torch.compile of torch 2.11 cannot trace the call.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)

_NOTHING = nullcontext()

_lock = threading.Lock()
_inside = 0
_before: dict[str, str] = {}


def exact_arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast on x's device, and with float32 products in float32.

    While torch.compile traces, it is without autocast only: the switches are read when the graph
    runs, and the operators of `krrst_fast.operators` set them then.
    """
    device = x.device.type
    autocast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    rounding = not torch.compiler.is_compiling() and _rounding()
    if not autocast and not rounding:
        return _NOTHING
    off = torch.autocast(device, enabled=False) if autocast else _NOTHING
    return _both(off) if rounding else off


def is_rounded(x: Tensor) -> bool:
    """Return whether torch would now round the operands of a float32 product on x's device."""
    device = x.device.type
    return (device in _AUTOCAST and torch.is_autocast_enabled(device)) or _rounding()


def _rounding() -> bool:
    """Return whether a library would round the operands of a float32 product now."""
    get = torch._C._get_fp32_precision_getter
    with _lock:  # another thread may be about to change a switch
        return (
            _inside > 0
            or get("cuda", "matmul") not in _FULL
            or get("mkldnn", "matmul") not in _FULL
        )


@contextmanager
def _both(autocast: AbstractContextManager[Any]) -> Iterator[None]:
    with autocast, full_precision():
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch reduced precision off for all threads, until the last context ends.

    The switches are global: the first thread that enters sets them, the last one restores them.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _set_switches()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore_switches()


def _set_switches() -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    everywhere = get("generic", "all")
    for library in _LIBRARIES:
        value = get(library, "matmul")
        # A switch that followed the one for everything is restored to following it.
        _before[library] = "none" if value == everywhere else value
        put(library, "matmul", "ieee")


def _forked() -> None:
    """Reset the state in a child process, where only the thread that forked lives on."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0
    _restore_switches()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _restore_switches() -> None:
    for library, value in _before.items():
        torch._C._set_fp32_precision_setter(library, "matmul", value)
    _before.clear()
