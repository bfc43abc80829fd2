"""Outer steps on tensors that stay: bits of plain ones, failures told late, what graphs need."""

import contextlib
import copy
import dataclasses
import json
import math
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import krrst_fast.distill.loop as loop
import krrst_fast.distill.static as static
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.pool import Pool, Slot
from krrst_fast.distill.source import Choice, Epochs, Source
from krrst_fast.distill.static import StaticSteps
from krrst_fast.distill.step import LinearDecay, State, outer_step
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.ops.solver import Solver
from krrst_fast.runs.seeding import generator
from tests.played_gpu import played_gpu
from tests.test_distill_source import Live

RATE = LinearDecay(start=0.05, final=0.001, steps=40)
OPTIONS = {"ridge": 1e-4, "ridge_of": "trace"}
FLAG = Solver(check="flag")


def made(
    dtype: torch.dtype = torch.float32, *, device: str = "cpu", **changes
) -> tuple[State, Source]:
    """Return a distillation before its first step."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 8), generator=draw, dtype=torch.uint8)
    source = Source(
        images=images.to(device),
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        view=ViewConfig(padding=1),
        represent=Live(lambda batch: batch.mean((2, 3))),
        epochs=Epochs(len(images), seed=3),
        batch_size=16,
        dtype=dtype,
    )
    config = PoolConfig(
        **{"size": 3, "online_steps": 5, "model": ModelConfig(widths=(4, 8)), **changes}
    )
    pool = Pool(
        config, image_size=8, num_outputs=3, seed=7, device=torch.device(device), dtype=dtype
    )
    x = torch.randn(6, 3, 8, 8, generator=draw).to(device, dtype)
    y = torch.randn(6, 3, generator=draw).to(device, dtype)
    return State(x, y, pool, generator(0, "steps")), source


@pytest.mark.parametrize("reset", ["paper", "released"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_have_the_bits_of_plain_steps(dtype, reset, monkeypatch):
    monkeypatch.setattr(static, "EVERY", 7)
    plain, source = made(dtype, reset=reset)
    ours, _ = made(dtype, reset=reset)
    options = {"rate_targets": lambda step: 0.01, **OPTIONS}
    steps = StaticSteps(ours, source, RATE, **options)
    with steps.aside():
        for number in range(40):
            one = outer_step(plain, source, RATE, solver=FLAG, **options)
            other = steps()
            for name in ("loss", "slot", "slot_age", "lr", "lr_targets"):
                assert getattr(one, name) == getattr(other, name), (number, name)
            assert float(one.solve.ridge) == float(other.solve.ridge)
        within = copy.deepcopy(ours.state_dict())
    assert sum(slot.generation for slot in ours.pool.slots) > 3
    again, saved = ours.state_dict(), plain.state_dict()
    torch.testing.assert_close(within, again, rtol=0, atol=0)
    assert not again.pop("notes").any()
    for before, after in zip(saved["pool"], again["pool"], strict=True):
        # A fresh network has no momentum, or one of zeros.
        for number, value in list(after["optimizer"]["state"].items()):
            if number not in before["optimizer"]["state"]:
                assert not value["momentum_buffer"].any()
                before["optimizer"]["state"][number] = value
    torch.testing.assert_close(again, saved, rtol=0, atol=0)
    # Afterwards it is a state like others: plain steps go on with it.
    one, other = (outer_step(state, source, RATE, **options) for state in (plain, ours))
    assert one.loss == other.loss and torch.equal(plain.x_syn, ours.x_syn)


def test_rates_of_zero_are_those_of_plain_steps():
    def later(step: int) -> float:
        return 0.01 * (step > 2)

    def never(step: int) -> float:
        return 0.0

    for rates in (never, RATE), (RATE, never), (RATE, later):
        plain, source = made()
        ours, _ = made()
        steps = StaticSteps(ours, source, rates[0], rate_targets=rates[1], **OPTIONS)
        with steps.aside():
            for _ in range(5):
                outer_step(plain, source, rates[0], rate_targets=rates[1], **OPTIONS)
                steps()
        assert torch.equal(plain.x_syn, ours.x_syn) and torch.equal(plain.y_syn, ours.y_syn)


def _break(slot: Slot, value: float = math.nan) -> None:
    for parameter in slot.network.parameters():
        parameter.fill_(value)


def _rates(state: State) -> list[float]:
    return [float(slot.optimizer.param_groups[0]["lr"]) for slot in state.pool.slots]


@pytest.mark.parametrize("value", [math.nan, 1e4])
def test_a_network_that_is_broken_moves_no_image_and_starts_again(value, monkeypatch):
    """By NaN its features fail, by large numbers its own loss; the others go on."""
    monkeypatch.setattr(static, "EVERY", 15)
    state, source = made(online_steps=100)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    broken = state.pool.slots[1]
    with steps.aside():
        for _ in range(3):
            steps()
        assert broken.age == 1
        _break(broken, value)
        visits = 0
        while state.step < 14:
            before = state.x_syn.detach().clone()
            last = steps()
            visits += last.slot == 1
            # What is merely large moves them once: in the step that finds it.
            stays = last.slot == 1 and (math.isnan(value) or visits > 1)
            assert torch.equal(state.x_syn, before) == stays
        assert visits > 2 and not torch.isfinite(broken.network.fc.weight).all() or value == 1e4
        weight = broken.network.fc.weight.clone()
        said = r"pool network 1 diverged after \d SGD steps.*half|rate is now 0.05"
        with pytest.warns(UserWarning, match=said):
            steps()
        assert not torch.equal(weight, broken.network.fc.weight) and broken.age <= 1
        # All networks have half the rate, in the tensors that the steps read.
        assert state.pool.lr == 0.05 and _rates(state) == pytest.approx([0.05] * 3)
        assert not state.notes.any()
        for _ in range(6):
            assert steps().loss.isfinite()
    assert state.x_syn.isfinite().all() and _rates(state) == [0.05] * 3


def test_networks_that_fail_together_halve_the_rate_once(monkeypatch):
    monkeypatch.setattr(static, "EVERY", 25)
    state, source = made(online_steps=100)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    with steps.aside():
        for _ in range(8):
            steps()
        for slot in state.pool.slots:
            assert slot.age > 0
            _break(slot)
        x_syn = state.x_syn.detach().clone()
        with pytest.warns(UserWarning, match=r"network \d and \d and \d diverged") as said:
            while state.step < 25:
                steps()
    assert len(said) == 1 and state.pool.lr == 0.05
    assert torch.equal(state.x_syn, x_syn)


def test_a_network_that_is_due_is_asked_before_it_is_renewed():
    """Its failure is its own: the next one is not blamed, and it was no full life."""
    state, source = made(size=1, online_steps=3)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    (slot,) = state.pool.slots
    with steps.aside():
        for _ in range(3):
            steps()
        assert slot.age == 3
        _break(slot)
        with pytest.warns(UserWarning, match="pool network 0 diverged after 3 SGD steps"):
            steps()
        assert (slot.age, slot.generation, slot.full_lives) == (0, 0, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(static.EVERY):
                assert steps().loss.isfinite()
    assert slot.generation > 3


@pytest.mark.parametrize(
    "what, words",
    [
        ("y_syn", r"step 2, slot \d .*the loss, or its gradient"),
        ("target", r"step 2: the target's outputs hold NaN or infinity"),
        ("untrained", r"step 2, slot 0 \(after 0 SGD steps\): the loss, or its gradient"),
    ],
)
def test_what_no_network_is_to_blame_for_ends_the_run(what, words, monkeypatch):
    monkeypatch.setattr(static, "EVERY", 4)
    state, source = made(size=1)
    if what == "target":
        live = Live(lambda batch: batch.mean((2, 3)).div(float(state.step != 1)))
        source = dataclasses.replace(source, represent=live)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    with pytest.raises(NonFiniteError, match=words), steps.aside():
        steps()
        if what == "y_syn":
            state.y_syn.detach()[0, 0] = torch.nan
        if what == "untrained":
            state.pool.renew(state.pool.slots[0])
            _break(state.pool.slots[0])
        for _ in range(3):
            steps()
    assert state.x_syn.isfinite().all() and _rates(state) == [0.1]


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
    state, source = made()
    # The range of the views is checked where that costs no waiting, on a CPU.
    monkeypatch.setattr("krrst_fast.ops.views._check_ranges", lambda *given: None)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    reads: dict[str, list[str]] = {}

    def run(name, work):
        with Host() as host:
            results = work()
        reads.setdefault(name[0], []).extend(host.reads)
        return results

    stack = contextlib.ExitStack()
    stack.enter_context(steps.aside())
    steps(), steps(), steps()
    steps.replays.run = run
    kept = [state.notes, state.x_syn, state.y_syn, *steps._choice, steps._skips, steps._now]
    for slot in state.pool.slots:
        kept += [*slot.network.parameters(), *slot.network.buffers()]
        kept += [value["momentum_buffer"] for value in slot.optimizer.state.values()]
        kept += [group["lr"] for group in slot.optimizer.param_groups]
    before = [tensor.data_ptr() for tensor in kept]
    for _ in range(20):
        steps()
    assert reads == {"outer": [], "fit": []}
    assert before == [tensor.data_ptr() for tensor in kept]
    stack.close()
    held = [*steps._choice, *(p for slot in state.pool.slots for p in slot.network.parameters())]
    assert {id(tensor) for tensor in held} <= {id(tensor) for tensor in kept}
    assert sum(slot.generation for slot in state.pool.slots) >= 3


class Waits(list):
    """Where the host would wait for a played GPU: the file that asks for it."""

    def append(self, what: str) -> None:
        frames = reversed(traceback.extract_stack()[:-1])
        files = (Path(frame.filename).name for frame in frames)
        super().append(next(f for f in files if f not in ("played_gpu.py", "_tensor.py")))


def test_a_step_on_a_gpu_waits_for_nothing():
    with played_gpu() as gpu:
        state, source = made(device="cuda", size=2, online_steps=1000)
        steps = StaticSteps(state, source, RATE, **OPTIONS)
        with steps.aside():
            for _ in range(3):
                steps()
            gpu.waits = waits = Waits()
            for _ in range(20):
                assert steps().loss.device.type == "cuda"
            taken = set(waits)
        assert not torch.equal(state.x_syn, made(device="cuda")[0].x_syn)
    # The draws, from pinned memory; and torch's optimisers, whose C++ takes what is played for
    # tensors of the CPU, where their rates are not.
    assert taken == {"augment.py", "adam.py", "sgd.py"}


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


@pytest.mark.parametrize("goes_on", ["replayed", "plainly"])
def test_runs_of_static_steps_have_the_bits_of_others_and_are_taken_up(
    config, monkeypatch, goes_on
):
    plain = distill(config, progress=False)
    monkeypatch.setattr(loop, "refusal", lambda *given: "")
    whole = distill(dataclasses.replace(config, out=config.out.with_name("static")), progress=False)
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
    if goes_on == "plainly":
        monkeypatch.undo()
    resumed = distill(killed, resume=True, progress=False)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.targets, whole.targets)


def test_failures_are_read_when_they_were_whoever_logs_and_saves(config, monkeypatch):
    """The network of a slot is broken in step 3, and a run is saved while that is a note."""
    monkeypatch.setattr(loop, "refusal", lambda *given: "")
    monkeypatch.setattr(static, "EVERY", 8)
    real = StaticSteps.__call__

    def breaking(steps: StaticSteps):
        if steps.state.step == 3:
            _break(steps.state.pool.slots[0])
        if steps.state.step == stop_at:
            raise KeyboardInterrupt
        return real(steps)

    monkeypatch.setattr(StaticSteps, "__call__", breaking)
    found = []
    for name, every, stop_at in (("whole", 3, -1), ("often", 1, 6)):
        more = {"log_every": every, "checkpoint_every": every, "steps": 16}
        more["pool"] = dataclasses.replace(config.pool, online_steps=40)
        run = dataclasses.replace(config, out=config.out.with_name(name), **more)
        with pytest.warns(UserWarning, match="pool network 0 diverged"):
            if stop_at > 0:
                with pytest.raises(KeyboardInterrupt):
                    distill(run, progress=False)
                stop_at = -1
            found.append(distill(run, resume=True, progress=False))
    assert torch.equal(found[0].images, found[1].images)
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert "NaN" not in str(rows) and "nan" not in str(rows)


def test_on_refuses_what_cannot_be_captured(config):
    with pytest.raises(ConfigError, match="cuda_graph is on, but the device is cpu, not a GPU"):
        distill(dataclasses.replace(config, cuda_graph="on"), progress=False)
    assert not config.out.exists()
    with pytest.raises(ConfigError, match='cuda_graph must be on with solver.check "flag"'):
        dataclasses.replace(config, cuda_graph="on", solver=Solver())


def test_a_choice_is_sent_as_it_is():
    choice = Choice(torch.arange(3), torch.zeros(3, 2), torch.zeros(3).bool(), torch.arange(3))
    assert all(torch.equal(a, b) for a, b in zip(choice, choice.to(torch.device("cpu"))))
