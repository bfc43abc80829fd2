"""Tables of the target's outputs on the device, in memory and on the disk, in two dtypes."""

import dataclasses
import json

import pytest
import torch

import krrst_fast.distill.cache_plan as cache_plan
from krrst_fast.data import open_store
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.start import make_source
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import load_target
from krrst_fast.targets.frozen import FrozenTarget

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    target = tmp_path / "target.safetensors"
    path = tiny_target if tiny_target.is_file() else next(tiny_target.glob("*.safetensors"))
    target.write_bytes(path.read_bytes())
    return DistillConfig(
        store=tiny_store,
        target=target,
        out=tmp_path / "run",
        num_images=6,
        steps=6,
        batch_size=16,
        lr=0.01,
        views=ViewConfig(padding=1),
        target_cache="on",
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
    )


def _plan(config: DistillConfig, **changes) -> cache_plan.CachePlan | None:
    changed = dataclasses.replace(config, **changes)
    store, target = open_store(config.store), load_target(config.target)
    return cache_plan.plan_cache(changed, store, target, CPU)


def test_places_give_the_same_outputs_and_runs_the_same_bits(config):
    store, target = open_store(config.store), load_target(config.target)
    found = {}
    for place in ("device", "memory", "disk"):
        at = dataclasses.replace(config, target_cache_place=place, out=config.out.with_name(place))
        source = make_source(at, store, target, CPU)
        found[place] = source.draw(2, generator(0, "test"))[1], distill(at, progress=False).images
        written = json.loads((at.out / "environment.json").read_text())
        assert written["target"] == "looked up among 720 views in float32"
    for outputs, images in found.values():
        assert torch.equal(outputs, found["device"][0]) and torch.equal(images, found["device"][1])


def test_a_table_on_the_disk_is_found_again_and_taken_up(config, monkeypatch):
    on_disk = dataclasses.replace(config, target_cache_place="disk")
    store, target = open_store(config.store), load_target(config.target)
    whole = make_source(on_disk, store, target, CPU).represent.outputs.clone()
    folder = _plan(on_disk).folder
    assert folder.parent.parent == config.target.parent and (folder / "rows.f32").exists()

    calls = []
    real = FrozenTarget.__call__

    def counting(self, x):
        calls.append(len(x))
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(FrozenTarget, "__call__", counting)
    again = make_source(on_disk, store, target, CPU).represent.outputs
    assert torch.equal(again, whole) and not calls
    # A kill half-way: blocks are saved by eights.
    monkeypatch.setattr("krrst_fast.distill.cache.CHUNK", 20)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(KeyboardInterrupt):
        make_source(on_disk, store, target, CPU)
    assert (folder / "rows.f32").stat().st_size == 4 * 5 * 20 * 9
    calls.clear()
    monkeypatch.setattr(FrozenTarget, "__call__", lambda self, x: calls.append(1) or real(self, x))
    taken_up = make_source(on_disk, store, target, CPU).represent.outputs
    torch.testing.assert_close(taken_up, whole, rtol=1e-5, atol=1e-6)
    assert len(calls) == len(whole) // 20 - 8


def test_half_the_bytes_round_to_float16(config):
    store, target = open_store(config.store), load_target(config.target)
    plain = make_source(config, store, target, CPU).represent.outputs
    for place in ("device", "disk"):
        half = dataclasses.replace(config, target_cache_dtype="float16", target_cache_place=place)
        source = make_source(half, store, target, CPU)
        assert torch.equal(source.represent.outputs, plain.half())
        batch, outputs = source.draw(0, generator(0, "test"))
        assert outputs.dtype == batch.dtype == torch.float32
    folder = _plan(half).folder
    assert (folder / "rows.f16").stat().st_size == plain.nbytes // 2
    # Tables that differ by their dtype alone do not push each other out.
    assert folder != _plan(config, target_cache_place="disk").folder
    assert _plan(half).size * 2 == _plan(config).size == plain.nbytes


def test_auto_looks_up_on_the_device_within_the_limit_and_else_on_the_disk(config):
    size = _plan(config).size
    assert size == _plan(config).rows * 5 * 4
    assert _plan(config).place == "device"
    over = {"target_cache_limit": (size - 1) / 2**30}
    assert _plan(config, **over).place == "disk"
    longer = {"steps": 10**6, "target_cache": "auto"}
    assert _plan(config, **longer).place == "device" and _plan(config, **longer, **over) is None
    assert _plan(config, **longer, target_cache_limit=size / 2**30).place == "device"
    assert _plan(config, **over, target_cache_place="memory").place == "memory"
    assert "looked up among" in str(_plan(config)) and "in float32" in str(_plan(config))


@pytest.mark.parametrize(
    "place, where", [("memory", "the memory of this"), ("device", "the device cpu")]
)
def test_what_does_not_fit_is_refused_before_anything_is_made(config, monkeypatch, place, where):
    monkeypatch.setattr(cache_plan, "free_memory", lambda device: 1000)
    too_large = dataclasses.replace(config, target_cache_place=place)
    with pytest.raises(ConfigError, match=f"{where}.* has 0.0 GiB free; pass .*float16"):
        distill(too_large, progress=False)
    assert not config.out.exists()
    on_disk = dataclasses.replace(config, target_cache_place="disk")
    assert distill(on_disk, progress=False).images.shape[0] == 6


@pytest.mark.parametrize(
    "change",
    [{"target_cache_limit": 0.0}, {"target_cache_place": "gpu"}, {"target_cache_dtype": "int8"}],
)
def test_settings_that_are_none(config, change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(config, **change)


@pytest.mark.parametrize("place", ["device", "memory", "disk"])
def test_outputs_that_float16_does_not_hold_are_refused(config, monkeypatch, place):
    real = FrozenTarget.__call__
    monkeypatch.setattr(FrozenTarget, "__call__", lambda self, x: 1e6 * real(self, x))
    half = dataclasses.replace(config, target_cache_dtype="float16", target_cache_place=place)
    with pytest.raises(NonFiniteError, match="outputs.*hold NaN or infinity"):
        make_source(half, open_store(config.store), load_target(config.target), CPU)
