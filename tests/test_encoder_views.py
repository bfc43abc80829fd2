"""The outputs of an encoder on the views of a run: kept on the disk, in a budget."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

import krrst_fast.distill.cache_plan as cache_module
from krrst_fast.data import ViewConfig, open_store
from krrst_fast.data.augment import View, all_views, draw_among, kept_views
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.cache import make_cache
from krrst_fast.distill.start import make_source
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import TargetConfig, load_target, train_target
from krrst_fast.targets.encoder import Encoder

SOURCE = """
import torch

def make():
    torch.manual_seed(3)
    net = torch.nn.Conv2d(3, 9, 5, 3)
    net.input_size, net.mean, net.std = 12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return net
"""


@pytest.fixture
def config(tiny_store, tmp_path) -> DistillConfig:
    (tmp_path / "my.py").write_text(SOURCE, encoding="utf-8")
    spec = f"{tmp_path / 'my.py'}:make"
    given = {"num_outputs": 4, "device": "cpu", "out": tmp_path / "target"}
    train_target(TargetConfig(store=tiny_store, encoder=spec, **given), progress=False)
    return DistillConfig(
        store=tiny_store,
        target=tmp_path / "target",
        out=tmp_path / "run",
        num_images=6,
        steps=40,
        batch_size=64,
        lr=0.01,
        device="cpu",
        views=ViewConfig(padding=1),
        pool=PoolConfig(size=2, online_steps=3, model=ModelConfig(widths=(4, 8))),
    )


def _count(monkeypatch) -> list[int]:
    """Images that encoders see from here on, a number a call."""
    seen: list[int] = []
    real = Encoder._features

    def counted(self, x):
        seen.append(len(x))
        return real(self, x)

    monkeypatch.setattr(Encoder, "_features", counted)
    return seen


def test_outputs_are_computed_once_for_all_runs(config, monkeypatch):
    whole = distill(config, progress=False)
    (rows,) = (config.target / "outputs").glob("*/rows.f32")
    assert rows.stat().st_size == 4 * 40 * 18 * 4
    seen = _count(monkeypatch)
    again = distill(dataclasses.replace(config, out=config.out.with_name("again")), progress=False)
    assert torch.equal(again.images, whole.images) and torch.equal(again.targets, whole.targets)
    # The probe and the first images.
    assert sum(seen) == 2 + 6
    by_step = dataclasses.replace(config, out=config.out.with_name("off"), target_cache="off")
    live = distill(by_step, progress=False)
    torch.testing.assert_close(live.images, whole.images, rtol=1e-3, atol=1e-3)


def test_a_kill_while_they_are_computed_leaves_the_same_bits(config, monkeypatch):
    whole = distill(config, progress=False)
    (rows,) = (config.target / "outputs").glob("*/rows.f32")
    expected = rows.read_bytes()
    for file in rows.parent.iterdir():
        file.unlink()
    monkeypatch.setattr("krrst_fast.runs.rows._BLOCKS_BETWEEN_SAVES", 1)
    real, calls = Encoder._features, iter(range(4))

    def stopping(self, x):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(self, x)

    killed = dataclasses.replace(config, out=config.out.with_name("killed"))
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_features", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(killed, progress=False)
    assert 0 < rows.stat().st_size < len(expected)
    seen = _count(monkeypatch)
    resumed = distill(killed, resume=True, progress=False)
    assert 2 + 6 < sum(seen) < 2 + 6 + 720
    assert rows.read_bytes() == expected
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.targets, whole.targets)


def test_a_target_that_was_killed_is_taken_up_with_the_same_bits(config, monkeypatch, tmp_path):
    made = (config.target / "target.safetensors").read_bytes()
    monkeypatch.setattr("krrst_fast.runs.rows._BLOCKS_BETWEEN_SAVES", 1)
    monkeypatch.setattr("krrst_fast.targets.encode._CHUNK", 8)
    settings = {"store": config.store, "num_outputs": 4, "device": "cpu"}
    again = TargetConfig(encoder=f"{tmp_path / 'my.py'}:make", out=tmp_path / "again", **settings)
    real, calls = Encoder._features, iter(range(2))

    def stopping(self, x):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_features", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_target(again, progress=False)
    seen = _count(monkeypatch)
    train_target(again, resume=True, progress=False)
    # The rest of 40 images, then the spread of the outputs, and the probe as it is saved and read.
    assert sum(seen) == 24 + 40 + 2 + 2
    assert (again.out / "target.safetensors").read_bytes() == made
    names = {"config.json", "environment.json", "summary.json", "target.safetensors"}
    assert set(os.listdir(again.out)) == names
    train_target(again, resume=True, progress=False)


def test_fixed_views_are_the_plain_one_and_others(config):
    view = ViewConfig(padding=1)
    kept = kept_views(view, 5)
    assert kept[0].tolist() == [1, 1, 0] and len(kept.unique(dim=0)) == 5
    assert torch.equal(kept, kept_views(view, 5))
    possible = {tuple(row) for row in all_views(view).tolist()}
    assert len(possible) == 18 and {tuple(row) for row in kept.tolist()} <= possible
    index = torch.arange(40).repeat(20)
    drawn = draw_among(index, kept, generator(0, "test"))
    rows = torch.cat((drawn.offset, drawn.flip[:, None].long()), 1)
    assert torch.equal(rows.unique(dim=0), kept.unique(dim=0))
    for wrong in (18, 100):
        with pytest.raises(ConfigError, match="18 views, of which 1 to 17 can be chosen"):
            kept_views(view, wrong)

    store, target = open_store(config.store), load_target(config.target)
    fixed = dataclasses.replace(config, fixed_views=5, target_cache="on")
    source = make_source(fixed, store, target, torch.device("cpu"))
    assert source.represent.outputs.shape == (40 * 5, 4)
    batch, outputs = source.draw(3, generator(0, "test"))
    torch.testing.assert_close(outputs, target(batch), rtol=1e-4, atol=1e-5)
    plan = cache_module.plan_cache(fixed, store, target, torch.device("cpu"))
    cache = make_cache(fixed, plan, target, store.images())
    missing = next(iter(possible - {tuple(row) for row in kept.tolist()}))
    with pytest.raises(IndexError):
        view = torch.tensor([missing])
        cache(cache.find(View(torch.tensor([0]), view[:, :2], view[:, 2].bool())), batch)
    assert distill(fixed, progress=False).targets.shape == (6, 4)


def test_a_table_that_does_not_fit_is_refused_before_anything_starts(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "LARGEST", 4 * 40 * 10 * 4)
        message = r"18 views of each of 40 images.*--fixed_views 8 \(a changed algorithm\)"
        with pytest.raises(ConfigError, match=message):
            distill(config, progress=False)
        assert not config.out.exists()
        few = dataclasses.replace(config, fixed_views=8)
        assert distill(few, progress=False).targets.shape == (6, 4)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    full = dataclasses.replace(config, out=config.out.with_name("full"))
    with pytest.raises(ConfigError, match=r"outputs on 720 views take .* GiB, and .* GiB free"):
        distill(full, progress=False)
    assert not full.out.exists()


def test_a_target_in_a_folder_that_is_read_only_keeps_outputs_in_the_run(config, monkeypatch):
    real = os.access
    target = config.target

    def denied(path, mode):
        return Path(path) != target and real(path, mode)

    monkeypatch.setattr(cache_module.os, "access", denied)
    distill(config, progress=False)
    assert not (target / "outputs").exists()
    assert len(list((config.out / "outputs").glob("*/rows.f32"))) == 1
