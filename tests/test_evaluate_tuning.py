"""Fine-tuning at a rate that is chosen on labelled images it does not learn from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from krrst_fast import PrepareConfig, prepare
from krrst_fast.baselines import random_subset
from krrst_fast.data.config import ViewConfig
from krrst_fast.data.store import open_store
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    tuning,
)
from krrst_fast.evaluate.materials import Split
from krrst_fast.evaluate.tuning import Tuner, finetune_steps
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.targets import FrozenTarget

SIZE = 8
NETWORK = ModelConfig(widths=(8, 16))
MEAN, STD = (0.5,) * 3, (0.3,) * 3
PLAIN = ViewConfig(padding=0, flip=False)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits."""
    path = tmp_path_factory.mktemp("tuning") / "digits"
    prepare(PrepareConfig(source="digits", out=path, size=SIZE, limit=400))
    return path


@pytest.fixture
def splits(digits: Path) -> tuple[Split, Split]:
    """Its train and test split."""
    store = open_store(digits)
    train, test = (
        Split(images=store.images(name), labels=store.labels(name)) for name in ("train", "test")
    )
    return train, test


def fresh() -> Network:
    """Return the network that is fine-tuned."""
    net = build(NETWORK, image_size=SIZE, num_outputs=10, seed=0)
    assert isinstance(net, Network)
    return net


def tuner(train: Split, config: FinetuneConfig, **options) -> Tuner:
    """Return a tuner of that network."""
    return Tuner(fresh, train, config, mean=MEAN, std=STD, seed=3, **options)


def settings(**options) -> FinetuneConfig:
    """Return a short fine-tuning."""
    return FinetuneConfig(**{"steps": 12, "batch_size": 40, "views": PLAIN, **options})


FEW = [torch.arange(0, 80), torch.arange(80, 160)]


def test_the_rate_that_learns_is_chosen_and_gives_what_it_gives_alone(splits):
    train, test = splits
    found = tuner(train, settings(lr=(1e-6, 0.05, 1e-5))).tune(FEW, test)
    alone = tuner(train, settings(lr=0.05)).tune(FEW, test)
    poor = tuner(train, settings(lr=1e-6)).tune(FEW, test)
    assert found == alone and found.rate == 0.05
    assert found.accuracy > poor.accuracy + 20


def test_of_all_labels_a_fifth_judges_and_then_all_are_learnt_from(splits, monkeypatch):
    train, test = splits
    everything = torch.arange(len(train.labels))
    steps: list[None] = []
    lengths: list[tuple[float, int]] = []
    real = tuning.finetune

    def noted(net, images, index, *args, rate, **options):
        lengths.append((rate, len(index)))
        return real(net, images, index, *args, rate=rate, **options)

    monkeypatch.setattr(tuning, "finetune", noted)
    config = settings(lr=(1e-6, 0.05))
    found = tuner(train, config, tick=lambda: steps.append(None)).tune([everything], test)
    count = len(everything)
    assert lengths == [(1e-6, count - count // 5), (0.05, count - count // 5), (0.05, count)]
    assert len(steps) == finetune_steps(config) == 36
    assert found == tuner(train, settings(lr=0.05)).tune([everything], test)


def test_the_test_images_have_no_say_and_few_labels_are_judged_on_others(splits):
    """Whatever the labels of the test images and of those that are not drawn: see which matter."""
    train, test = splits
    config = settings(lr=(1e-6, 0.05), steps=20)
    shuffled = replace(test, labels=(test.labels + 1) % 10)
    assert tuner(train, config).tune(FEW, shuffled).rate == 0.05
    # Where the other labels are wrong by one, what has learnt the most is the worst.
    labels = (train.labels + 1) % 10
    labels[:160] = train.labels[:160]
    wrong = replace(train, labels=labels)
    assert tuner(wrong, config).tune([torch.arange(160)], test).rate == 1e-6


def test_a_rate_that_diverges_is_passed_over_and_all_of_them_are_an_error(splits):
    train, test = splits
    found = tuner(train, settings(lr=(1e30, 0.05))).tune(FEW, test)
    assert found == tuner(train, settings(lr=0.05)).tune(FEW, test)
    with pytest.raises(NonFiniteError, match=r"every rate of 1e\+30, 1e\+32 diverges: "):
        tuner(train, settings(lr=(1e30, 1e32))).tune(FEW, test)
    with pytest.raises(NonFiniteError, match="lower the rate|NaN or infinity"):
        tuner(train, settings(lr=1e30)).tune(FEW, test)


def test_a_rate_that_only_all_images_make_diverge_gives_way_to_the_next(splits, monkeypatch):
    train, test = splits
    everything, real = torch.arange(len(train.labels)), tuning.finetune

    def diverging(net, images, index, *args, rate, **options):
        if rate == 0.05 and len(index) == len(everything):
            raise NonFiniteError("finetune: the loss is nan")
        return real(net, images, index, *args, rate=rate, **options)

    monkeypatch.setattr(tuning, "finetune", diverging)
    found = tuner(train, settings(lr=(0.05, 0.01, 1e-6))).tune([everything], test)
    assert found == tuner(train, settings(lr=0.01)).tune([everything], test)


def test_accuracy_is_the_mean_over_the_draws(splits):
    train, test = splits
    config = settings(lr=0.05)
    alone = [tuner(train, config).tune([index], test).accuracy for index in FEW]
    both = tuner(train, config).tune(FEW, test).accuracy
    assert both == pytest.approx(sum(alone) / 2) and alone[0] != alone[1]


def test_rates_that_cannot_be_are_refused():
    for lr in ((), (0.1, 0.1), (0.1, 0.0), -1.0):
        with pytest.raises(ConfigError, match="lr must be positive, one rate or several different"):
            FinetuneConfig(lr=lr)
    with pytest.raises(ConfigError, match="label_draws must be at least 1, and 1 where all"):
        FinetuneConfig(label_draws=2)
    assert FinetuneConfig(lr=[0.1, 0.2]).rates == (0.1, 0.2)
    assert FinetuneConfig().rates == (0.01,)
    assert FinetuneConfig(lr=(0.01,)) == FinetuneConfig()


def test_an_evaluation_records_the_rates_and_says_them(digits, tmp_path):
    store = open_store(digits)
    model = build(NETWORK, image_size=SIZE, num_outputs=12, seed=5)
    target = FrozenTarget(
        model=model,
        config=NETWORK,
        num_outputs=12,
        mean=store.mean,
        std=store.std,
        image_size=SIZE,
    )
    target.save(tmp_path / "target.safetensors")
    random_subset(store, target, 10, seed=1).save(tmp_path / "distilled.safetensors")
    paths = {"store": str(digits), "target": str(tmp_path / "target.safetensors")}
    (tmp_path / "config.json").write_text(json.dumps(paths))
    config = EvaluateConfig(
        run=tmp_path,
        store=digits,
        seeds=2,
        methods=("none", "distilled"),
        model=NETWORK,
        pretrain=PretrainConfig(steps=3),
        probe=ProbeConfig(solver="ridge", labels=(2,)),
        finetune=settings(lr=(1e-6, 0.05), labels_per_class=3, label_draws=2),
        device="cpu",
    )
    first = evaluate(config, progress=False)
    assert {row.finetune_lr for row in first.rows} == {0.05}
    line = "finetune: rates chosen of 1e-06 0.05, by seed: none 0.05 0.05, distilled 0.05 0.05"
    assert line in first.table().splitlines()
    again = evaluate(replace(config, overwrite=True), progress=False)
    assert [row.scores for row in again.rows] == [row.scores for row in first.rows]
    one = replace(config, overwrite=True, finetune=settings(lr=0.05, labels_per_class=3))
    assert "rates chosen" not in evaluate(one, progress=False).table()
