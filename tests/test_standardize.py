"""Standardised heads: the outputs have mean 0 and variance 1, and are otherwise what they were."""

import pytest
import torch

from krrst_fast.data import open_store
from krrst_fast.data.augment import plain_views
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.files import read_json
from krrst_fast.targets import SSLAugmentConfig, TargetConfig, train_target
from krrst_fast.targets.standardize import standardize_head


def test_a_head_is_scaled_and_shifted_output_by_output():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(200, 7, generator=draw)
    head = torch.nn.Linear(7, 5)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, 7, generator=draw) * torch.logspace(-3, 2, 5)[:, None])
        before = head(features)
        standardize_head(head, before)
        after = head(features)
    expected = (before - before.mean(0)) / before.std(0, correction=0)
    torch.testing.assert_close(after[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    # The first spreads 1e-5 as far as the last: shifted only.
    torch.testing.assert_close(after[:, 0], before[:, 0] - before[:, 0].mean())


def test_constant_outputs_become_zero():
    head = torch.nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.zero_()
        features = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
        standardize_head(head, head(features))
        assert torch.equal(head(features), torch.zeros(10, 2))


def test_a_target_run_standardizes_at_the_end(tiny_store, tmp_path):
    def run(standardize):
        config = TargetConfig(
            store=tiny_store,
            out=tmp_path / f"{standardize}",
            model=ModelConfig(widths=(4, 8)),
            num_outputs=6,
            steps=8,
            batch_size=16,
            projector=(),
            standardize=standardize,
            device="cpu",
            augment=SSLAugmentConfig(),
        )
        return train_target(config, progress=False)

    plain, scaled = run(False), run(True)
    store = open_store(tiny_store)
    count = store.count("train")
    images = plain_views(store.images(), torch.arange(count), plain.mean, plain.std)
    before, after = plain(images), scaled(images)
    expected = (before - before.mean(0)) / before.std(0, correction=0)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(plain.model.embed(images), scaled.model.embed(images))
    summary = read_json(tmp_path / "True" / "summary.json")
    assert summary["output_variance"] == pytest.approx(1, rel=1e-3)


def test_without_a_head_there_is_nothing_to_standardize(tmp_path):
    with pytest.raises(ConfigError, match="num_outputs"):
        TargetConfig(store=tmp_path, out=tmp_path / "x", standardize=True)
