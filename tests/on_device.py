"""What tests on a GPU share: calls that may not wait, graphs, and what a failure must not leave."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

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


def captured(work: Callable[[], T], warm_up: int = 3) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `work`, and the results that each replay writes to.

    Raises:
        Whatever `work` or the capture raises; stream, memory and random numbers are as before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), _capture(graph):
        results = work()
    return graph, results


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Capture on the stream of now.

    `torch.cuda.graph` of torch < 2.12 would leave a capture that fails half open: the next call
    that frees memory or draws a random number in this process would fail too.
    """
    device = torch.cuda.current_device()
    generator: Any = torch.cuda.default_generators[device]
    state, pool = generator.clone_state(), torch.cuda.graph_pool_handle()
    try:
        graph.capture_begin(pool=pool)
        yield
        graph.capture_end()
    except BaseException:
        steps: tuple[Callable[[], Any], ...] = (
            graph.capture_end,
            lambda: torch._C._cuda_endAllocateToPool(device, pool),
            lambda: generator.graphsafe_set_state(state),
        )
        for step in steps:
            with suppress(RuntimeError):  # it was not begun, or is over
                step()
        raise
