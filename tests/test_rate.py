"""The rate that a head can bear: by its formula, and where networks explode without it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.evaluate import PretrainConfig
from krrst_fast.evaluate.pretrain import pretrain
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.models.rate import SAFETY, stable_rate

MOMENTUM = 0.9
NARROW = ModelConfig(widths=(32, 64))
FEATURES = 64 * 8 * 8


def network(num_outputs: int, model: ModelConfig = NARROW, size: int = 32) -> Network:
    return build(model, image_size=size, num_outputs=num_outputs, seed=3)


def noise(count: int, outputs: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=draw), torch.randn(
        count, outputs, generator=draw
    )


def losses_of_a_head(net: Network, x: Tensor, y: Tensor, rate: float) -> list[float]:
    """Descend on the head alone, on the features that it has in training."""
    with torch.no_grad():
        features = copy.deepcopy(net).train().embed(x).double()
    head = nn.Linear(features.shape[1], y.shape[1]).double()
    optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=MOMENTUM)
    found = []
    for _ in range(300):
        loss = nn.functional.mse_loss(head(features), y.double())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize(("count", "outputs"), [(1, 4), (7, 4), (30, 16)])
def test_the_head_converges_just_below_its_limit_and_diverges_just_above(
    count: int, outputs: int
) -> None:
    net, (x, y) = network(outputs), noise(count, outputs)
    found = stable_rate(net, x, num_outputs=outputs, rate=1e6, momentum=MOMENTUM)
    limit = found / SAFETY
    below, above = (losses_of_a_head(net, x, y, limit * factor) for factor in (0.9, 1.1))
    assert below[-1] < below[0]
    assert above[-1] > 100 * above[0]


def test_training_explodes_at_the_wanted_rate_and_not_at_the_stable_one() -> None:
    x, y = noise(10, 4)
    net = network(4)
    rate = stable_rate(net, x, num_outputs=4, rate=0.1, momentum=MOMENTUM)
    assert rate < 0.03

    def largest(rate: float) -> float:
        net, seen = network(4).train(), []
        optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM)
        for _ in range(12):
            loss = nn.functional.mse_loss(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(float(loss.detach()))
        return max(seen) / seen[0]

    assert not largest(0.1) < 20
    assert largest(rate) < 2


def test_the_papers_settings_keep_their_rate() -> None:
    net = network(512, ModelConfig())
    for count in (1, 10):
        x, _ = noise(count, 1)
        assert stable_rate(net, x, num_outputs=512, rate=0.1, momentum=MOMENTUM) == 0.1


def test_nothing_else_changes() -> None:
    net, (x, _) = network(4), noise(5, 4)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first = stable_rate(net, x, num_outputs=4, rate=0.1, momentum=MOMENTUM)
    assert first == stable_rate(net, x, num_outputs=4, rate=0.1, momentum=MOMENTUM)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert float(f"{first:.1e}") == first


def test_a_pool_says_that_it_lowers_its_rate() -> None:
    x, _ = noise(5, 4)
    config = PoolConfig(size=2, online_steps=3, model=NARROW)
    pool = Pool(config, image_size=32, num_outputs=4, device=torch.device("cpu"))
    told = rf"with 4 outputs of {FEATURES} features pool.lr 0.1 is more than half of .* it is 0.0"
    with pytest.warns(UserWarning, match=told):
        pool.lower_rate(x)
    assert pool.lr < 0.1
    assert {slot.optimizer.param_groups[0]["lr"] for slot in pool.slots} == {pool.lr}
    assert pool.fresh(0, 1)[1].param_groups[0]["lr"] == pool.lr
    again = Pool(config, image_size=32, num_outputs=4, device=torch.device("cpu"))
    again.load_state_dict(pool.state_dict())
    assert again.lr == pool.lr


def test_pre_training_takes_the_rate_that_is_stable() -> None:
    x, y = noise(10, 4)
    net = network(4)
    steps = PretrainConfig(steps=60, lr=0.1)
    assert pretrain(net, x, y, steps, seed=0) < 0.1
    with torch.no_grad():
        assert net.embed(x).square().sum(1).mean() > 100  # its features are alive
