"""Arithmetic in the precision of the operands, whatever torch's global switches say.

The error of a ridged solve is that of its products times a condition number: TF32 or bfloat16 in
one of them leaves no digit. Autocast and torch's switches for float32 products are set for whole
programs; here they are off for as long as an operator computes.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# Of these torch reads the switch of a float32 product; "none" means that nobody set one.
_LIBRARIES = ("cuda", "mkldnn")
_FULL = ("ieee", "none")

# Asked once: with torch 2.11 torch.compile cannot trace the question.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device)
)

_NOTHING = nullcontext()

_lock = threading.Lock()
_inside = 0
_before: dict[str, str] = {}


def exact_arithmetic(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast on x's device, and float32 products in float32, until the context ends.

    While torch.compile traces, autocast alone: a switch that is read when the graph runs must be
    set then, which the operators of `krrst_fast.library` do for themselves.
    """
    device = x.device.type
    autocast = device in _AUTOCAST and torch.is_autocast_enabled(device)
    rounding = not torch.compiler.is_compiling() and _rounding()
    if not autocast and not rounding:
        return _NOTHING
    off = torch.autocast(device, enabled=False) if autocast else _NOTHING
    return _both(off) if rounding else off


def _rounding() -> bool:
    """Whether some library would round the operands of a float32 product now."""
    get = torch._C._get_fp32_precision_getter
    with _lock:  # or a switch could be read while another thread has it turned
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
    """The switches are those of all threads: the first to enter turns them, the last turns back."""
    global _inside
    with _lock:
        if _inside == 0:
            _turn_on()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _turn_back()


def _turn_on() -> None:
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    everywhere = get("generic", "all")
    for library in _LIBRARIES:
        value = get(library, "matmul")
        # One that follows the switch for everything goes back to following it.
        _before[library] = "none" if value == everywhere else value
        put(library, "matmul", "ieee")


def _forked() -> None:
    """In a child only the thread that forked lives on: nobody is inside."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0
    _turn_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _turn_back() -> None:
    for library, value in _before.items():
        torch._C._set_fp32_precision_setter(library, "matmul", value)
    _before.clear()
