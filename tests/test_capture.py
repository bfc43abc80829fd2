"""Work that is captured once and then replayed, on a played device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from krrst_fast.runs.capture import Replays


class Graph:
    """A graph of a played device: replaying it is calling the work that was captured."""

    captured: list["Graph"] = []
    fails = False

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def played(monkeypatch) -> Callable[[], Replays]:
    @contextmanager
    def capturing(graph: Graph, pool: object) -> Iterator[None]:
        yield
        if Graph.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        Graph.captured.append(graph)

    monkeypatch.setattr("krrst_fast.runs.capture.capturing", capturing)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(Graph, "captured", [])
    monkeypatch.setattr(Graph, "fails", False)

    def make() -> Replays:
        replays = Replays(torch.device("cpu"), "work")
        replays._captures = True
        return replays

    return make


def test_work_runs_plainly_then_is_captured_then_replayed(played):
    replays, calls = played(), []
    results = [replays.run("a", lambda: calls.append("a") or len(calls)) for _ in range(4)]
    assert calls == ["a", "a"] and results == [1, 2, 2, 2]
    assert [graph.replays for graph in Graph.captured] == [3]
    replays.run("b", lambda: calls.append("b"))
    assert calls == ["a", "a", "b"] and len(Graph.captured) == 1


def test_work_that_cannot_be_captured_goes_on_without(played):
    Graph.fails = True
    replays, calls = played(), []
    replays.run("a", lambda: calls.append(1))
    with pytest.warns(UserWarning, match="work cannot be captured .*stream is capturing"):
        replays.run("a", lambda: calls.append(2))
    replays.run("a", lambda: calls.append(3))
    assert calls == [1, 2, 2, 3] and not Graph.captured
