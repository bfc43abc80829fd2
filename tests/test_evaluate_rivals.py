"""What an evaluation measures beside the probe on features, and the rivals made of real images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.baselines import kmeans, random_subset
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    trial,
)
from krrst_fast.evaluate import pretrain as pretrain_module
from krrst_fast.evaluate.config import METHODS, Method
from krrst_fast.evaluate.early import EarlyStop, fitted_and_held_out
from krrst_fast.evaluate.materials import HELD_OUT, open_materials
from krrst_fast.evaluate.pretrain import settle_norms
from krrst_fast.evaluate.trial import Trials
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.files import write_json
from krrst_fast.targets import FrozenTarget, load_target

NETWORK = ModelConfig(widths=(4, 8))
FITTING = tuple(method for method in METHODS if method not in ("random_20x", "random_100x"))
"""The methods that need no more images than there are."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits and a target."""
    folder = tmp_path_factory.mktemp("rivals")
    store = prepare(PrepareConfig(source="digits", out=folder / "digits", size=8, limit=200))
    model = build(NETWORK, image_size=8, num_outputs=6, seed=5)
    settle_norms(model, store.images("train")[:100].float() / 255)
    FrozenTarget(
        model=model, config=NETWORK, num_outputs=6, mean=store.mean, std=store.std, image_size=8
    ).save(folder / "target.safetensors")
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> EvaluateConfig:
    """A set of 20 real digits as the distilled one."""
    run, store, target = tmp_path / "run", base / "digits", base / "target.safetensors"
    run.mkdir()
    chosen = random_subset(open_store(store), load_target(target), 20, seed=7)
    chosen.save(run / "distilled.safetensors")
    write_json(run / "config.json", {"store": str(store), "target": str(target)})
    return EvaluateConfig(
        run=run,
        store=base / "digits",
        name="x",
        methods=FITTING,
        seeds=1,
        model=NETWORK,
        pretrain=PretrainConfig(steps=40),
        probe=ProbeConfig(solver="ridge", labels=(3,)),
        finetune=FinetuneConfig(steps=0),
        device="cpu",
    )


def test_every_method_has_its_figures(config: EvaluateConfig) -> None:
    result = evaluate(config, progress=False)
    row_of = {row.method: row for row in result.rows}
    assert tuple(row_of) == FITTING
    without = {"none", "random_labels"}
    assert {m for m in FITTING if "outputs-3" not in row_of[m].scores} == without
    assert {m for m in FITTING if row_of[m].r2 is None} == without | {"target"}
    assert row_of["random_early"].pretrain_steps in (10, 30, 40)
    assert f"best after {row_of['random_early'].pretrain_steps} steps" in result.table()
    assert result.tasks() == ("probe-3", "outputs-3")
    assert "held-out R2" in result.table()
    assert result.to_json()["summary"][2]["r2"] == row_of["random_target"].r2


def test_the_held_out_r2_is_that_of_its_definition(config: EvaluateConfig) -> None:
    materials = open_materials(config)
    net = build(NETWORK, image_size=8, num_outputs=6, seed=9).eval()
    store, target = materials.store, materials.target
    assert target is not None
    count = store.count("test")
    assert count <= HELD_OUT
    x = plain_views(store.images("test"), torch.arange(count), target.mean, target.std)
    with torch.no_grad():
        wanted, given = target(x).double(), net(x).double()
    r2 = 1 - ((given - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert Trials(materials)._explained(net) == pytest.approx(float(r2), abs=1e-6)
    assert Trials(materials)._explained(target.model) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_rows_stay_when_methods_are_added(config: EvaluateConfig) -> None:
    alone = evaluate(replace(config, methods=("distilled",)), progress=False)
    assert alone.rows[0].r2 is not None
    both = evaluate(replace(config, methods=("distilled", "kmeans")), progress=False)
    assert both.rows[0] == alone.rows[0]


def test_a_rival_is_the_baseline_of_its_name(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spied(*args: object, **kwargs: object) -> object:
        seen.append(kmeans(*args, **kwargs))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setitem(trial.CHOICES, "kmeans", spied)
    evaluate(replace(config, methods=("kmeans",), seeds=2), progress=False)
    assert [len(one) for one in seen] == [20, 20]
    assert not torch.equal(seen[0].images, seen[1].images)


def test_the_target_runs_once_on_all_images_and_the_rate_is_found_once_a_trial(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, found = [], []
    outputs = trial.all_outputs
    monkeypatch.setattr(trial, "all_outputs", lambda *a: ran.append(a) or outputs(*a))
    monkeypatch.setattr(pretrain_module, "stable_rate", lambda *a, **k: found.append(a) or 0.1)
    chosen: tuple[Method, ...] = ("kmeans", "herding", "k_centre")
    evaluate(replace(config, methods=chosen, seeds=2), progress=False)
    assert (len(ran), len(found)) == (1, 6)


def test_the_best_state_of_a_training_is_taken() -> None:
    net = build(NETWORK, image_size=8, num_outputs=6, seed=1)
    scores = iter([50.0, 70.0, 60.0])
    early = EarlyStop(net, lambda _: next(scores), last=35)
    for step in range(1, 36):
        torch.nn.init.constant_(net.fc.bias, step)  # type: ignore[arg-type]
        early.after_step()
    assert early.take_best() == 30
    assert torch.equal(net.fc.bias, torch.full((6,), 30.0))  # type: ignore[arg-type]
    assert not net.training


def test_images_a_probe_is_chosen_on_are_not_those_it_learns_from() -> None:
    labelled = torch.tensor([1, 5, 7])
    draw = torch.Generator().manual_seed(0)
    fitted, held_out = fitted_and_held_out(labelled, 10, draw)
    assert fitted.tolist() == [1, 5, 7] and sorted(held_out.tolist()) == [0, 2, 3, 4, 6, 8, 9]
    labels = torch.arange(500) % 10  # as in a store, whose classes take turns
    fitted, held_out = fitted_and_held_out(torch.arange(500), 500, draw)
    assert sorted([*fitted.tolist(), *held_out.tolist()]) == list(range(500))
    assert len(held_out) == 100
    for part in (fitted, held_out):
        assert labels[part].bincount(minlength=10).min() > 0
    _, some = fitted_and_held_out(torch.arange(10), 50_000, draw)
    assert len(some) == 2000 and (torch.arange(50_000) % 100)[some].unique().numel() == 100


def test_without_a_split_that_is_held_out_there_is_no_r2(
    config: EvaluateConfig, base: Path, tmp_path: Path
) -> None:
    pixels = open_store(base / "digits").images("train").permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "train.npz", images=pixels)
    prepare(PrepareConfig(source=tmp_path / "train.npz", out=tmp_path / "s", size=8))  # type: ignore[arg-type]
    few = replace(config, source=tmp_path / "s", methods=("random_target", "distilled"))
    result = evaluate(few, progress=False)
    assert all(row.r2 is None for row in result.rows)
    assert "R2" not in result.table()


def test_a_set_of_another_project_has_no_r2_and_its_rivals_their_own_scale(
    config: EvaluateConfig,
) -> None:
    methods: tuple[Method, ...] = ("random_target", "distilled")
    own = evaluate(replace(config, methods=methods), progress=False)
    theirs = load_distilled(config.run)
    images = theirs.pixels().permute(0, 3, 1, 2).float() / 255
    pixels = replace(theirs, images=images, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels.meta["method"] = "imported from lgm"
    pixels.save(config.run / "distilled.safetensors")
    moved = evaluate(replace(config, methods=methods, name="y"), progress=False)
    for name in ("probe-3", "outputs-3"):
        assert moved.accuracies("random_target", name) == own.accuracies("random_target", name)
    assert [row.r2 for row in moved.rows] == [None, None]
    assert moved.accuracies("distilled", "outputs-3") == {}


def test_the_target_is_not_needed_for_what_is_asked(config: EvaluateConfig) -> None:
    missing = replace(config, target=config.run / "gone.safetensors", methods=("distilled",))
    with pytest.warns(UserWarning, match="there is no held-out R2: .*gone.safetensors"):
        result = evaluate(missing, progress=False)
    assert result.rows[0].r2 is None
