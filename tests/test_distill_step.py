"""The outer step: Algorithm 1 written out, its gradients, golden losses, memory and errors.

`python tests/test_distill_step.py` writes the golden losses anew, after a change that is meant to
change them.
"""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.loop import warm_up
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Epochs, Source
from krrst_fast.distill.step import LinearDecay, State, StepReport, outer_step
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.seeding import generator
from tests.test_distill_source import Live

GOLDEN = Path(__file__).parent / "golden" / "outer_step.json"
MODEL = ModelConfig(widths=(8, 16))
RATE = LinearDecay(start=0.01, final=1e-5, steps=10)


def _run(m: int = 7, dtype: torch.dtype = torch.float64, **pool_options) -> tuple[State, Source]:
    """A state and its real images, small enough to be compared number by number."""
    draw = generator(0, "test")
    target = build(ModelConfig(widths=(6,)), image_size=8, num_outputs=5, seed=1)
    target.to(dtype).eval().requires_grad_(False)
    images = torch.randint(256, (30, 3, 8, 8), generator=draw, dtype=torch.uint8)
    source = Source(
        images=images,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        view=ViewConfig(padding=2),
        represent=Live(target),
        epochs=Epochs(len(images), seed=0),
        batch_size=12,
        dtype=dtype,
    )
    options = {"size": 2, "online_steps": 4, "model": MODEL} | pool_options
    pool = Pool(
        PoolConfig(**options),
        image_size=8,
        num_outputs=5,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    x_syn = torch.randn(m, 3, 8, 8, generator=draw, dtype=torch.float64).to(dtype)
    state = State(x_syn, target(x_syn), pool, generator(0, "steps"))
    warm_up(state)
    return state, source


def _step(state: State, source: Source, ridge: float = 1e-6) -> StepReport:
    return outer_step(state, source, RATE, ridge=ridge, ridge_of="trace")


def _loss(network, x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor) -> Tensor:
    """The outer loss with a column of ones, a dense solve and autograd."""
    f_syn, f_real = network.embed(x_syn), network.embed(x_real).detach()
    f_syn = torch.cat([f_syn, torch.ones(len(f_syn), 1, dtype=f_syn.dtype)], 1)
    f_real = torch.cat([f_real, torch.ones(len(f_real), 1, dtype=f_real.dtype)], 1)
    k_ss = f_syn @ f_syn.T
    ridge = 1e-6 * k_ss.trace().detach()
    alpha = torch.linalg.solve(k_ss + ridge * torch.eye(len(k_ss), dtype=k_ss.dtype), y_syn)
    return ((f_real @ f_syn.T @ alpha - y_real) ** 2).mean()


def _assert_close(got: Tensor, want: Tensor, allowed: float) -> None:
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.0e}"


@pytest.mark.parametrize("m", [1, 7, 30, 80])
def test_loss_and_gradients_are_those_of_the_formula(m):
    """m = 80 is more than the features have dimensions (64 and the ones): a singular gram."""
    state, source = _run(m)
    draws = torch.Generator()
    draws.set_state(state.generator.get_state())
    x_real, y_real = source.draw(0, draws)
    network = copy.deepcopy(state.pool.draw(draws).network)
    x_syn, y_syn = (t.detach().clone().requires_grad_() for t in (state.x_syn, state.y_syn))
    expected = _loss(network, x_syn, y_syn, x_real, y_real)
    expected.backward()

    report = _step(state, source)
    _assert_close(report.loss, expected.detach(), 1e-10)
    _assert_close(state.x_syn.grad, x_syn.grad, 1e-10)
    _assert_close(state.y_syn.grad, y_syn.grad, 1e-10)


def test_steps_are_the_algorithm_written_out():
    """Sixteen steps with optimisers of the test's own: order of the updates, decay, renewals."""
    state, source = _run()
    pool, draws = state.pool, torch.Generator()
    draws.set_state(state.generator.get_state())
    x_syn, y_syn = (t.detach().clone().requires_grad_() for t in (state.x_syn, state.y_syn))
    adamw = torch.optim.AdamW([x_syn, y_syn], lr=RATE.start, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(adamw, 1.0, RATE.final / RATE.start, RATE.steps)
    networks, sgds, ages, generations = [], [], [], []
    for slot in pool.slots:
        networks.append(copy.deepcopy(slot.network))
        sgds.append(torch.optim.SGD(networks[-1].parameters(), 0.1, 0.9, weight_decay=1e-3))
        sgds[-1].load_state_dict(copy.deepcopy(slot.optimizer.state_dict()))
        ages.append(slot.age)
        generations.append(0)

    for step in range(16):
        x_real, y_real = source.draw(step, draws)
        i = pool.draw(draws).number
        adamw.zero_grad()
        networks[i].eval()
        loss = _loss(networks[i], x_syn, y_syn, x_real, y_real)
        loss.backward()
        adamw.step()
        decay.step()
        age = ages[i]
        if ages[i] < 4:
            networks[i].train().requires_grad_(True).zero_grad()
            output = networks[i](x_syn.detach())
            ((output - y_syn.detach()) ** 2).mean().backward()
            sgds[i].step()
            ages[i] += 1
        else:
            generations[i] += 1
            networks[i], _ = pool.fresh(i, generations[i])
            sgds[i] = torch.optim.SGD(networks[i].parameters(), 0.1, 0.9, weight_decay=1e-3)
            ages[i] = 0
        report = _step(state, source)
        assert (report.slot, report.slot_age) == (i, age)
        _assert_close(report.loss, loss.detach(), 1e-8)

    assert sum(generations) >= 2
    assert [slot.age for slot in pool.slots] == ages
    _assert_close(state.x_syn.detach(), x_syn.detach(), 1e-8)
    _assert_close(state.y_syn.detach(), y_syn.detach(), 1e-8)
    for slot, network in zip(pool.slots, networks):
        for got, want in zip(slot.network.parameters(), network.parameters()):
            _assert_close(got, want.detach(), 1e-8)


def test_only_the_synthetic_set_gets_gradients(monkeypatch):
    state, source = _run()
    asked = []
    real = torch.Tensor.backward

    def backward(self, *args, **kwargs):
        wanted, todo = set(), [self.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None:
                wanted |= {id(node.variable)} if hasattr(node, "variable") else set()
                todo += [parent for parent, _ in node.next_functions]
        asked.append(wanted)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    slot = state.pool.slots[0]
    slot.age = 1
    monkeypatch.setattr(state.pool, "draw", lambda draws: slot)
    _step(state, source)
    outer, inner = asked
    assert outer == {id(state.x_syn), id(state.y_syn)}
    assert inner == {id(parameter) for parameter in slot.network.parameters()}
    assert all(p.grad is None for s in state.pool.slots for p in s.network.parameters())


def test_the_rate_falls_in_a_straight_line():
    rate = LinearDecay(start=2.0, final=0.5, steps=3)
    assert [rate(step) for step in (0, 1, 2, 3, 4)] == [2.0, 1.5, 1.0, 0.5, 0.5]
    state, source = _run()
    reports = [_step(state, source) for _ in range(3)]
    assert [report.lr for report in reports] == [RATE(0), RATE(1), RATE(2)]
    assert state.step == 3


def test_a_saved_state_goes_on_with_the_same_bits(tmp_path):
    first, source = _run(dtype=torch.float32)
    for _ in range(3):
        _step(first, source)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    expected = [_step(first, source).loss.item() for _ in range(7)]

    second, _ = _run(dtype=torch.float32)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [_step(second, source).loss.item() for _ in range(7)] == expected
    assert torch.equal(first.x_syn, second.x_syn) and torch.equal(first.y_syn, second.y_syn)


def test_float32_steps_follow_float64_steps():
    exact, source = _run()
    rough, rough_source = _run(dtype=torch.float32)
    for _ in range(3):
        want, got = _step(exact, source), _step(rough, rough_source)
        assert got.loss.dtype == torch.float32
        torch.testing.assert_close(got.loss.double(), want.loss, rtol=1e-2, atol=0)


def _golden_losses() -> list[float]:
    # A ridge large enough that rounding is not amplified past the tolerance.
    state, source = _run()
    return [_step(state, source, ridge=1e-3).loss.item() for _ in range(10)]


def test_ten_golden_losses():
    """What a refactor of the step, the pool, the draws or the models must leave as it is.

    On one machine a faithful refactor gives the same bits. Another processor's BLAS adds in
    another order, and torch draws normal numbers of float32, which a network begins with, by other
    instructions: they differ in the last bit, and losses by 1e-7. A changed formula, order of
    updates or stream of random numbers shows in the second digit or earlier.
    """
    losses = torch.tensor(_golden_losses(), dtype=torch.float64)
    golden = torch.tensor(json.loads(GOLDEN.read_text())["losses"], dtype=torch.float64)
    torch.testing.assert_close(losses, golden, rtol=2e-6, atol=0)


def _live() -> tuple[int, int]:
    gc.collect()
    found = [value for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter)]
    # Others have no address: sparse tensors, and those that torch.func leaves behind.
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    tensors = [x for x in found if x.layout == torch.strided and not is_wrapped(x)]
    return len(tensors), sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("reset", ["paper", "released"])
def test_nothing_grows_from_step_to_step(reset):
    state, source = _run(reset=reset)
    counts, objects = [], []
    gc.collect()  # what tests before this one left behind
    for step in range(60):
        _step(state, source)
        if step % 20 == 19:
            # Every slot trained once, so that each holds its momentum.
            for slot in state.pool.slots:
                slot.fit(state.x_syn.detach(), state.y_syn.detach())
            counts.append(_live())
            objects.append(len(gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]
    assert objects[2] - objects[1] <= 10
    before = _resident_bytes()
    for _ in range(200):
        _step(state, source)
    assert _resident_bytes() - before < 2**22


def test_a_loss_that_is_not_finite_names_step_and_slot():
    state, source = _run()
    _step(state, source)
    before = state.x_syn.detach().clone()
    for slot in state.pool.slots:
        slot.network.blocks[0].conv.weight.data.fill_(torch.nan)
        slot.age = 0  # so that it is not its training that is to blame
    where = r"distill: step 2, slot \d \(after \d SGD steps\): .+"
    with pytest.raises(NonFiniteError, match=where) as raised:
        _step(state, source)
    assert "\n" not in str(raised.value)
    assert torch.equal(state.x_syn, before) and state.step == 1


@pytest.mark.parametrize("scale", [1e10, torch.inf, torch.nan])
def test_a_network_that_has_exploded_starts_again_and_the_step_is_taken(scale):
    """Features that are too large to be multiplied, and features that are no numbers."""
    state, source = _run(dtype=torch.float32)
    other, _ = _run(dtype=torch.float32)
    _step(state, source)
    draws = torch.Generator()
    draws.set_state(state.generator.get_state())
    source.draw(state.step, draws)
    number = state.pool.draw(draws).number
    slot = state.pool.slots[number]
    generation = slot.generation = slot.generation + 1
    with torch.no_grad():
        for parameter in slot.network.parameters():
            parameter.mul_(scale)
    saved = copy.deepcopy(state.state_dict())
    with pytest.warns(UserWarning, match=rf"network {number} diverged .* rate is now 0.05 .pool.l"):
        report = _step(state, source)
    assert (report.slot, report.slot_age, state.pool.lr) == (number, 0, 0.05)
    assert torch.isfinite(report.loss) and torch.isfinite(state.x_syn).all()
    assert (slot.generation, slot.age) == (generation, 1)
    # A run that is taken up at the step before does the same, and goes on so.
    other.load_state_dict(saved)
    with pytest.warns(UserWarning, match="diverged"):
        again = _step(other, source)
    assert torch.equal(again.loss, report.loss) and torch.equal(other.x_syn, state.x_syn)
    assert torch.equal(_step(other, source).loss, _step(state, source).loss)


def test_no_rate_is_low_enough_for_what_explodes_at_any(monkeypatch):
    monkeypatch.setattr("krrst_fast.distill.pool.MOST_HALVINGS", 0)
    state, source = _run()
    for slot in state.pool.slots:
        slot.network.blocks[0].conv.weight.data.fill_(torch.nan)
    where = r"distill: step 1, slot \d \(after \d SGD steps\): .*; lower pool.lr"
    with pytest.raises(NonFiniteError, match=where.replace("; lower", "diverged: lower")):
        _step(state, source)


def test_a_target_that_is_not_finite_names_step_and_slot():
    state, source = _run()
    bad = Live(lambda batch: batch.new_full((len(batch), 5), torch.inf))
    object.__setattr__(source, "represent", bad)
    with pytest.raises(NonFiniteError, match="distill: step 1, slot"):
        _step(state, source)


def test_a_gram_without_a_factor_names_step_and_slot(monkeypatch):
    def refuse(*args, **options):
        raise NotPositiveDefiniteError("krr_mse: row 3")

    state, source = _run()
    monkeypatch.setattr("krrst_fast.distill.step.krr_mse", refuse)
    with pytest.raises(NotPositiveDefiniteError, match=r"step 1, slot \d .*: krr_mse: row 3"):
        _step(state, source)


def test_a_pool_network_that_diverges_names_step_and_slot(monkeypatch):
    monkeypatch.setattr("krrst_fast.distill.pool.MOST_HALVINGS", 0)
    state, source = _run()
    for slot in state.pool.slots:
        slot.age = 1
        slot.optimizer.param_groups[0]["lr"] = 1e300
    with pytest.raises(NonFiniteError, match=r"distill: step \d+, slot \d"):
        for _ in range(10):
            _step(state, source)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"losses": _golden_losses()}, indent=2) + "\n")
