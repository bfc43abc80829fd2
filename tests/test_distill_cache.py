"""The table of the target's outputs: when it is kept, and that looking up is computing."""

import dataclasses
from pathlib import Path

import pytest
import torch

import krrst_fast.distill.loop as loop
from krrst_fast.data import open_store
from krrst_fast.data.augment import ViewConfig, draw_views, render
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.cache_plan import is_cached, views_per_image
from krrst_fast.distill.start import make_source
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import load_target


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
        target_cache="on",
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=4,
        log_every=3,
    )


@pytest.mark.parametrize("padding, flip, count", [(4, True, 162), (1, False, 9), (0, False, 1)])
def test_views_of_an_image(padding, flip, count):
    assert views_per_image(ViewConfig(padding=padding, flip=flip)) == count


def test_auto_keeps_a_table_that_is_small_and_costs_less_than_it_saves():
    paths = {"store": Path("s"), "target": Path("t"), "out": Path("o")}
    paper = DistillConfig(**paths, num_images=1000)
    assert not is_cached(paper, 50_000, 512)  # 16.6 GB
    assert is_cached(paper, 50_000, 33) and not is_cached(paper, 50_000, 34)  # 1 GiB
    short = dataclasses.replace(paper, steps=7, batch_size=100, views=ViewConfig(padding=1))
    assert is_cached(short, 38, 5) and not is_cached(short, 39, 5)  # 700 views at the steps
    assert not is_cached(dataclasses.replace(paper, target_cache="off"), 10, 5)
    assert is_cached(dataclasses.replace(paper, target_cache="on"), 50_000, 512)
    with pytest.raises(ConfigError, match="target_cache"):
        dataclasses.replace(paper, target_cache="maybe")


@pytest.mark.parametrize("view", [ViewConfig(padding=2), ViewConfig(padding=1, flip=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_looking_up_is_computing_on_the_batch(tiny_store, tiny_target, view, dtype):
    images, target = open_store(tiny_store).images("train"), load_target(tiny_target)
    cache = TargetCache(target, images, view, dtype)
    assert cache.outputs.shape == (len(images) * views_per_image(view), 5)
    assert len(cache.outputs.unique(dim=0)) == len(cache.outputs)
    draw = generator(0, "test")
    for _ in range(4):
        index = torch.randint(len(images), (300,), generator=draw)
        drawn = draw_views(index, view, draw)
        batch = render(
            images,
            drawn,
            padding=view.padding,
            mean=target.mean,
            std=target.std,
            dtype=dtype,
        )
        found = cache(cache.find(drawn), batch)
        torch.testing.assert_close(found, target(batch.float()), rtol=1e-5, atol=1e-6)


def test_the_source_of_a_run_gives_the_same_batches_with_it(config):
    store, target = open_store(config.store), load_target(config.target)
    for step in (0, 5):
        drawn = []
        for choice in ("on", "off"):
            chosen = dataclasses.replace(config, target_cache=choice)
            source = make_source(chosen, store, target, torch.device("cpu"))
            assert isinstance(source.represent, TargetCache) == (choice == "on")
            drawn.append(source.draw(step, generator(step, "test")))
        (with_x, with_y), (without_x, without_y) = drawn
        assert torch.equal(with_x, without_x)
        torch.testing.assert_close(with_y, without_y, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(config, monkeypatch):
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


def test_a_bar_shows_the_filling(tiny_store, tiny_target, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    images, target = open_store(tiny_store).images("train"), load_target(tiny_target)
    TargetCache(target, images, ViewConfig(padding=0), progress=True)
    assert "target outputs: 100%" in capsys.readouterr().err
