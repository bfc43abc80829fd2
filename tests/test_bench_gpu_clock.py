"""What is timed on a GPU and how, by a device that is played."""

import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
clock = import_module("bench.gpu.clock")
krr = import_module("bench.gpu.krr")
measure = import_module("bench.gpu.measure")
step = import_module("bench.gpu.step")
table = import_module("bench.gpu.table")


class Device:
    """A device whose clock is at the number of things that were done, with streams and graphs.

    A capture in which a call does what may not be captured fails as it does in torch: the call
    raises, and so does the end of the capture.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.current, self.capturing, self.broken = "default", False, False
        device = self

        class Graph:
            def capture_begin(self, pool: int) -> None:
                device.capturing = True

            def capture_end(self) -> None:
                device.capturing = False
                if device.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error")

            def replay(self) -> None:
                device.done.append("replay")
                self.replayed()

            replayed = staticmethod(lambda: None)

        @contextmanager
        def stream(one: SimpleNamespace):
            self.current = one.name
            try:
                yield
            finally:
                self.current = "default"

        self.graph = Graph
        for name, value in {
            **{"synchronize": lambda: self.done.append("wait"), "empty_cache": lambda: None},
            **{"Event": self.event, "CUDAGraph": Graph, "stream": stream},
            "Stream": lambda: SimpleNamespace(name="side", wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(
                name=self.current, wait_stream=lambda other: None
            ),
            **{"current_device": lambda: 0, "graph_pool_handle": lambda: 3},
            "default_generators": [
                SimpleNamespace(clone_state=lambda: 0, graphsafe_set_state=lambda state: None)
            ],
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        end = lambda *_: None  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

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
def timer(device: Device):
    """A clock for "cuda" on tensors of the CPU."""
    made = clock.Clock("cpu", quick=True)
    made.device = "cuda"
    return made


def test_a_call_is_timed_between_two_events_behind_a_cold_cache(device, timer) -> None:
    timer._flush = SimpleNamespace(zero_=lambda: device.done.append("flush"))
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


@pytest.mark.parametrize("drift, wrong", [(0.0, False), (1e-6, False), (0.1, True)])
def test_a_graph_is_replayed_into_poisoned_memory_and_compared(device, timer, drift, wrong) -> None:
    results = []

    def call() -> list[torch.Tensor]:
        results.append([torch.ones(2), torch.zeros(3)])
        return results[-1]

    def replayed() -> None:
        results[-1][0].fill_(1.0 + drift)
        results[-1][1].fill_(0.0)

    device.graph.replayed = staticmethod(replayed)
    told = timer.graph(call, seconds=0.0)
    assert told["same_bits"] is (drift == 0.0) and told["ms"] > 0 and ("wrong" in told) is wrong
    assert len(results) == 5, "one to compare with, three to warm up, one captured"
    assert device.current == "default" and not timer.spoilt


@pytest.mark.parametrize("version, spoilt", [("2.11.0+cu130", True), ("2.12.1", False)])
def test_a_capture_that_fails_is_ended_and_spoils_an_older_torch(
    device, timer, monkeypatch: pytest.MonkeyPatch, version: str, spoilt: bool
) -> None:
    """It was: the stream stayed that of the capture, and what came behind it failed too."""
    monkeypatch.setattr(torch, "__version__", version)

    def call() -> list[torch.Tensor]:
        if device.capturing:
            device.broken = True
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return [torch.ones(2)]

    told = timer.graph(call, seconds=0.0)
    assert told == {"failed": "RuntimeError: operation not permitted when stream is capturing"}
    assert timer.spoilt is spoilt and not device.capturing and device.current == "default"


def test_a_graph_that_writes_nothing_is_seen(device, timer) -> None:
    with pytest.raises(FloatingPointError, match="NaN"):
        timer.graph(lambda: [torch.ones(2)], seconds=0.0)


def test_kernels_are_summed_and_those_that_take_most_come_first() -> None:
    def event(name: str, count: int, us: float) -> SimpleNamespace:
        kind = torch.autograd.DeviceType.CPU if name == "aten::mm" else gpu
        about = {"device_type": kind, "is_user_annotation": name == "step"}
        return SimpleNamespace(key=name, count=count, self_device_time_total=us, **about)

    gpu = torch.autograd.DeviceType.CUDA
    events = [event("a", 5, 50.0), event("b", 10, 5000.0), event("c", 5, 0.0), event("d", 5, 5.0)]
    # What is not a kernel is given the time of the kernels in it once more.
    events += [event("aten::mm", 5, 5000.0), event("step", 5, 5000.0)]
    found = clock.kernels(events, "cuda", calls=5, top=2)
    assert found["largest"] == [
        {"name": "b", "launches": 2.0, "ms": 1.0},
        {"name": "a", "launches": 1.0, "ms": 0.01},
    ]
    assert found["launches"] == 4.0 and found["kernel_ms"] == pytest.approx(1.011)
    assert clock.kernels([], "cuda", 5, 2) == {"failed": "the profiler saw no kernel"}


def test_calls_take_turns_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one, order = clock.Clock("cpu"), []

    def once(made) -> float:
        made()
        return {"a": 2.0, "b": 10.0 + order.count("b")}[order[-1]]

    monkeypatch.setattr(one, "once", once)
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    found = one.in_turn(calls, seconds=0.0)
    # Both were called before, until their times were alike: a twice, b three times at most.
    timed = order[-2 * found["a"].calls :]
    assert found["a"] == (2.0, 2.0, 2.0, 1) and len(timed) == 2
    found = one.in_turn(calls, seconds=60.0)
    assert found["b"].calls == 200 and order[-4:] == ["a", "b", "b", "a"]


def test_medians_and_percentiles() -> None:
    assert clock.sample([float(x) for x in range(11)]) == (5.0, 1.0, 9.0, 11)
    assert clock.sample([4.0, 100.0, 2.0]).ms == 4.0


def made(rows, kept: dict) -> dict:
    """The rows of one unit, made in this process."""
    run = measure.Run("krr", "cpu", True, None, clock.Clock("cpu", quick=True), kept.get)
    for name, make in rows(run):
        kept[name], _ = measure.attempt(run.clock, make)
    return kept


def test_every_way_has_its_times_its_error_and_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a graph that is played; what this machine has not refuses, and is not captured."""
    monkeypatch.setattr(
        clock.Clock, "graph", lambda self, call, seconds: {"ms": 0.5, "same_bits": True}
    )
    rows = made(next(krr.units(True)).rows, {})
    label = "m 12, p 5: "
    assert "CUDA" in rows[f"{label}triton, fast"]["refused"]
    assert f"{label}triton, fast, as a graph" not in rows
    for name in ("released", "released, identity on the device"):
        assert 0 < max(rows[label + name]["error"].values()) < 1e-3
    one = rows[f"{label}torch, float32"]
    assert (
        0 < one["p10"] <= one["ms"] <= one["p90"] and one["calls"] >= 2 and one["released_ms"] > 0
    )
    assert max(one["error"].values()) < 1e-3 and "wrong" not in one
    assert rows[f"{label}torch, float32, as a graph"]["ms"] == 0.5


@pytest.mark.parametrize("drift, wrong", [(1e-2, True), (0.0, False)])
def test_a_wrong_way_is_said_to_be_wrong(monkeypatch: pytest.MonkeyPatch, drift, wrong) -> None:
    """A gradient that is wrong by a hundredth is no rounding, on rounded features either."""
    true = krr.krr_mse

    def drifted(f_syn, *rest, **how):
        return true(f_syn + drift * (f_syn.detach() - f_syn), *rest, **how)

    monkeypatch.setattr(krr, "krr_mse", drifted)
    monkeypatch.setattr(
        krr, "alternatives", lambda: [krr.Alternative("torch", x) for x in ("fast", None)]
    )
    rows = made(next(krr.units(True)).rows, {})
    for name in ("torch, fast", "torch, float32"):
        assert bool(rows[f"m 12, p 5: {name}"].get("wrong")) is wrong, rows


def test_a_released_formulation_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor, eye: torch.Tensor | None = None) -> torch.Tensor:
        raise ArithmeticError("it never worked")

    monkeypatch.setattr(krr, "released_mse", broken)
    rows = made(next(krr.units(True)).rows, {})
    assert rows[f"m 12, p 5: {table.RELEASED}"] == {"failed": "ArithmeticError: it never worked"}
