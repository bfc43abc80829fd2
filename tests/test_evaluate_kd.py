"""Knowledge distillation in which the student sees the images of its method alone."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from krrst_fast import PrepareConfig, prepare
from krrst_fast.baselines import random_subset
from krrst_fast.data.augment import plain_views
from krrst_fast.data.config import ViewConfig
from krrst_fast.data.store import open_store
from krrst_fast.errors import ConfigError, NonFiniteError
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    KDConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    trial,
)
from krrst_fast.evaluate.distillation import distil_knowledge, measured, train_teacher
from krrst_fast.evaluate.materials import Split, open_materials
from krrst_fast.evaluate.run import _ticks
from krrst_fast.evaluate.trial import Trials
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.targets import FrozenTarget

SIZE = 8
NETWORK = ModelConfig(widths=(8, 16))
SCALE = {"mean": (0.5,) * 3, "std": (0.3,) * 3}
TRAINING = FinetuneConfig(batch_size=64, views=ViewConfig(padding=0, flip=False))


def net_of(seed: int) -> Network:
    """Return a fresh network for digits."""
    net = build(NETWORK, image_size=SIZE, num_outputs=10, seed=seed)
    assert isinstance(net, Network)
    return net


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits."""
    path = tmp_path_factory.mktemp("kd") / "digits"
    prepare(PrepareConfig(source="digits", out=path, size=SIZE, limit=500))
    return path


@pytest.fixture(scope="module")
def splits(digits: Path) -> tuple[Split, Split]:
    """Its train and test split."""
    store = open_store(digits)
    train, test = (
        Split(images=store.images(name), labels=store.labels(name)) for name in ("train", "test")
    )
    return train, test


@pytest.fixture(scope="module")
def teacher(splits: tuple[Split, Split]) -> Network:
    """A trained teacher."""
    net = net_of(1)
    config = KDConfig(teacher_steps=80)
    train_teacher(net, splits[0], config, TRAINING, **SCALE, seed=0)
    return net


def images_of(split: Split, count: int) -> Tensor:
    """Return the first images of a split, normalised."""
    return plain_views(split.images, torch.arange(count), *SCALE.values())


def test_a_student_learns_the_classes_from_images_without_labels(splits, teacher):
    train, test = splits
    reached = measured(teacher, test, **SCALE)
    student, images = net_of(2), images_of(train, 300)
    before = measured(student, test, **SCALE)
    config = KDConfig(steps=80, batch_size=64, lr=3e-3)
    distil_knowledge(student, teacher, images, config, seed=0)
    assert not student.training
    assert reached > 75 and measured(student, test, **SCALE) > max(60, before + 30)


def test_both_see_the_same_augmented_images_and_the_teacher_stays(splits, teacher):
    student, images = net_of(2), images_of(splits[0], 40)
    state = copy.deepcopy(teacher.state_dict())
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    hooks = [
        net.register_forward_pre_hook(lambda _, given, kept=seen[name]: kept.append(given[0]))
        for name, net in (("student", student), ("teacher", teacher))
    ]
    distil_knowledge(student, teacher, images, KDConfig(steps=6, batch_size=40), seed=0)
    for hook in hooks:
        hook.remove()
    assert len(seen["student"]) == len(seen["teacher"]) == 6
    for ours, theirs in zip(*seen.values()):
        assert torch.equal(ours, theirs)
    plain = images.flatten(1).sort(0).values
    assert not any(torch.allclose(x.flatten(1).sort(0).values, plain) for x in seen["student"])
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_teacher_sees_images_on_its_own_scale(splits, teacher):
    images = images_of(splits[0], 40)
    mean, std = (torch.tensor(SCALE[name]).view(-1, 1, 1) for name in ("mean", "std"))
    seen: list[Tensor] = []
    hook = teacher.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    config = KDConfig(steps=3, batch_size=40)
    distil_knowledge(net_of(2), teacher, images, config, seed=0)
    # The same images as pixels, as the student of a set of pixels sees them: shifts and cutouts
    # fill with zeros, which is another grey there, so only what no family changes is compared.
    scale = (1 / std, -mean / std)
    distil_knowledge(net_of(2), teacher, images * std + mean, config, scale=scale, seed=0)
    hook.remove()
    for normal, pixels in zip(seen[:3], seen[3:]):
        alike = torch.isclose(normal, pixels, atol=1e-4)
        assert alike.float().mean() > 0.5
    assert abs(float(seen[3].mean() - seen[0].mean())) < 1


def test_noise_takes_nothing_of_the_images_but_their_shape(splits, teacher):
    images, config = images_of(splits[0], 40), KDConfig(steps=3)
    results = []
    for given in (images, torch.full_like(images, torch.nan)):
        student = net_of(2)
        loss = distil_knowledge(student, teacher, given, config, noise=True, seed=0)
        results.append((loss, student.state_dict()))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_the_same_seed_gives_the_same_bits_and_another_one_others(splits, teacher):
    images, losses = images_of(splits[0], 40), []
    for seed in (0, 0, 1):
        losses.append(distil_knowledge(net_of(2), teacher, images, KDConfig(steps=4), seed=seed))
    assert losses[0] == losses[1] != losses[2]


def test_what_diverges_says_that_it_is_the_teacher_or_the_student(splits, teacher):
    with pytest.raises(NonFiniteError, match="^kd: the teacher: finetune: the loss is"):
        config = KDConfig(teacher_steps=5, teacher_lr=1e30)
        train_teacher(net_of(1), splits[0], config, TRAINING, **SCALE, seed=0)
    with pytest.raises(NonFiniteError, match="^kd: the loss is"):
        images = torch.full_like(images_of(splits[0], 8), torch.inf)
        distil_knowledge(net_of(2), teacher, images, KDConfig(steps=2), seed=0)


def test_settings_that_cannot_be_are_refused():
    for field, value in (("steps", -1), ("batch_size", 0), ("lr", 0.0), ("teacher_steps", 0)):
        with pytest.raises(ConfigError, match=f"KDConfig: {field} must be"):
            KDConfig(**{field: value})


@pytest.fixture
def config(digits: Path, tmp_path: Path) -> EvaluateConfig:
    """An evaluation of a few real images, with knowledge distillation."""
    store = open_store(digits)
    model = build(NETWORK, image_size=SIZE, num_outputs=12, seed=5)
    scale = {"mean": store.mean, "std": store.std}
    target = FrozenTarget(model=model, config=NETWORK, num_outputs=12, image_size=SIZE, **scale)
    target.save(tmp_path / "target.safetensors")
    random_subset(store, target, 20, seed=1).save(tmp_path / "distilled.safetensors")
    paths = {"store": str(digits), "target": str(tmp_path / "target.safetensors")}
    (tmp_path / "config.json").write_text(json.dumps(paths))
    return EvaluateConfig(
        run=tmp_path,
        store=digits,
        seeds=2,
        methods=("none", "random_labels", "random_target", "random_early", "distilled", "target"),
        model=NETWORK,
        pretrain=PretrainConfig(steps=3),
        probe=ProbeConfig(solver="ridge", labels=(2,)),
        finetune=replace(TRAINING, steps=2, lr=(0.01, 0.1)),
        kd=KDConfig(steps=3, teacher=NETWORK, teacher_steps=40, teacher_lr=0.05),
        device="cpu",
    )


def test_an_evaluation_has_one_teacher_and_a_student_of_each_method(config, monkeypatch):
    trained: list[object] = []
    real = trial.train_teacher
    monkeypatch.setattr(
        trial, "train_teacher", lambda *args, **opts: (trained.append(args), real(*args, **opts))
    )
    first = evaluate(config, progress=False)
    assert len(trained) == 1
    for row in first.rows:
        assert (
            ("kd" in row.scores) == (row.method != "target") == (row.teacher_accuracy is not None)
        )
    reached = {row.teacher_accuracy for row in first.rows} - {None}
    assert len(reached) == 1 and (value := reached.pop()) is not None and value > 50
    assert f"taught by one convnet of {value:.1f} per cent" in first.table()
    again = evaluate(replace(config, overwrite=True), progress=False)
    assert [row.scores for row in again.rows] == [row.scores for row in first.rows]


def test_the_student_of_a_method_sees_its_images(config, monkeypatch):
    seen: dict[str, tuple[Tensor, bool]] = {}
    name = ""

    def kept(student, teacher, images, given, *, noise, **options):
        seen[name] = images, noise

    monkeypatch.setattr(trial, "distil_knowledge", kept)
    trials = Trials(open_materials(config))
    for name in config.methods[:-1]:
        trials.run(name, 0, "", lambda: None)
    assert seen["none"][1] and not any(noise for key, (_, noise) in seen.items() if key != "none")
    random = seen["random_labels"][0]
    assert torch.equal(seen["random_target"][0], random)
    assert torch.equal(seen["random_early"][0], random)
    assert torch.equal(seen["distilled"][0], trials.materials.distilled.images)
    assert not torch.equal(seen["distilled"][0], random)


def test_every_step_is_counted(config):
    trials = Trials(materials := open_materials(config))
    teacher_steps = config.kd.teacher_steps
    for method in config.methods:
        steps: list[None] = []
        trials.run(method, 0, "", lambda kept=steps: kept.append(None))
        assert len(steps) == _ticks(materials, method) + teacher_steps, method
        teacher_steps = 0
