"""What tests on a GPU share: calls that may not wait, graphs, and what a failure must not leave."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch

# Last: what is installed under test comes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))
T = TypeVar("T")


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise where the host would wait for the GPU."""
    with warnings.catch_warnings():
        # The mode is set, and then a prototype is warned of: as an error, it would stay set.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def let_it_wait() -> None:
    """Turn back what `no_waits` turns, whoever forgot to; without a GPU in use, nothing."""
    if torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode() != 0:
        torch.cuda.set_sync_debug_mode("default")


def captured(work: Callable[[], T], warm_up: int = 3) -> tuple[Any, T]:
    """Capture `work` in a CUDA graph, as the benchmarks do."""
    return import_module("bench.gpu.clock").capture(work, warm_up)
