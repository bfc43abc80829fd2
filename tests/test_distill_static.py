"""Outer steps on tensors that stay: bits of plain ones, failures told late, what graphs need."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import krrst_fast.distill.loop as loop
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Choice, Epochs, Source
from krrst_fast.distill.static import StaticSteps
from krrst_fast.distill.step import LinearDecay, State, outer_step
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.ops.solver import Solver
from krrst_fast.runs.capture import Replays
from krrst_fast.runs.seeding import generator
from tests.test_distill_source import Live, Means

RATE = LinearDecay(start=0.05, final=0.001, steps=40)
OPTIONS = {"ridge": 1e-4, "ridge_of": "trace"}
FLAG = Solver(check="flag")


def _made(dtype: torch.dtype = torch.float32, **changes) -> tuple[State, Source]:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 8), generator=draw, dtype=torch.uint8)
    source = Source(
        images=images,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        view=ViewConfig(padding=1),
        represent=Means(),
        epochs=Epochs(len(images), seed=3),
        batch_size=16,
        dtype=dtype,
    )
    config = PoolConfig(
        **{"size": 3, "online_steps": 5, "model": ModelConfig(widths=(4, 8)), **changes}
    )
    pool = Pool(
        config, image_size=8, num_outputs=3, seed=7, device=torch.device("cpu"), dtype=dtype
    )
    x = torch.randn(6, 3, 8, 8, generator=draw).to(dtype)
    y = torch.randn(6, 3, generator=draw).to(dtype)
    return State(x, y, pool, generator(0, "steps")), source


@pytest.mark.parametrize("reset", ["paper", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_have_the_bits_of_plain_steps(dtype, reset):
    plain, source = _made(dtype, reset=reset)
    static, _ = _made(dtype, reset=reset)
    steps = StaticSteps(static, source, RATE, rate_targets=lambda step: 0.01, **OPTIONS)
    with steps.aside():
        for number in range(40):
            one = outer_step(
                *(plain, source, RATE), rate_targets=lambda step: 0.01, solver=FLAG, **OPTIONS
            )
            other = steps()
            for name in ("loss", "slot", "slot_age", "lr", "lr_targets"):
                assert getattr(one, name) == getattr(other, name), (number, name)
            assert float(one.solve.ridge) == float(other.solve.ridge)
            if number % 7 == 0:
                steps.settle(other)
    assert sum(slot.generation for slot in static.pool.slots) > 3
    saved, again = plain.state_dict(), static.state_dict()
    for before, after in zip(saved["pool"], again["pool"], strict=True):
        # A fresh network has no momentum, or one of zeros.
        for number, value in list(after["optimizer"]["state"].items()):
            if number not in before["optimizer"]["state"]:
                assert not value["momentum_buffer"].any()
                before["optimizer"]["state"][number] = value
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    # And on from a checkpoint, which holds plain numbers.
    fresh, _ = _made(dtype, reset=reset)
    fresh.load_state_dict(copy.deepcopy(again))
    more = StaticSteps(fresh, source, RATE, rate_targets=lambda step: 0.01, **OPTIONS)
    assert more().loss == steps().loss and torch.equal(fresh.x_syn, static.x_syn)


def test_rates_of_zero_are_those_of_plain_steps():
    for rates in (lambda step: 0.0, lambda step: 0.01), (lambda step: 0.01, lambda step: 0.0):
        plain, source = _made()
        static, _ = _made()
        steps = StaticSteps(static, source, rates[0], rate_targets=rates[1], **OPTIONS)
        for _ in range(5):
            outer_step(plain, source, rates[0], rate_targets=rates[1], **OPTIONS)
            steps()
        assert torch.equal(plain.x_syn, static.x_syn) and torch.equal(plain.y_syn, static.y_syn)


def test_a_step_that_fails_changes_nothing_and_is_named(recwarn):
    """The network of one slot is broken after the third step; the others go on."""
    state, source = _made(online_steps=100)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    for _ in range(3):
        last = steps()
    broken = state.pool.slots[1]
    assert broken.age > 0
    for parameter in broken.network.parameters():
        parameter.fill_(torch.nan)
    for _ in range(12):
        before = state.x_syn.detach().clone(), state.y_syn.detach().clone()
        last = steps()
        if last.slot == 1:
            assert torch.equal(state.x_syn, before[0]) and torch.equal(state.y_syn, before[1])
        else:
            assert not torch.equal(state.x_syn, before[0]) and last.loss.isfinite()
    with pytest.warns(UserWarning, match=r"pool network 1 diverged"):
        steps.settle(last)
    assert broken.age == 0 and all(p.isfinite().all() for p in broken.network.parameters())
    # All networks have half the rate, the tensors that the steps read.
    assert (
        state.pool.lr == 0.05
        and [float(s.optimizer.param_groups[0]["lr"]) for s in state.pool.slots] == [0.05] * 3
    )
    assert not steps._failed.any() and not steps._diverged.any()
    for _ in range(6):
        assert steps().loss.isfinite()
    assert state.x_syn.isfinite().all()


def test_images_that_are_to_blame_end_the_run():
    state, source = _made()
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    last = steps()
    with torch.no_grad():
        state.y_syn[0, 0] = torch.nan
    for _ in range(4):
        last = steps()
    with pytest.raises(NonFiniteError, match=r"step 2, slot \d .*the loss"):
        steps.settle(last)


class Host(TorchDispatchMode):
    """Notes where the host reads a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::is_nonzero",
            "aten::equal",
        ):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


def test_what_is_captured_reads_nothing_and_leaves_tensors_where_they_are(monkeypatch):
    """On a GPU each read would wait, and cannot be captured at all."""
    state, source = _made()
    source = dataclasses.replace(source, represent=Live(lambda batch: batch.mean((2, 3))))
    # The range of the views is checked where that costs no waiting, on a CPU.
    monkeypatch.setattr("krrst_fast.ops.views._check_ranges", lambda *given: None)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    steps(), steps(), steps()
    reads: dict[str, list[str]] = {}

    def run(name, work):
        with Host() as host:
            results = work()
        reads.setdefault(name[0], []).extend(host.reads)
        return results

    steps.replays.run = run
    kept = [state.x_syn, state.y_syn, *steps._choice, steps._skips, steps._failed]
    for slot in state.pool.slots:
        kept += [*slot.network.parameters(), *slot.network.buffers()]
        kept += [value["momentum_buffer"] for value in slot.optimizer.state.values()]
        kept += [group["lr"] for group in slot.optimizer.param_groups]
    before = [tensor.data_ptr() for tensor in kept]
    for _ in range(20):
        steps()
    assert reads == {"outer": [], "fit": []}
    assert before == [tensor.data_ptr() for tensor in kept]
    held = [*steps._choice, *(p for slot in state.pool.slots for p in slot.network.parameters())]
    assert {id(tensor) for tensor in held} <= {id(tensor) for tensor in kept}
    assert sum(slot.generation for slot in state.pool.slots) >= 3


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


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=12,
        batch_size=16,
        lr=0.01,
        solver=FLAG,
        views=ViewConfig(padding=1, flip=False),
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=4,
        log_every=3,
    )


def test_runs_of_static_steps_have_the_bits_of_others_and_are_taken_up(config, monkeypatch):
    plain = distill(config, progress=False)
    monkeypatch.setattr(loop, "refusal", lambda *given: "")
    static = dataclasses.replace(config, out=config.out.with_name("static"))
    whole = distill(static, progress=False)
    assert torch.equal(whole.images, plain.images) and torch.equal(whole.targets, plain.targets)
    killed = dataclasses.replace(config, out=config.out.with_name("killed"))
    real, calls = StaticSteps.__call__, iter(range(6))

    def stopping(steps: StaticSteps):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(steps)

    with monkeypatch.context() as patch:
        patch.setattr(StaticSteps, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(killed, progress=False)
    # What was replayed goes on plainly, and the other way round.
    monkeypatch.undo()
    resumed = distill(dataclasses.replace(killed, cuda_graph="off"), resume=True, progress=False)
    assert torch.equal(resumed.images, whole.images)


def test_on_refuses_what_cannot_be_captured(config):
    with pytest.raises(ConfigError, match="cuda_graph is on, but the device is cpu, not a GPU"):
        distill(dataclasses.replace(config, cuda_graph="on"), progress=False)


def test_a_choice_is_sent_as_it_is():
    choice = Choice(torch.arange(3), torch.zeros(3, 2), torch.zeros(3).bool(), torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(choice, choice.to(torch.device("cpu"))))
