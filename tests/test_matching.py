"""DM, DC and DSA: their objectives by definition, on what they have not seen, and resumed."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.dm import DM, mean_distance
from krrst_fast.baselines.gradient_matching import (
    GradientMatching,
    gradient_distance,
    loops,
    matching_loss,
)
from krrst_fast.baselines.image_learner import ImageLearner
from krrst_fast.baselines.matching_config import DCConfig, DMConfig, DSAConfig, MatchingConfig
from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet
from krrst_fast.errors import ConfigError, DataError, NonFiniteError
from krrst_fast.evaluate.config import EvaluateConfig
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.exchange import export_set, import_set
from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.runs.files import write_json

MODEL = ModelConfig(widths=(8, 16), norm="instance")
SIZE = 8
CONFIGS: dict[str, type[MatchingConfig]] = {"dm": DMConfig, "dc": DCConfig, "dsa": DSAConfig}
Metric = Callable[[Network, int, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(source="digits", out=out, size=SIZE))
    return out


def learner(method: str, path: Path, **settings: Any) -> ImageLearner:
    small = {"images_per_class": 2, "steps": 9, "batch_size": 24, "model": MODEL, "seed": 1}
    config = CONFIGS[method](store=path, out=path.parent / "run", **(small | settings))
    return DM(config) if isinstance(config, DMConfig) else GradientMatching(config)


def held_out(made: DistilledSet, store: ImageStore, metric: Metric) -> float:
    """The mean distance over classes, of test images, by networks of other seeds."""
    labels, classes = store.labels("test"), made.targets.argmax(1)
    total = 0.0
    for seed in (1001, 1002, 1003):
        network = build(MODEL, image_size=SIZE, num_outputs=10, seed=seed)
        for label in range(10):
            index = (labels == label).nonzero().flatten()
            real = plain_views(store.images("test"), index, store.mean, store.std)
            total += metric(network, label, made.images[classes == label], real).item() / 30
    return total


def features(network: Network, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
    return mean_distance(network, synthetic, real)


@pytest.mark.parametrize(
    "method, metric, settings, share",
    [
        ("dm", features, {"steps": 25}, 0.6),
        ("dc", matching_loss, {"lr": 1.0, "updates": 3, "epochs": 2}, 0.6),
        ("dsa", matching_loss, {"lr": 1.0, "updates": 3, "epochs": 2}, 0.9),
    ],
)
def test_the_objective_falls_on_unseen_images_and_networks(
    path: Path, method: str, metric: Metric, settings: dict[str, Any], share: float
) -> None:
    learning, store = learner(method, path, **settings), open_store(path)
    before = held_out(learning.result(), store, metric)
    for _ in range(learning.config.steps):
        learning.advance()
    after = held_out(learning.result(), store, metric)
    assert after < share * before, f"{before} -> {after}"


def test_dm_is_the_distance_of_mean_features(path: Path) -> None:
    learning = learner("dm", path, augment=(), batch_size=10_000, lr=0.5, momentum=0.0)
    before = learning.images.detach().clone()
    network = learning.fresh_network(0)
    store = open_store(path)
    labels, x = store.labels("train"), before.clone().requires_grad_(True)
    total = torch.zeros(())
    for label in range(10):
        index = (labels == label).nonzero().flatten()
        real = network.embed(plain_views(store.images("train"), index, store.mean, store.std))
        gap = network.embed(x[2 * label : 2 * label + 2]).mean(0) - real.detach().mean(0)
        total = total + (gap * gap).sum()
    (gradient,) = torch.autograd.grad(total, x)
    assert learning.advance()["loss"] == pytest.approx(total.item() / 10, rel=1e-4)
    assert torch.allclose(learning.images.detach(), before - 0.5 * gradient, atol=1e-4)


def test_gradient_distance_is_a_sum_over_rows_of_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 3, 3), (4,), (5, 7))
    found, wanted = (
        [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes] for _ in "ab"
    )
    rows = [
        1 - functional.cosine_similarity(found[k][i].flatten(), wanted[k][i].flatten(), 0)
        for k in (0, 2)
        for i in range(len(found[k]))
    ]
    assert float(gradient_distance(found, wanted)) == pytest.approx(float(sum(rows)), abs=1e-5)
    assert float(gradient_distance(found, found)) == pytest.approx(0, abs=1e-5)


def test_the_gradient_of_the_matching_loss_is_that_of_finite_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    network = build(
        ModelConfig(widths=(2,), norm="instance"), image_size=4, num_outputs=3, seed=2
    ).double()
    synthetic, real = (
        torch.randn(count, 3, 4, 4, generator=draw, dtype=torch.float64) for count in (2, 5)
    )
    synthetic.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: matching_loss(network, 1, x, real), (synthetic,))


# Three updates a network: saved in the middle of one, and where it was let go.
@pytest.mark.parametrize("saved_at", [2, 3])
@pytest.mark.parametrize("method", CONFIGS)
def test_resumed_it_has_the_same_bits(
    path: Path, tmp_path: Path, method: str, saved_at: int
) -> None:
    settings = {} if method == "dm" else {"updates": 3, "epochs": 2}
    whole, first, second = (learner(method, path, **settings) for _ in "123")
    losses = [whole.advance() for _ in range(5)]
    again = [first.advance() for _ in range(saved_at)]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    first.advance()  # what is saved does not change
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.step == saved_at
    again += [second.advance() for _ in range(5 - saved_at)]
    assert again == losses and all(row["loss"] > 0 for row in losses)
    assert torch.equal(whole.images, second.images)
    kept = copy.deepcopy(second.state_dict())
    other = learner(method, path, **settings, seed=2)
    assert not torch.equal(other.images, second.images)
    other.load_state_dict(kept)
    other.advance()
    assert torch.equal(kept["images"], second.images)


def test_results_are_sets_of_labels_as_imported_ones(path: Path, tmp_path: Path) -> None:
    learning = learner("dm", path)
    made, store = learning.result(), open_store(path)
    labels = torch.arange(10).repeat_interleave(2)
    assert torch.equal(made.targets, functional.one_hot(labels, 10).float())
    assert (made.mean, made.std) == (store.mean, store.std)
    # The first images are real ones of their classes.
    real = {x.numpy().tobytes(): y for x, y in zip(store.images("train"), store.labels("train"))}
    pixels = made.pixels().permute(0, 3, 1, 2).contiguous()
    assert [int(real[image.numpy().tobytes()]) for image in pixels] == labels.tolist()
    learning.advance()
    assert not torch.equal(learning.result().images, made.images)

    trials = [[made.images + 1, labels], [made.images, labels]]
    accuracies = {"ConvNet": [np.float64(0.25), np.float64(0.5)]}
    # The file format of torch before 1.6, in which sets of that time are published too.
    torch.save(
        {"data": trials, "accs_all_exps": accuracies},
        tmp_path / "res_DM_digits_ConvNet_2ipc.pt",
        _use_new_zipfile_serialization=False,
    )
    imported = import_set(
        tmp_path / "res_DM_digits_ConvNet_2ipc.pt",
        mean=store.mean,
        std=store.std,
        classes=store.classes,
    )
    read = imported.distilled
    assert imported.left_out == ("1 earlier trials of data", "accs_all_exps of the file")
    assert torch.equal(read.targets, made.targets) and torch.equal(read.images, made.images)
    for key in ("label_kind", "classes"):
        assert read.meta[key] == made.meta[key]
    export_set(made, tmp_path / "out", to="dcbench")
    assert torch.equal(torch.load(tmp_path / "out" / "labels_best.pt"), labels)
    assert json.loads(made.meta["classes"]) == list(map(str, range(10)))
    assert [learner(name, path).result().meta["method"] for name in CONFIGS] == list(CONFIGS)


def test_defaults_are_those_that_were_published(path: Path) -> None:
    paths = {"store": path, "out": path}
    each = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    for count, published in each.items():
        assert loops(DCConfig(**paths, images_per_class=count)) == published
    assert loops(DSAConfig(**paths, images_per_class=500)) == (50, 10)
    assert loops(DSAConfig(**paths, images_per_class=10, updates=2)) == (2, 50)
    found = {
        name: (c.lr, c.init_images, c.momentum, c.batch_size, c.model.norm, c.model.widths)
        for name, c in ((n, cls(**paths, images_per_class=1)) for n, cls in CONFIGS.items())
    }
    alike = (0.5, 256, "instance", (128, 128, 128))
    assert found["dm"] == (1.0, "real", *alike)
    assert found["dc"] == (0.1, "noise", *alike)
    assert found["dsa"] == (0.1, "real", *alike)


def test_what_cannot_be_learnt_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"200 images of each class .*, and class \S+ has 1\d\d"):
        learner("dm", path, images_per_class=200)
    with pytest.raises(ConfigError, match="dsa: .* must be without batch norm.* got convnet"):
        learner("dsa", path, model=ModelConfig(widths=(4,)))
    with pytest.raises(ConfigError, match="halves the image 4 times"):
        learner("dc", path, model=ModelConfig(widths=(4, 4, 4, 4), norm="none"))
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 8, 8, 3), np.uint8))
    prepare(PrepareConfig(source=str(tmp_path / "x.npz"), out=tmp_path / "store", size=SIZE))
    with pytest.raises(DataError, match="labels are needed, .* 'train' have none"):
        learner("dm", tmp_path / "store")
    prepare(PrepareConfig(source="digits", out=tmp_path / "few", size=SIZE, limit=8))
    with pytest.raises(DataError, match="1 images of each class .*, and class . has 0"):
        learner("dc", tmp_path / "few")


@pytest.mark.parametrize(
    "method, setting, need",
    [
        ("dm", {"augment": ("flip", "flip")}, "augment must be given once each"),
        ("dsa", {"augment": ()}, "augment must be at least 1 family"),
        ("dm", {"augment": ("blur",)}, "augment.* must be one of color, crop"),
        ("dc", {"updates": 0}, "updates must be at least 1, got 0"),
        ("dc", {"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ("dm", {"images_per_class": 0}, "images_per_class must be at least 1"),
        ("dm", {"lr": 0.0}, "lr must be positive"),
    ],
)
def test_settings_out_of_range(path: Path, method: str, setting: dict[str, Any], need: str) -> None:
    with pytest.raises(ConfigError, match=need):
        learner(method, path, **setting)


def test_a_rate_that_is_too_high_ends_in_one_line(path: Path) -> None:
    learning = learner("dm", path, lr=1e38, model=dataclasses.replace(MODEL, norm="none"))
    with pytest.raises(NonFiniteError, match=r"^dm: step [23]: .*a lower rate than 1e\+38"):
        for _ in range(3):
            learning.advance()


def test_a_run_without_a_target_is_evaluated_where_none_is_needed(
    path: Path, tmp_path: Path
) -> None:
    learner("dm", path).result().save(tmp_path / FILE_NAME)
    write_json(tmp_path / "config.json", {"method": "dm", "store": str(path)})
    settings = {"run": tmp_path, "store": path, "model": MODEL, "device": "cpu"}
    opened = open_materials(EvaluateConfig(**settings, methods=("none", "distilled")))
    assert opened.target is None and len(opened.distilled) == 20
    with pytest.raises(ConfigError, match="does not name the target; pass --target"):
        open_materials(EvaluateConfig(**settings, methods=("random_target", "distilled")))
