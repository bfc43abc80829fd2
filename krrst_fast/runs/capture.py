"""Work on a GPU that is captured in a CUDA graph once and then replayed."""

import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def capturing(graph: "torch.cuda.CUDAGraph", pool: Any = None) -> Iterator[None]:
    """Capture on the current stream.

    `torch.cuda.graph` of torch < 2.12 leaves a capture that fails half open: the next call that
    frees memory or draws a random number in this process would fail too.

    Args:
        graph: What the work is captured in.
        pool: Of the memory, shared with other graphs; None makes one.
    """
    device = torch.cuda.current_device()
    generator: Any = torch.cuda.default_generators[device]
    state, pool = generator.clone_state(), pool or torch.cuda.graph_pool_handle()
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


class Replays:
    """Runs pieces of work by their names: plainly at first, and then by replaying their graphs.

    Work must read and write tensors that stay where they are, wait for nothing, and leave alone
    what the host keeps count of. On a device without graphs it always runs plainly.

    Args:
        device: Where the work runs.
        what: Names it in a warning.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self._what, self._device = what, device
        self.failure = ""
        """Why nothing is captured any more."""
        self._captures = device.type == "cuda" and torch.backends.cuda.is_built()
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._seen: set[Hashable] = set()

    def aside(self) -> AbstractContextManager[Any]:
        """Return a context of the stream that all work runs on, and all that goes with it."""
        return self._aside() if self._stream is not None else nullcontext()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def forget(self) -> None:
        """Drop all graphs: the work is not what it was."""
        self._graphs.clear()

    def run(self, name: Hashable, work: Callable[[], T]) -> T:
        """Run a piece of work within `aside`; a replay writes to the tensors it returned before."""
        if not self._captures:
            return work()
        if name not in self._seen:
            # Kernels are compiled, and workspaces made.
            self._seen.add(name)
            return work()
        if name not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with capturing(graph, self._pool):
                    results = work()
            except Exception as error:
                self._captures = False
                reason = str(error).strip().partition("\n")[0]
                self.failure = f"{type(error).__name__}: {reason}"
                warnings.warn(
                    f"{self._what} cannot be captured in a CUDA graph, and runs without "
                    f"({self.failure})",
                    stacklevel=2,
                )
                return work()
            self._graphs[name] = graph, results
        graph, results = self._graphs[name]
        graph.replay()
        return results
