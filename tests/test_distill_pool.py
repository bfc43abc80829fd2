"""The pool: what a visit does to a network, when it is renewed, and that it can be saved."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.seeding import generator

MODEL = ModelConfig(widths=(4, 8))
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, 8, 8, generator=DRAW)
Y = torch.randn(6, 5, generator=DRAW)


def _pool(seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> Pool:
    config = PoolConfig(**({"size": 2, "online_steps": 3, "model": MODEL} | options))
    device = torch.device("cpu")
    return Pool(config, image_size=8, num_outputs=5, seed=seed, device=device, dtype=dtype)


def _weights(slot) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in slot.network.state_dict().values()])


def test_a_fit_is_the_sgd_step_written_out():
    pool = _pool(dtype=torch.float64, momentum=0.9, weight_decay=0.01, lr=0.05)
    slot, x, y = pool.slots[0], X.double(), Y.double()
    mine = copy.deepcopy(slot.network).train().requires_grad_(True)
    velocity = [torch.zeros_like(p) for p in mine.parameters()]
    for _ in range(3):
        expected = ((mine.fc(mine.embed(x)) - y) ** 2).mean()
        gradients = torch.autograd.grad(expected, list(mine.parameters()))
        with torch.no_grad():
            for p, v, g in zip(mine.parameters(), velocity, gradients):
                v.mul_(0.9).add_(g + 0.01 * p)
                p.sub_(0.05 * v)
        loss = slot.fit(x, y)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    for (name, got), want in zip(slot.network.state_dict().items(), mine.state_dict().values()):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12, msg=name)
    assert slot.age == 3


def test_a_network_at_rest_is_frozen():
    pool = _pool()
    slot = pool.slots[1]
    for _ in range(2):
        assert not slot.network.training
        for p in slot.network.parameters():
            assert p.grad is None and not p.requires_grad
        before = _weights(slot)
        x = X.clone().requires_grad_()
        slot.network.embed(x).square().sum().backward()
        assert x.grad is not None and torch.equal(_weights(slot), before)
        slot.fit(X, Y)


def test_fitting_learns():
    pool = _pool(online_steps=1000)
    losses = [float(pool.slots[0].fit(X, Y)) for _ in range(100)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_full_slot_is_renewed_and_counts_from_zero():
    pool = _pool(reset="paper")
    slot = pool.slots[0]
    ages, generations = [], []
    for _ in range(9):
        pool.advance(slot, X, Y)
        ages.append(slot.age)
        generations.append(slot.generation)
    assert ages == [1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert generations == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_the_released_rule_renews_a_full_slot_at_every_visit():
    pool = _pool(reset="released")
    slot = pool.slots[0]
    ages, seen = [], set()
    for _ in range(7):
        pool.advance(slot, X, Y)
        ages.append(slot.age)
        seen.add(_weights(slot).sum().item())
    assert ages == [1, 2, 3, 0, 0, 0, 0]
    assert slot.generation == 4 and len(seen) == 7
    assert pool.slots[1].age == 0 and pool.slots[1].generation == 0


def test_a_renewed_slot_holds_the_fresh_network_and_no_momentum():
    pool = _pool()
    slot = pool.slots[0]
    for _ in range(4):
        pool.advance(slot, X, Y)
    fresh, _ = pool.fresh(0, 1)
    expected = torch.cat([v.double().flatten() for v in fresh.state_dict().values()])
    assert torch.equal(_weights(slot), expected)
    assert not slot.optimizer.state_dict()["state"]


def test_networks_differ_by_slot_generation_and_seed_and_by_nothing_else():
    def weights(seed: int, number: int, generation: int) -> float:
        return _pool(seed).fresh(number, generation)[0].fc.weight.double().sum().item()

    cases = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    assert len({weights(*case) for case in cases}) == 4
    assert [weights(*case) for case in cases] == [weights(*case) for case in cases]


def test_starting_ages_are_from_one_to_below_t():
    pool = _pool(size=300, online_steps=5, model=ModelConfig(widths=(1,)))
    ages = pool.starting_ages(generator(0, "test"))
    assert sorted(set(ages)) == [1, 2, 3, 4]
    assert ages == pool.starting_ages(generator(0, "test"))
    assert ages != pool.starting_ages(generator(1, "test"))


def test_every_slot_is_drawn_as_often_as_the_others():
    pool, draw, count = _pool(size=4), generator(0, "test"), 4000
    drawn = torch.tensor([pool.draw(draw).number for _ in range(count)]).bincount(minlength=4)
    # Five standard deviations of a binomial.
    allowed = 5 * math.sqrt(count * 0.25 * 0.75)
    assert (drawn - count / 4).abs().max() < allowed


def test_a_saved_pool_goes_on_with_the_same_bits(tmp_path):
    first, second = _pool(), _pool(seed=7)
    for _ in range(5):
        first.advance(first.slots[0], X, Y)
    torch.save(first.state_dict(), tmp_path / "pool.pt")
    second.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    for pool in (first, second):
        # No further than the slots' present networks: later ones come from the pool's own seed.
        for slot in pool.slots:
            pool.advance(slot, X, Y)
            pool.advance(slot, X, Y)
    for one, other in zip(first.slots, second.slots):
        assert torch.equal(_weights(one), _weights(other))
        assert (one.age, one.generation) == (other.age, other.generation)
        assert not other.network.training
        assert not any(p.requires_grad for p in other.network.parameters())


def test_a_network_that_diverges_is_reported():
    pool = _pool(lr=1e30, online_steps=100)
    own_loss = pytest.raises(NonFiniteError, match="the network's own loss is .*; lower pool.lr")
    with pytest.warns(UserWarning, match="diverged"), own_loss:
        for _ in range(60):
            pool.advance(pool.slots[0], X, Y)
    assert not pool.slots[0].network.training


def test_batch_statistics_are_learnt_in_fits_and_used_in_features():
    pool = _pool()
    slot = pool.slots[0]
    norms = [module for module in slot.network.modules() if isinstance(module, nn.BatchNorm2d)]
    slot.fit(X, Y)
    means = [norm.running_mean.clone() for norm in norms]
    assert all(mean.abs().max() > 0 for mean in means)
    whole = slot.network.embed(X)
    torch.testing.assert_close(whole[:2], slot.network.embed(X[:2]))
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, means))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 0}, "PoolConfig: size must be at least 1, got 0"),
        ({"online_steps": 1}, "online_steps must be at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"reset": "never"}, "reset must be one of paper, released, got 'never'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        PoolConfig(**change)


def test_a_network_that_diverges_starts_again_at_half_the_rate():
    pool = _pool(lr=50.0, size=2)
    slot = pool.slots[0]
    fresh = _weights(slot)
    with pytest.warns(UserWarning, match="distill: pool network 0 diverged .* rate is now 25"):
        for _ in range(50):
            pool.fit(slot, X, Y)
            if pool.lr < 50.0:
                break
    assert slot.age == 0 and torch.equal(_weights(slot), fresh)
    rates = {group["lr"] for s in pool.slots for group in s.optimizer.param_groups}
    assert rates == {25.0}
    again = _pool(lr=50.0, size=2)
    again.load_state_dict(pool.state_dict())
    assert again.lr == 25.0


def _explode(pool: Pool, number: int) -> None:
    """Make the next fit of a slot diverge."""
    with torch.no_grad():
        for parameter in pool.slots[number].network.parameters():
            parameter.fill_(math.nan)


def test_a_rate_that_many_networks_stood_is_not_lowered_by_one_that_diverges():
    pool = _pool(size=2, online_steps=2)
    lives = [slot for slot in pool.slots for _ in range(3)]  # a life of each slot
    for accident in range(12):  # more than a rate can be halved
        for slot in lives if accident % 2 else reversed(lives):
            pool.advance(slot, X, Y)
        assert [slot.full_lives for slot in pool.slots] == [1, 1]
        _explode(pool, 0)
        with pytest.warns(UserWarning, match="rate stays 0.1: 2 networks had all their"):
            pool.fit(pool.slots[0], X, Y)
        pool.slots[1].age = 0
        assert pool.lr == 0.1 and [slot.full_lives for slot in pool.slots] == [0, 0]
    # One that diverges again before that lowers it, and so it does in a pool that was saved.
    pool.slots[0].full_lives = 1
    again = _pool(size=2, online_steps=2)
    again.load_state_dict(pool.state_dict())
    assert [slot.full_lives for slot in again.slots] == [1, 0]
    for each in (pool, again):
        _explode(each, 1)
        with pytest.warns(UserWarning, match="the whole pool's rate is now 0.05 .pool.lr is 0.1"):
            each.fit(each.slots[1], X, Y)
        assert each.lr == 0.05


def test_where_the_rate_stays_the_next_network_takes_the_place():
    """The same one would diverge again at the same rate."""
    pools = []
    for resumed in (False, True):
        pool = _pool(size=2, online_steps=3)
        for slot in pool.slots:
            slot.full_lives = 1
        _explode(pool, 0)
        if resumed:
            saved = copy.deepcopy(pool.state_dict())
            pool = _pool(size=2, online_steps=3)
            pool.load_state_dict(saved)
        slot, lost = pool.slots[0], _weights(_pool().slots[0])
        with pytest.warns(UserWarning, match="3 SGD steps .*; the next network takes its place"):
            slot.age = 2
            pool.fit(slot, X, Y)
        fresh = pool.fresh(0, 1)[0].state_dict()
        assert (slot.age, slot.generation) == (0, 1) and pool.lr == pool.config.lr
        assert all(torch.equal(fresh[name], x) for name, x in slot.network.state_dict().items())
        assert not torch.equal(_weights(slot), lost)
        for _ in range(5):  # its whole life, and the first step of the one after it
            pool.advance(slot, X, Y)
        assert (slot.age, slot.generation) == (1, 2)
        pools.append(pool)
    assert torch.equal(*(_weights(pool.slots[0]) for pool in pools))


def test_images_that_are_not_finite_are_no_reason_for_a_lower_rate():
    pool = _pool()
    with pytest.raises(NonFiniteError, match="own loss"):
        pool.fit(pool.slots[0], torch.full_like(X, math.nan), Y)
    assert pool.lr == pool.config.lr


@pytest.mark.parametrize("lr", [0.1, 40.0])
def test_outcomes_that_are_read_late_change_nothing(lr):
    """As on a GPU: before the pool is used again, and never later. At a rate of 40 some diverge."""
    from tests.test_distill_step import RATE, _run, outer_step

    seen = []
    for late in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            state, source = _run(lr=lr, online_steps=5, dtype=torch.float64)
            state.pool.settles_late = late
            said.clear()
            steps = [
                outer_step(state, source, RATE, ridge=1e-4, ridge_of="trace") for _ in range(16)
            ]
            waiting = state.pool.unsettled is not None
            saved = state.state_dict()
        assert state.pool.unsettled is None and waiting == late
        seen.append(([(s.slot, s.slot_age, float(s.loss)) for s in steps], saved, len(said)))
    (reports, saved, count), (late_reports, late_saved, late_count) = seen
    assert late_reports == reports and late_count == count and (count > 0) == (lr > 1)
    assert torch.equal(late_saved["x_syn"], saved["x_syn"])
    for a, b in zip(late_saved["pool"], saved["pool"], strict=True):
        assert (a["age"], a["generation"]) == (b["age"], b["generation"])
        assert all(torch.equal(x, b["network"][name]) for name, x in a["network"].items())
        groups = [x["optimizer"]["param_groups"][0]["lr"] for x in (a, b)]
        assert groups[0] == groups[1]
