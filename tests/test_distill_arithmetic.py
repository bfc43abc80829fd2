"""How the networks of a run compute: float16, torch.compile, TF32, and what is said of it."""

import dataclasses
import json
import warnings

import pytest
import torch
from torch import nn

import krrst_fast.distill.loop as loop
from krrst_fast.data import open_store
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.arithmetic import (
    Arithmetic,
    FastTarget,
    arithmetic,
    convolutions,
    environment_of,
)
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.cache_plan import is_cached
from krrst_fast.distill.config import FREE_SETTINGS
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.start import initial_set, make_source, make_state
from krrst_fast.distill.step import LinearDecay, State, outer_step
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import config_hash
from krrst_fast.runs.files import read_jsonl
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import (
    FrozenTarget,
    TargetConfig,
    encoder_target,
    load_target,
    train_target,
)
from tests.test_distill_source import Live

CPU = torch.device("cpu")
RATE = LinearDecay(start=0.01, final=1e-5, steps=20)


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
        views=ViewConfig(padding=1, flip=False),
        pool=PoolConfig(size=2, online_steps=4, lr=0.01, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=4,
        log_every=1,
    )


def losses(config: DistillConfig) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in read_jsonl(config.out / "metrics.jsonl")])


@pytest.mark.parametrize("cache", ["on", "off"])
def test_in_float16_the_loss_falls_as_in_float32(config, cache):
    config = dataclasses.replace(config, target_cache=cache)
    half = dataclasses.replace(config, dtype="float16", out=config.out.with_name("half"))
    whole, rounded = (distill(one, progress=False) for one in (config, half))
    assert rounded.images.dtype == rounded.targets.dtype == torch.float32
    # Six images of so small a network fit the batch closely, and the system is badly conditioned.
    assert ((losses(half) - losses(config)).abs() <= 0.05 * losses(config)).all()
    assert not torch.equal(rounded.images, whole.images), "it was float32"
    assert (rounded.images - whole.images).norm() <= 0.3 * (
        whole.images - initial_set(config, *read(config)).images
    ).norm()


def read(config: DistillConfig):
    return open_store(config.store), load_target(config.target)


def test_a_resumed_run_in_float16_has_the_bits_of_one_that_was_not_stopped(config, monkeypatch):
    config = dataclasses.replace(config, dtype="float16")
    whole = distill(config, progress=False)
    killed = dataclasses.replace(config, out=config.out.with_name("killed"))
    real, calls = loop.outer_step, iter(range(6))

    def stopping(*args, **options):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "outer_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(killed, progress=False)
    resumed = distill(killed, resume=True, progress=False)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.targets, whole.targets)


def test_a_run_says_and_records_how_its_networks_run(config, capsys):
    config = dataclasses.replace(config, dtype="float16", steps=1)
    distill(config)
    assert "distill: the networks run by PyTorch in float16\n" in capsys.readouterr().err
    written = json.loads((config.out / "environment.json").read_text())
    assert written["networks"] == "PyTorch in float16"


@pytest.mark.parametrize(
    "dtype, device, said",
    [
        ("float32", "cpu", "plain PyTorch"),
        ("float64", "cpu", "plain PyTorch"),
        ("float64", "cuda", "plain PyTorch"),
        ("float16", "mps", "PyTorch in float16"),
        ("float32", "cuda", "torch.compile in float32"),
        ("float16", "cuda", "torch.compile in float16"),
    ],
)
def test_gpus_compile(config, dtype, device, said):
    chosen = arithmetic(dataclasses.replace(config, dtype=dtype), torch.device(device))
    assert str(chosen) == said and chosen.is_plain == (said == "plain PyTorch")


def test_torchs_switch_for_compilation_is_followed(config, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert arithmetic(config, torch.device("cuda")).is_plain


def test_tf32_is_off_for_a_run_that_wants_none_and_else_as_it_was(config, monkeypatch):
    seen = []

    def step(*args, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return outer_step(*args, **options)

    monkeypatch.setattr(loop, "outer_step", step)
    before = torch.backends.cudnn.allow_tf32
    for tf32 in (True, False):
        out = config.out.with_name(f"tf32 {tf32}")
        distill(dataclasses.replace(config, steps=1, out=out, tf32=tf32), progress=False)
        assert torch.backends.cudnn.allow_tf32 == before
    assert seen == [before, False]


def test_tf32_is_recorded_where_it_changes_bits(config):
    """It may change in the middle of a run, which `environment.record` then says."""
    gpu, before = torch.device("cuda"), torch.backends.cudnn.allow_tf32
    for dtype, tf32, said in (
        *(("float32", True, before), ("float32", False, False)),
        *(("float16", True, before), ("float16", False, False)),  # encoders stay in float32
    ):
        chosen = dataclasses.replace(config, dtype=dtype)
        with convolutions(tf32=tf32):
            written = environment_of(chosen, gpu, None)["convolutions"]
        assert written == f"in {'TF32' if said else 'float32'}"
    plain = {"networks": "plain PyTorch", "target": "run at every step"}
    assert environment_of(config, CPU, None) == plain
    double = dataclasses.replace(config, dtype="float64")
    assert environment_of(double, gpu, None) == plain


def test_runs_of_earlier_versions_can_be_resumed(config):
    """They know no tf32, which a GPU used for float32 as it does by default now."""
    other = dataclasses.replace(config, tf32=False)
    assert config_hash(config, FREE_SETTINGS) == config_hash(other, FREE_SETTINGS)
    assert config.dtype == "float32" and config.tf32


def test_outputs_of_the_target_are_kept_in_float16(config):
    store, target = read(config)
    drawn = []
    for dtype in ("float16", "float32"):
        chosen = dataclasses.replace(config, dtype=dtype, target_cache="on")
        source = make_source(chosen, store, target, CPU)
        assert isinstance(source.represent, TargetCache)
        assert str(source.represent.outputs.dtype) == f"torch.{dtype}"
        drawn.append(source.draw(0, generator(0, "test")))
    (x, y), (x_exact, y_exact) = drawn
    assert torch.equal(x, x_exact) and y.dtype == torch.float32
    assert 0 < (y - y_exact).norm() <= 5e-3 * y_exact.norm()
    half = dataclasses.replace(config, dtype="float16", steps=10**8)
    count = 2**30 // (2 * 9 * 5)
    assert is_cached(half, count, 5) and not is_cached(half, count + 1, 5)
    assert is_cached(half, 3 * count, 5, most=2**32)


def state_and_source(config: DistillConfig, chosen: Arithmetic):
    """A run before its first step, whose networks compute as `chosen` says on any device."""
    store, target = read(config)
    initial = initial_set(config, store, target)
    pool = Pool(
        config.pool, image_size=8, num_outputs=5, device=CPU, dtype=torch.float32, arithmetic=chosen
    )
    state = State(initial.images, initial.targets, pool, generator(0, "steps"))
    source = make_source(config, store, target, CPU)
    fast = FastTarget(target, chosen)
    return state, dataclasses.replace(source, represent=Live(fast))


@pytest.mark.parametrize("half", [False, True])
def test_slots_ages_and_renewals_share_what_is_compiled(config, traced, half):
    """Features with and without a gradient, training, and the target: one graph each."""
    run = []
    for compiles in (False, True):
        state, source = state_and_source(config, Arithmetic(half=half, compiles=compiles))
        reports = [outer_step(state, source, RATE, ridge=1e-4, ridge_of="trace") for _ in range(20)]
        run.append((state, torch.stack([one.loss for one in reports])))
        assert {one.slot for one in reports} == {0, 1}
    (plain, without), (compiled, with_) = run
    assert sum(slot.generation for slot in compiled.pool.slots) >= 2
    assert len(traced) == 4
    torch.testing.assert_close(with_, without, rtol=0.02 if half else 1e-3, atol=0)
    assert (compiled.x_syn - plain.x_syn).norm() <= 0.02 * plain.x_syn.norm()


@pytest.mark.parametrize("half", [False, True])
def test_gradients_that_overflow_cost_a_network_and_not_the_run(config, half):
    """The features are the same, and so is the loss, but float16 has no numbers on the way back."""
    model = ModelConfig(widths=(4, 8), norm="none")
    config = dataclasses.replace(config, pool=dataclasses.replace(config.pool, size=1, model=model))
    state, source = state_and_source(config, Arithmetic(half=half))
    (slot,) = state.pool.slots
    state.pool.fit(slot, state.x_syn.detach(), state.y_syn.detach())
    first, second = slot.network.blocks[0].conv, slot.network.blocks[1].conv
    with torch.no_grad():
        first.weight.mul_(2**-13), first.bias.mul_(2**-13), second.weight.mul_(2**15)
    before, rate = state.x_syn.detach().clone(), state.pool.lr
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = outer_step(state, source, RATE, ridge=1e-4, ridge_of="trace")
    assert report.slot_age == (0 if half else 1) and state.pool.lr == (rate / 2 if half else rate)
    assert [("diverged after 1 SGD steps" in str(one.message)) for one in said] == [True] * half
    assert state.x_syn.isfinite().all() and state.y_syn.isfinite().all()
    assert not torch.equal(state.x_syn, before), "the step was taken"


def test_a_last_chunk_is_not_compiled_for_its_size(config, traced):
    _, target = read(config)
    fast, draw = FastTarget(target, Arithmetic(compiles=True)), generator(0, "images")
    for count in (6, 6, 2):
        x = torch.randn(count, 3, 8, 8, generator=draw)
        torch.testing.assert_close(fast(x), target(x), rtol=1e-4, atol=1e-5)
    assert len(traced) == 1


class NormFirst(nn.Module):
    """An encoder whose norms come before their convolutions, and one with more than a norm."""

    input_size, mean, std = 12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.conv, self.last = nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6)
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for value in (*self.parameters(), *self.buffers()):
                if value.is_floating_point():
                    value.copy_(0.1 + torch.rand(value.shape, generator=draw))

    def forward(self, x):
        return self.last(self.conv(self.norm(self.stem(x).relu()).relu()).relu()).relu()


def of_encoder(config: DistillConfig, **changes) -> FrozenTarget:
    return encoder_target(NormFirst().eval(), open_store(config.store), num_outputs=4, **changes)


@pytest.mark.parametrize("half", [False, True])
def test_encoders_run_as_they_are_in_every_arithmetic(config, traced, half):
    """Their modules say nothing of the order in which they are called."""
    target = of_encoder(config)
    fast = FastTarget(target, Arithmetic(half=half, compiles=True))
    x = torch.randn(5, 3, 8, 8, generator=generator(0, "images"))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(fast(x.to(dtype)), target(x))
    assert not traced


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_run_in_float16_takes_an_encoder(config, cache, tmp_path):
    (tmp_path / "first.py").write_text("from tests.test_distill_arithmetic import NormFirst\n")
    encoder = f"{tmp_path / 'first.py'}:NormFirst"
    made = TargetConfig(
        store=config.store, out=tmp_path / "t", encoder=encoder, num_outputs=4, device="cpu"
    )
    train_target(made, progress=False)
    whole = dataclasses.replace(
        config, target=tmp_path / "t", steps=4, views=ViewConfig(padding=0), target_cache=cache
    )
    half = dataclasses.replace(whole, dtype="float16", out=config.out.with_name("half"))
    for one in (whole, half):
        distill(one, progress=False)
    assert ((losses(half) - losses(whole)).abs() <= 0.05 * losses(whole)).all()


def test_your_own_networks_run_as_they_are(config):
    model = ModelConfig(kind="tests/own_nets.py:Embeds")
    half = dataclasses.replace(
        config, dtype="float16", pool=dataclasses.replace(config.pool, model=model)
    )
    pool = make_state(half, initial_set(half, *read(half)), CPU).pool
    assert pool.at_rest is None and pool.training_loss is None
