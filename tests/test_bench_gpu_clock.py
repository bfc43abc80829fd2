"""What is timed on a GPU and how, by a device that is played."""

import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
clock = import_module("bench.gpu.clock")
krr = import_module("bench.gpu.krr")
notes = import_module("bench.gpu.notes")
stage = import_module("bench.gpu.stage")
step = import_module("bench.gpu.step")

KEY = {"commit": "c"}


class Device:
    """A device whose clock is at the number of things that were done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.done.append("wait"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        one = SimpleNamespace(at=None)

        def record() -> None:
            self.done.append("record")
            one.at = float(len(self.done))

        one.record, one.synchronize = record, lambda: self.done.append("wait")
        one.elapsed_time = lambda end: end.at - one.at
        return one


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def timer(tmp_path: Path):
    """A clock for "cuda" on tensors of the CPU."""
    made = clock.Clock("cpu", notes.Notes(tmp_path / "rows.json", KEY), quick=True)
    made.device = "cuda"
    return made


def test_a_call_is_timed_between_two_events_behind_a_cold_cache(device, timer) -> None:
    flush = SimpleNamespace(zero_=lambda: device.done.append("flush"))
    timer._flush = flush
    taken = timer.once(lambda: device.done.extend(["kernel", "kernel"]))
    assert device.done == ["flush", "record", "kernel", "kernel", "record", "wait"]
    assert taken == 3.0


def test_parts_of_a_step_are_timed_without_a_wait_between_them(device) -> None:
    mark = step.Marks("cuda")
    device.done += ["kernel"] * 4
    mark("first")
    mark("second")
    assert "wait" not in device.done
    assert mark.milliseconds() == {"first": 5.0, "second": 1.0}
    assert device.done[-1] == "wait"


@pytest.mark.parametrize("drift", [0.0, 1e-7])
def test_a_graph_is_replayed_into_poisoned_memory_and_compared(
    device, timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    results = []

    def call() -> list[torch.Tensor]:
        results.append([torch.ones(2), torch.zeros(3)])
        return results[-1]

    class Graph:
        def replay(self) -> None:
            device.done.append("replay")
            results[-1][0].fill_(1.0 + drift)
            results[-1][1].fill_(0.0)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        **{"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph},
        **{"stream": lambda one: nullcontext(), "graph": lambda one: nullcontext()},
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    run = stage.Run(tmp_path, "cuda", True, None, timer.notes, timer)
    told = krr.graph(run, call, "krr torch float32")
    assert told["same_bits"] is (drift == 0.0) and told["ms"] > 0
    assert len(results) == 5, "three to warm up, one captured, one to compare with"

    def refuses() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuses)
    assert krr.graph(run, call, "krr torch float32") == {
        "failed": "RuntimeError: operation not permitted when stream is capturing"
    }


def test_the_kernels_that_take_most_come_first() -> None:
    def event(name: str, count: int, us: float) -> SimpleNamespace:
        return SimpleNamespace(key=name, count=count, self_device_time_total=us)

    found = krr.top([event("a", 5, 50.0), event("b", 10, 5000.0), event("c", 5, 0.0)], "cuda", 2)
    assert found == [
        {"name": "b", "launches": 2.0, "ms": 1.0},
        {"name": "a", "launches": 1.0, "ms": 0.01},
    ]


def test_calls_take_turns_and_one_that_fails_stops_nobody(tmp_path: Path, monkeypatch) -> None:
    one, order = clock.Clock("cpu", notes.Notes(tmp_path / "rows.json", KEY)), []

    def call(name: str):
        order.append(name)
        if name == "bad":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    def once(made) -> float:
        made()
        return {"a": 2.0, "b": 10.0 + order.count("b")}[order[-1]]

    monkeypatch.setattr(one, "once", once)
    calls = {name: lambda name=name: call(name) for name in ("a", "bad", "b")}
    found = one.in_turn(calls, seconds=0.0, names={"a": "left out"})
    assert found["bad"] == "out of memory"
    # Both were called before, until their times were alike: a twice, b three times at most.
    timed = order[-2 * found["a"].calls :]
    assert found["a"] == (2.0, 2.0, 2.0, 1) and len(timed) == 2
    found = one.in_turn({k: v for k, v in calls.items() if k != "bad"}, seconds=60.0)
    assert found["b"].calls == 200 and order[-4:] == ["a", "b", "b", "a"]


def test_medians_and_percentiles() -> None:
    assert clock.sample([float(x) for x in range(11)]) == (5.0, 1.0, 9.0, 11)
    assert clock.sample([4.0, 100.0, 2.0]).ms == 4.0


def test_a_device_that_is_lost_ends_the_process(tmp_path: Path, monkeypatch) -> None:
    kept = notes.Notes(tmp_path / "rows.json", KEY)
    one = clock.Clock("cpu", kept)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(one, "wait", lost)
    with pytest.raises(clock.DeviceLost, match="illegal"):
        one.tried(lambda: None, "the kernel")
    assert notes.Notes(tmp_path / "rows.json", KEY).trying == ["the kernel"]
    assert kept.blame("left out: it") == "the kernel"
    assert one.tried(lambda: 3, "the kernel") == (None, "left out: it")


def test_a_released_formulation_that_fails_is_wrong(tmp_path: Path, monkeypatch) -> None:
    def broken(*tensors: torch.Tensor, eye: torch.Tensor | None = None) -> torch.Tensor:
        raise ArithmeticError("it never worked")

    monkeypatch.setattr(krr, "released_mse", broken)
    made = notes.Notes(tmp_path / "rows.json", KEY)
    run = stage.Run(tmp_path, "cpu", True, None, made, clock.Clock("cpu", made, quick=True))
    row = krr.compare(run, krr.TOY[0])
    assert len(row["wrong"]) == 2 and all("it never worked" in one for one in row["wrong"])
