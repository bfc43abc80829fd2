"""Whole evaluations on small digits: what is paired, what improves, resume, and every refusal."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from krrst_fast.baselines import random_subset
from krrst_fast.data import PrepareConfig, ViewConfig, open_store, prepare
from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
from krrst_fast.errors import ConfigError, DataError, NonFiniteError
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    trial,
)
from krrst_fast.evaluate.config import USUAL
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.evaluate.pretrain import pretrain, pretrain_labels, settle_norms
from krrst_fast.evaluate.trial import Trials
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.files import read_json, read_jsonl
from krrst_fast.runs.lock import locked
from krrst_fast.targets import FrozenTarget, load_target

NETWORK = ModelConfig(widths=(8, 16))
SIZE = 8
SMALL_SHIFTS = ViewConfig(padding=1, flip=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a digits store and a target network."""
    folder = tmp_path_factory.mktemp("evaluate")
    prepare(PrepareConfig(source="digits", out=folder / "digits", size=SIZE, limit=400))
    store = open_store(folder / "digits")
    model = build(NETWORK, image_size=SIZE, num_outputs=12, seed=5)
    settle_norms(model, store.images("train")[:200].float() / 255)
    (folder / "target").mkdir()
    target = FrozenTarget(
        model=model,
        config=NETWORK,
        num_outputs=12,
        mean=store.mean,
        std=store.std,
        image_size=SIZE,
    )
    target.save(folder / "target" / "target.safetensors")
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> EvaluateConfig:
    """An evaluation of a run whose distilled set is a random subset of its own."""
    run = tmp_path / "run"
    run.mkdir()
    store, target = open_store(base / "digits"), load_target(base / "target")
    random_subset(store, target, 20, seed=999).save(run / "distilled.safetensors")
    paths = {"store": str(base / "digits"), "target": str(base / "target")}
    (run / "config.json").write_text(json.dumps(paths))
    return EvaluateConfig(
        run=run,
        store=base / "digits",
        seeds=2,
        model=NETWORK,
        pretrain=PretrainConfig(steps=8),
        probe=ProbeConfig(solver="ridge", labels=(2,)),
        finetune=FinetuneConfig(steps=3, batch_size=16),
        device="cpu",
    )


def test_pretraining_lowers_the_error_on_its_images(config: EvaluateConfig) -> None:
    chosen = load_distilled(config.run)
    net = build(NETWORK, image_size=SIZE, num_outputs=12, seed=0)
    before = F.mse_loss(net(chosen.images), chosen.targets).item()
    last = pretrain(net, chosen.images, chosen.targets, PretrainConfig(steps=120), seed=0)
    assert not net.training
    with torch.no_grad():
        after = F.mse_loss(net(chosen.images), chosen.targets).item()
    assert last < 0.1 * before
    assert after < 0.2 * before


def test_pretraining_on_labels_learns_them() -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, SIZE, SIZE, generator=draw)
    labels = torch.arange(20) % 4
    net = build(NETWORK, image_size=SIZE, num_outputs=4, seed=0)
    pretrain_labels(net, images, labels, PretrainConfig(steps=150), seed=0)
    assert (net(images).argmax(1) == labels).all()


def test_settled_norms_are_those_of_the_images() -> None:
    draw = torch.Generator().manual_seed(0)
    images = 3 + 2 * torch.randn(16, 3, SIZE, SIZE, generator=draw)
    net = build(NETWORK, image_size=SIZE, num_outputs=0, seed=0)
    net.train()
    batch_statistics = net(images)
    settle_norms(net, images)
    # The running variance is the unbiased one: 1023 / 1024 of it at 16 images of 8 x 8.
    assert (net(images) - batch_statistics).abs().max() < 0.01 * batch_statistics.abs().max()


def test_every_method_starts_from_the_same_network_in_a_seed(config: EvaluateConfig) -> None:
    trials = Trials(open_materials(config))
    nets = [trials._fresh(outputs, 3) for outputs in (0, 10, 12)]
    for name, value in nets[0].state_dict().items():
        for other in nets[1:]:
            assert torch.equal(value, other.state_dict()[name]), name
    assert not torch.equal(next(nets[0].parameters()), next(trials._fresh(0, 4).parameters()))


def test_methods_on_the_same_set_give_the_same_figures(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rival's images made the distilled ones, the paired difference must be zero."""
    chosen = load_distilled(config.run)
    monkeypatch.setitem(trial.CHOICES, "random_target", lambda *args, **kwargs: chosen)
    result = evaluate(replace(config, methods=("random_target", "distilled")), progress=False)
    ours, theirs = (result.accuracies(name, "probe-2") for name in ("distilled", "random_target"))
    assert ours == theirs and len(ours) == 2
    summary = result.summary("distilled", "finetune")
    assert summary is not None and summary.difference is not None
    assert (summary.difference.mean, summary.difference.standard_error) == (0.0, 0.0)


def test_all_methods_run_and_the_file_says_what_the_result_says(config: EvaluateConfig) -> None:
    result = evaluate(config, progress=False)
    file = config.run / "evaluation" / "digits.json"
    assert read_json(file) == json.loads(json.dumps(result.to_json()))
    assert [(row.method, row.seed) for row in result.rows[:5]] == [
        (method, 0) for method in config.methods
    ]
    assert len(result.rows) == 10
    for row in result.rows:
        assert 0 <= row.scores["probe-2"] <= 100
        assert ("finetune" not in row.scores) == (row.method == "target")
        assert (row.pretrain_loss is None) == (row.method in ("none", "target"))
    assert [path.name for path in file.parent.iterdir()] == ["digits.json"]
    # A second call has nothing left to do, and the same figures.
    assert evaluate(config, progress=False).rows == result.rows


def figures(config: EvaluateConfig) -> list[tuple[object, ...]]:
    rows = json.loads((config.run / "evaluation" / "digits.json").read_text())["rows"]
    return [tuple(v for k, v in row.items() if k != "seconds") for row in rows]


def test_an_evaluation_that_was_killed_goes_on(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(config, progress=False)
    whole = figures(config)
    file = config.run / "evaluation" / "digits.json"
    file.unlink()

    partial, run, ran = file.with_name("digits.partial.jsonl"), Trials.run, []

    def stop_at_the_fourth(self: Trials, method, seed, *rest):  # type: ignore[no-untyped-def]
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((method, seed))
        return run(self, method, seed, *rest)

    monkeypatch.setattr(Trials, "run", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, progress=False)
    assert [(row["method"], row["seed"]) for row in read_jsonl(partial)] == ran
    with partial.open("a") as log:
        log.write('{"method": "distilled", "see')

    rest = []

    def count(self: Trials, method, seed, *others):  # type: ignore[no-untyped-def]
        rest.append((method, seed))
        return run(self, method, seed, *others)

    monkeypatch.setattr(Trials, "run", count)
    with pytest.warns(UserWarning, match="the last line, 28 bytes, was cut short.*; 3 rows are"):
        evaluate(config, progress=False)
    assert len(rest) == 7 and not set(rest) & set(ran)
    assert figures(config) == whole
    assert not partial.exists()


def test_more_seeds_and_methods_add_rows(config: EvaluateConfig) -> None:
    few = evaluate(replace(config, seeds=1, methods=("random_target",)), progress=False)
    more = evaluate(replace(config, methods=("none", "random_target")), progress=False)
    assert len(more.rows) == 4
    assert few.rows[0] in more.rows


def test_a_result_with_other_settings_is_not_lost(config: EvaluateConfig) -> None:
    config = replace(config, methods=("random_target",), seeds=1)
    evaluate(config, progress=False)
    other = replace(config, pretrain=PretrainConfig(steps=9))
    with pytest.raises(ConfigError, match="made with other settings .* --overwrite .* --name"):
        evaluate(other, progress=False)
    evaluate(replace(other, name="nine"), progress=False)
    evaluate(replace(other, overwrite=True), progress=False)
    names = sorted(path.name for path in (config.run / "evaluation").iterdir())
    assert names == ["digits.json", "nine.json"]
    written = json.loads((config.run / "evaluation" / "digits.json").read_text())
    assert written["config"]["pretrain"]["steps"] == 9


def test_another_distilled_set_is_another_evaluation(config: EvaluateConfig) -> None:
    config = replace(config, methods=("distilled",), seeds=1)
    evaluate(config, progress=False)
    chosen = load_distilled(config.run)
    replace(chosen, images=chosen.images + 0.01).save(config.run / "distilled.safetensors")
    with pytest.raises(ConfigError, match="other settings or data"):
        evaluate(config, progress=False)


def test_finetuning_beats_chance_on_digits(config: EvaluateConfig) -> None:
    config = replace(
        config,
        methods=("none", "distilled"),
        seeds=1,
        finetune=FinetuneConfig(steps=60, batch_size=64, lr=0.1, views=SMALL_SHIFTS),
    )
    result = evaluate(config, progress=False)
    for method in config.methods:
        assert result.accuracies(method, "finetune")[0] > 50


def test_same_seed_same_bits_and_the_global_generator_is_left_alone(config: EvaluateConfig) -> None:
    config = replace(config, seeds=1, methods=("random_target", "random_labels"))
    before = torch.random.get_rng_state()
    first = evaluate(config, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    again = evaluate(replace(config, overwrite=True), progress=False)
    for one, other in zip(first.rows, again.rows):
        assert (one.scores, one.pretrain_loss) == (other.scores, other.pretrain_loss)


def test_the_target_row_is_a_probe_on_the_targets_features(config: EvaluateConfig) -> None:
    given = replace(
        config, methods=("target",), seeds=2, probe=ProbeConfig(solver="ridge", ridge=0.05)
    )
    result = evaluate(given, progress=False)
    accuracies = result.accuracies("target", "probe-all")
    assert accuracies[0] == accuracies[1] > 70


def test_draws_of_labels_are_averaged(config: EvaluateConfig) -> None:
    few = ProbeConfig(solver="ridge", labels=(2,))
    trials = Trials(open_materials(replace(config, probe=few)))
    net = trials._fresh(0, 0).eval()
    drawn = [trials._labelled(2, 0, draw) for draw in range(3)]
    assert not torch.equal(drawn[0], drawn[1])
    single = []
    for index in drawn:
        trials._labelled = lambda *rest, index=index: index  # type: ignore[method-assign]
        single.append(trials._probe(net, "none", 0, lambda: None)["probe-2"])
    several = replace(config, probe=replace(few, label_draws=3))
    mean = Trials(open_materials(several))._probe(net, "none", 0, lambda: None)
    assert len(set(single)) > 1
    assert mean["probe-2"] == pytest.approx(sum(single) / 3)


def test_a_distilled_file_without_a_run(config: EvaluateConfig) -> None:
    alone = replace(config, run=config.run / "distilled.safetensors", seeds=1)
    assert evaluate(replace(alone, methods=("distilled",)), progress=False).num_images == 20
    with pytest.raises(ConfigError, match="no config.json that names the source; pass --source"):
        evaluate(alone, progress=False)


def test_the_inputs_of_a_run_are_found_from_every_directory(
    config: EvaluateConfig, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = config.run.parent
    paths = {"store": base / "digits", "target": base / "target", "out": config.run}
    (config.run / "config.json").write_text(json.dumps({k: str(v) for k, v in paths.items()}))
    (start / "elsewhere").mkdir()
    for directory, run in ((start, "run"), (start / "elsewhere", "../run"), (config.run, ".")):
        monkeypatch.chdir(directory)
        materials = open_materials(replace(config, run=Path(run)))
        assert materials.source is not None and materials.source.count("train") == 400
        assert materials.target is not None and materials.target.dim == 12


def unlabelled_store(folder: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (40, SIZE, SIZE, 3), np.uint8)
    np.savez(folder / "bare.npz", images=images)
    prepare(PrepareConfig(source=str(folder / "bare.npz"), out=folder / "bare", size=SIZE))
    return folder / "bare"


def test_store_without_labels(config: EvaluateConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="bare: has no labels, and an evaluation needs them"):
        evaluate(replace(config, store=unlabelled_store(tmp_path)), progress=False)


def test_store_without_test_images(config: EvaluateConfig, tmp_path: Path) -> None:
    images, labels = np.zeros((4, SIZE, SIZE, 3), np.uint8), np.arange(4)
    np.savez(tmp_path / "flat.npz", images=images, labels=labels)
    source = str(tmp_path / "flat.npz")
    prepare(PrepareConfig(source=source, out=tmp_path / "flat", size=SIZE))
    with pytest.raises(DataError, match="flat: an evaluation needs images in .* got train"):
        evaluate(replace(config, store=tmp_path / "flat"), progress=False)


def test_random_labels_of_an_unlabelled_source(config: EvaluateConfig, tmp_path: Path) -> None:
    bare = unlabelled_store(tmp_path)
    asked = replace(config, source=bare, methods=("random_labels",), seeds=1)
    with pytest.raises(DataError, match="bare: has no labels, which random_labels needs"):
        evaluate(asked, progress=False)
    left_out = evaluate(replace(asked, methods=USUAL), progress=False)
    assert left_out.config.methods == ("none", "random_target", "distilled", "target")
    assert {row.method for row in left_out.rows} == set(left_out.config.methods)


def test_fewer_labels_than_asked_is_found_before_any_training(config: EvaluateConfig) -> None:
    many = replace(config, probe=ProbeConfig(solver="ridge", labels=(100,)))
    with pytest.raises(DataError, match="digits: class 0 has only .* labels 100 needs 100"):
        evaluate(many, progress=False)
    assert not (config.run / "evaluation").exists()


def test_store_of_another_image_size(config: EvaluateConfig, tmp_path: Path) -> None:
    prepare(PrepareConfig(source="digits", out=tmp_path / "large", size=16, limit=20))
    with pytest.raises(DataError, match="large: the images are 16 px, .* set 8 px; .* --size 8"):
        evaluate(replace(config, store=tmp_path / "large"), progress=False)


def test_run_without_a_distilled_set(config: EvaluateConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither distilled.safetensors"):
        evaluate(replace(config, run=tmp_path), progress=False)


def test_a_subset_larger_than_the_source(config: EvaluateConfig) -> None:
    images, targets = torch.zeros(401, 3, SIZE, SIZE), torch.zeros(401, 12)
    large = DistilledSet(images=images, targets=targets, mean=(0.5,) * 3, std=(0.5,) * 3)
    large.save(config.run / "distilled.safetensors")
    with pytest.raises(DataError, match="a random subset needs 401 images, .* split has 400"):
        evaluate(config, progress=False)


def test_diverged_pretraining_names_method_and_seed(config: EvaluateConfig) -> None:
    # The rate of the target's outputs is lowered to what the head bears, that of labels is not.
    training = PretrainConfig(steps=60, label_lr=1e20)
    wild = replace(config, methods=("random_labels",), pretrain=training)
    with pytest.raises(NonFiniteError, match="evaluate: random_labels, seed 0: pretrain: the loss"):
        evaluate(wild, progress=False)


def test_a_result_file_that_is_something_else(config: EvaluateConfig) -> None:
    (config.run / "evaluation").mkdir()
    (config.run / "evaluation" / "digits.json").write_text("[1, 2]")
    with (
        pytest.warns(UserWarning, match="written without a checksum"),
        pytest.raises(DataError, match="digits.json: not a result of krrst evaluate"),
    ):
        evaluate(replace(config, methods=("distilled",)), progress=False)


def test_a_refused_evaluation_leaves_the_lock_of_the_running_one(config: EvaluateConfig) -> None:
    """The file of the running one is empty until its first row."""
    partial = config.run / "evaluation" / "digits.partial.jsonl"
    partial.parent.mkdir()
    partial.touch()
    with locked(partial), pytest.raises(ConfigError, match="another process is writing"):
        evaluate(replace(config, methods=("none",)), progress=False)
    assert partial.exists()
