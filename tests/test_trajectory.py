"""MTT and MKDT on digits: their objective falls where it was not trained, and resume is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.experts import Experts
from krrst_fast.baselines.student import Student, distance_ratio
from krrst_fast.baselines.trajectory import MKDT, MTT, TrajectoryMatching
from krrst_fast.baselines.trajectory_config import ExpertConfig, MKDTConfig, MTTConfig
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.exchange.labels import classes_in, labels_in
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.tensors import load_state, save_state
from krrst_fast.targets import FrozenTarget, load_target

MODEL = ModelConfig(widths=(6, 6), norm="instance")
EXPERTS = ExpertConfig(count=2, lr=0.1, batch_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits, a target for them, and experts; tests add no other files."""
    folder = tmp_path_factory.mktemp("trajectory")
    prepare(PrepareConfig(source="digits", out=folder / "digits", size=8, limit=400))
    network = ModelConfig(widths=(8, 16))
    FrozenTarget(
        model=build(network, image_size=8, num_outputs=6, seed=3),
        config=network,
        num_outputs=6,
        mean=(0.3,) * 3,
        std=(0.3,) * 3,
        image_size=8,
    ).save(folder / "target.safetensors")
    return folder


@pytest.fixture
def mtt(folder: Path, tmp_path: Path) -> MTTConfig:
    return MTTConfig(
        store=folder / "digits",
        out=tmp_path / "run",
        images_per_class=1,
        lr_images=20.0,
        student_lr=0.1,
        student_steps=6,
        expert_epochs=1,
        max_start_epoch=2,
        augment=False,
        experts=EXPERTS,
        expert_folder=folder / "mtt",
        model=MODEL,
    )


@pytest.fixture
def mkdt(folder: Path, tmp_path: Path) -> MKDTConfig:
    return MKDTConfig(
        store=folder / "digits",
        target=folder / "target.safetensors",
        out=tmp_path / "run",
        num_images=10,
        lr_images=20.0,
        lr_targets=0.1,
        lr_rate=0.1,
        student_lr=0.05,
        student_steps=6,
        expert_epochs=1,
        max_start_epoch=2,
        high_loss=False,
        experts=EXPERTS,
        expert_folder=folder / "mkdt",
        model=MODEL,
    )


def held_out(learner: TrajectoryMatching, others: Experts) -> float:
    """The mean outer loss on two experts that are not matched."""
    draw = torch.Generator().manual_seed(0)
    starts = [(expert, epoch) for expert in range(2) for epoch in range(2)]
    losses = [learner.matching_loss(*start, draw, experts=others).item() for start in starts]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("method", "steps"), [(MTT, 40), (MKDT, 40)])
def test_the_outer_loss_falls_on_experts_that_are_not_matched(
    method: type, steps: int, folder: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(method.__name__.lower())
    others = replace(
        config,
        experts=replace(EXPERTS, seed=9),
        expert_folder=folder / f"{method.__name__} others",
    )
    held, learner = method(others).experts, method(config)
    real, targets = learner.images.detach().clone(), learner.targets.detach().clone()
    rates = [learner.advance()["student_lr"] for _ in range(steps)]
    learnt = held_out(learner, held)
    assert rates[0] == pytest.approx(config.student_lr) and len(set(rates)) == steps
    assert abs(learner.student_lr / config.student_lr - 1) > 0.05
    # The rival: the real images that the set began as, at whichever rate is best for them.
    with torch.no_grad():
        learner.images.copy_(real)
        learner.targets.copy_(targets)
        rivals = []
        for rate in (0.02, 0.04, 0.08, 0.12, 0.16, 0.24):
            learner.log_rate.fill_(rate).log_()
            rivals.append(held_out(learner, held))
    print(method, learnt, rivals, rates[-1])
    assert learnt < 0.9 * min(rivals)
