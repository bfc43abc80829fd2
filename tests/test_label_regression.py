"""KIP and FRePo: their objectives by definition, and on images and networks not seen."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast.baselines.frepo import CosineDecay, FRePo, margin_penalty
from krrst_fast.baselines.kip import KIP
from krrst_fast.baselines.label_regression import centred
from krrst_fast.baselines.learn import learn
from krrst_fast.baselines.regression_config import FRePoConfig, KIPConfig
from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.errors import ConfigError, DataError, NonFiniteError
from krrst_fast.evaluate.config import PretrainConfig
from krrst_fast.evaluate.pretrain import pretrain
from krrst_fast.exchange.labels import classes_in, labels_in
from krrst_fast.models import ModelConfig, build
from krrst_fast.reference import kernels
from krrst_fast.reference import krr_mse as krr_mse_by_definition

MODEL = ModelConfig(widths=(8, 16))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(source="digits", out=out, size=8))
    return out


@pytest.fixture
def kip(path: Path, tmp_path: Path) -> KIPConfig:
    return KIPConfig(store=path, out=tmp_path / "run", images_per_class=1, steps=30, batch_size=400)


@pytest.fixture
def frepo(path: Path, tmp_path: Path) -> FRePoConfig:
    return FRePoConfig(
        store=path,
        out=tmp_path / "run",
        images_per_class=1,
        steps=60,
        batch_size=200,
        lr=0.03,
        mirrored=False,
        pool_size=4,
        online_steps=20,
        model=MODEL,
    )


def held_out(store: ImageStore) -> tuple[Tensor, Tensor]:
    index = torch.arange(store.count("test"))
    images = plain_views(store.images("test"), index, store.mean, store.std)
    return images, centred(store.labels("test"), len(store.classes))


def taken(learner: Any, steps: int) -> None:
    for _ in range(steps):
        learner.advance()


@pytest.mark.parametrize("learn_labels", [False, True])
def test_kip_falls_on_images_that_it_has_not_seen(kip: KIPConfig, learn_labels: bool) -> None:
    learner = KIP(replace(kip, learn_labels=learn_labels))
    images, targets = held_out(open_store(kip.store))
    before = learner.error(images, targets).item()
    taken(learner, 30)
    after = learner.error(images, targets).item()
    assert after < 0.7 * before, f"{before} -> {after}"


def test_kip_is_kernel_ridge_regression_of_centred_labels(kip: KIPConfig) -> None:
    learner = KIP(kip)
    images, targets = held_out(open_store(kip.store))
    x, y = learner.images.detach().flatten(1).double(), learner.targets.double()
    real = images.flatten(1).double()
    k, k_real = (kernels.kernel_matrix(f, x, "arccos", 0.0, 1, 0.0) for f in (x, real))
    ridged = k + 1e-6 * k.diagonal().mean() * torch.eye(len(x))
    wanted = (k_real @ torch.linalg.solve(ridged, y) - targets).square().mean()
    assert learner.error(images, targets).item() == pytest.approx(wanted.item(), rel=1e-3)
    assert torch.allclose(targets.sum(1), torch.zeros(len(targets)), atol=1e-6)


def test_frepo_falls_on_images_and_networks_that_it_has_not_seen(frepo: FRePoConfig) -> None:
    learner, store = FRePo(frepo), open_store(frepo.store)
    images, targets = held_out(store)

    def error() -> float:
        total = 0.0
        for seed in (1001, 1002, 1003):
            network = build(MODEL, image_size=8, num_outputs=10, seed=seed).eval()
            with torch.no_grad():
                f_syn, f = network.embed(learner.state.x_syn), network.embed(images)
                loss = krr_mse_by_definition(
                    *(f_syn, learner.state.y_syn, f, targets),
                    ridge=1e-6,
                    ridge_of="mean_diagonal",
                    detach_ridge=True,
                    scale=1.0,
                    bias=1.0,
                )
            total += float(loss) / 3
        return total

    before = error()
    taken(learner, 60)
    after = error()
    assert after < 0.8 * before, f"{before} -> {after}"


def test_frepo_regresses_from_mirror_images_too(frepo: FRePoConfig) -> None:
    config = replace(frepo, mirrored=True, learn_labels=False)
    learner = FRePo(config)
    network = copy.deepcopy(learner.state.pool.slots[0].network)
    for slot in learner.state.pool.slots:
        slot.network.load_state_dict(network.state_dict())
    x, y = learner.state.x_syn.detach().clone(), learner.state.y_syn.detach().clone()
    real, labels = learner._task.source.draw(0, torch.Generator())
    both = torch.cat((x, x.flip(-1)))
    with torch.no_grad():
        wanted = krr_mse_by_definition(
            *(network.embed(both), torch.cat((y, y)), network.embed(real), labels),
            ridge=1e-6,
            ridge_of="mean_diagonal",
            detach_ridge=True,
            scale=1.0,
            bias=1.0,
        )
    assert learner.advance()["loss"] == pytest.approx(float(wanted), rel=1e-3)
    assert torch.equal(learner.state.y_syn, y) and not torch.equal(learner.state.x_syn, x)


def test_networks_of_frepo_begin_at_staggered_ages_and_are_renewed(frepo: FRePoConfig) -> None:
    learner = FRePo(frepo)
    slots = learner.state.pool.slots
    assert [slot.age for slot in slots] == [0, 5, 10, 15]
    assert all(isinstance(slot.optimizer, torch.optim.Adam) for slot in slots)
    taken(learner, 60)
    assert all(slot.age <= 20 for slot in slots) and max(slot.generation for slot in slots) > 0


def test_the_labels_start_centred_and_scaled_and_their_rate_is_in_proportion(
    frepo: FRePoConfig,
) -> None:
    learner = FRePo(frepo)
    first = learner.state.y_syn.detach().clone()
    assert torch.allclose(first, torch.eye(10) - 0.1)  # sqrt(10 / 10) is the scale
    learner.advance()
    moved = (learner.state.y_syn.detach() - first).abs().max().item()
    assert moved == pytest.approx(0.03 * 0.3, rel=1e-3)  # one step of Adam; 0.3 is the size


def test_the_penalty_is_the_margin_of_the_labels() -> None:
    targets = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.2, 0.1, 0.1, 0.3]], requires_grad=True)
    penalty = margin_penalty(targets)
    assert penalty.item() == pytest.approx(-(0.25 + 0.1) / 2 * 2 / 4)
    (gradient,) = torch.autograd.grad(penalty, targets)
    assert torch.equal(gradient[0], torch.zeros(4)) and gradient[1, 3] < 0 < gradient[1, 0]


def test_the_rate_falls_along_a_cosine() -> None:
    rate = CosineDecay(start=2.0, steps=10)
    assert [rate(step) for step in (0, 5, 10, 11)] == pytest.approx([2.0, 1.1, 0.2, 0.2])


@pytest.mark.parametrize("method", ["kip", "frepo"])
def test_a_short_run_makes_a_set_of_labels_that_a_network_learns(
    method: str, kip: KIPConfig, frepo: FRePoConfig, path: Path
) -> None:
    made = (
        learn(kip, KIP, progress=False) if method == "kip" else learn(frepo, FRePo, progress=False)
    )
    assert made.images.shape == (10, 3, 8, 8) and made.targets.shape == (10, 10)
    assert torch.equal(made.targets.argmax(1), torch.arange(10))
    names = classes_in(made.meta)
    assert names == tuple(open_store(path).classes)
    kind = labels_in(made.targets, made.meta).kind
    assert kind == ("class" if method == "kip" else "soft")

    network, steps = build(MODEL, image_size=8, num_outputs=10, seed=7), PretrainConfig(steps=60)
    pretrain(network, made.images, made.targets, steps, seed=0)
    store = open_store(path)
    images, _ = held_out(store)
    with torch.no_grad():
        right = network(images).argmax(1) == store.labels("test")
    assert right.float().mean() > 0.4  # 0.1 by chance


def test_bad_input_is_refused(kip: KIPConfig, frepo: FRePoConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="999 images of each class are needed"):
        KIP(replace(kip, images_per_class=999))
    with pytest.raises(ConfigError, match="too small|at least"):
        FRePo(replace(frepo, model=ModelConfig(widths=(4,) * 5)))
    for change in ({"lr": 0.0}, {"ridge": -1.0}, {"steps": 0}, {"online_steps": 1}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            replace(frepo, **change)


def test_a_step_that_fails_names_the_method(kip: KIPConfig, frepo: FRePoConfig) -> None:
    learners: list[tuple[Any, Callable[[Any], Tensor]]] = [
        (KIP(kip), lambda learner: learner.images),
        (FRePo(frepo), lambda learner: learner.state.x_syn),
    ]
    for learner, images_of in learners:
        with torch.no_grad():
            images_of(learner).fill_(math.nan)
        with pytest.raises(NonFiniteError, match=f"^{learner.method}: "):
            learner.advance()
