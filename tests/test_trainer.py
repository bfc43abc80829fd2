"""One training step against the same step in plain PyTorch; rates, order of images, projector."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.seeding import derive, generator
from krrst_fast.targets import SSLAugmentConfig, TargetConfig, augment_pair
from krrst_fast.targets.losses import barlow_twins, nt_xent, vicreg
from krrst_fast.targets.trainer import Trainer, learning_rate, make_projector

MODEL = ModelConfig(widths=(4, 8))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("trainer") / "digits"
    return prepare(PrepareConfig(source="digits", out=out, size=8, limit=40))


@pytest.fixture
def config(store, tmp_path):
    return TargetConfig(
        store=store.path,
        out=tmp_path / "run",
        model=MODEL,
        num_outputs=6,
        steps=10,
        batch_size=16,
        weight_decay=0.1,
        projector=(12, 10),
        augment=SSLAugmentConfig(scale=(0.5, 1), saturation=0, hue=0, greyscale=0),
    )


def _trainer(config, store) -> Trainer:
    return Trainer(config, store, store.mean, store.std, CPU)


@pytest.mark.parametrize(
    "name, loss",
    [
        ("barlow_twins", lambda a, b: barlow_twins(a, b, off_diagonal=0.02)),
        ("simclr", lambda a, b: nt_xent(a, b, temperature=0.2)),
        ("vicreg", vicreg),
    ],
)
def test_steps_are_those_of_plain_pytorch(config, store, name, loss):
    # Without a head: its bias has no gradient but rounding errors, which Adam blows up.
    config = dataclasses.replace(
        config, loss=name, off_diagonal=0.02, temperature=0.2, num_outputs=0
    )
    trainer = _trainer(config, store)
    model = build(MODEL, image_size=8, num_outputs=0, seed=derive(0, "model"))
    first, _, _, second = make_projector(32, (12, 10), derive(0, "projector"))
    norm = torch.nn.BatchNorm1d(12)
    parameters = [*model.parameters(), first.weight, *norm.parameters(), second.weight]
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=False)
    views, images = generator(0, "views"), store.images()
    order = torch.randperm(40, generator=generator(0, "order", 0))
    for step in range(2):
        index = order[16 * step : 16 * step + 16]
        pair = augment_pair(images, index, config.augment, store.mean, store.std, views)
        outputs = [model(x) for x in pair]
        z = [second(F.relu(norm(first(y)))) for y in outputs]
        expected = loss(*z)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / 10)) / 2
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        value, representation = trainer.train_step()
        assert value == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(representation, outputs[0].detach(), rtol=1e-3, atol=1e-4)
    assert trainer.step == 2
    for got, wanted in zip(trainer.model.parameters(), model.parameters()):
        # Adam divides by the gradient's size: a rounding error in a tiny one moves a full step.
        assert (got - wanted).abs().mean() < 1e-5


def test_state_goes_through_a_dict_with_the_same_bits(config, store):
    one, two = _trainer(config, store), _trainer(config, store)
    for _ in range(3):
        one.train_step()
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        (a, y), (b, z) = one.train_step(), two.train_step()
        assert a == b and torch.equal(y, z)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), two.model.parameters()))


def test_the_global_generator_is_not_used(config, store):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer = _trainer(config, store)
    trainer.train_step()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_leaves_the_weights(config, store):
    trainer = _trainer(config, store)
    trainer.train_step()
    with torch.no_grad():
        trainer.projector[0].weight[0, 0] = torch.nan
    before = trainer.model.fc.weight.clone()
    with pytest.raises(NonFiniteError, match="the loss is nan at step 2; lower lr"):
        trainer.train_step()
    assert torch.equal(trainer.model.fc.weight, before) and trainer.step == 1
    with pytest.raises(NonFiniteError, match="step 1: 0.weight holds NaN"):
        trainer.state_dict()


def test_the_rate_rises_linearly_and_falls_as_a_cosine(config):
    config = dataclasses.replace(config, steps=12, warmup_steps=4, lr=0.8)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[8] == pytest.approx(0.4)
    assert rates[11] == pytest.approx(0.4 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate(dataclasses.replace(config, warmup_steps=0), 0) == 0.8


def test_an_epoch_shows_every_image_once_but_the_rest():
    epochs = Epochs(23, seed=1)
    seen = [epochs.whole_batch(step, 5) for step in range(12)]
    for epoch in range(3):
        numbers = torch.cat(seen[4 * epoch : 4 * epoch + 4])
        assert len(set(numbers.tolist())) == 20 and numbers.max() <= 22
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:8]))
    fresh = Epochs(23, seed=1)
    assert all(torch.equal(fresh.whole_batch(step, 5), seen[step]) for step in (11, 3, 4, 7))
    assert not torch.equal(Epochs(23, seed=2).whole_batch(0, 5), seen[0])


def test_the_projector_is_an_mlp_of_the_widths():
    projector = make_projector(3, (5, 4), seed=0)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    hidden = x @ projector[0].weight.T
    hidden = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, correction=0) + 1e-5)
    expected = hidden.clamp(min=0) @ projector[3].weight.T
    torch.testing.assert_close(projector(x), expected)
    assert torch.equal(make_projector(3, (), seed=0)(x), x)
    assert torch.equal(make_projector(3, (5, 4), seed=0)[0].weight, projector[0].weight)


def test_impossible_settings_are_named(config):
    for settings, message in [
        ({"loss": "byol"}, "loss must be one of barlow_twins, simclr, vicreg, got 'byol'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup_steps": 10}, "warmup_steps must be from 0 to 9, got 10"),
        ({"projector": (8, 0)}, "projector must be positive widths"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"std": (0.1, 0.0, 0.1)}, "std must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    ]:
        with pytest.raises(ConfigError, match=f"TargetConfig: {message}"):
            dataclasses.replace(config, **settings)
