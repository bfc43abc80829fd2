"""MTT and MKDT on digits: their objective falls where it was not trained, and resume is exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.experts import Experts
from krrst_fast.baselines.student import Loss, Student, distance_ratio
from krrst_fast.baselines.trajectory import MKDT, MTT, TrajectoryMatching
from krrst_fast.baselines.trajectory_config import ExpertConfig, MKDTConfig, MTTConfig
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.exchange.labels import classes_in, labels_in
from krrst_fast.models import ModelConfig, build
from krrst_fast.models.config import Norm
from krrst_fast.runs.tensors import load_state, save_state
from krrst_fast.targets import FrozenTarget, load_target
from krrst_fast.targets.standardize import standardize_head

MODEL = ModelConfig(widths=(6, 6), norm="instance")
EXPERTS = ExpertConfig(count=3, lr=0.1, batch_size=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of digits, a target for them, and experts; tests add no other files."""
    folder = tmp_path_factory.mktemp("trajectory")
    prepare(PrepareConfig(source="digits", out=folder / "digits", size=8, limit=400))
    network, store = ModelConfig(widths=(8, 16)), open_store(folder / "digits")
    target = FrozenTarget(
        model=build(network, image_size=8, num_outputs=6, seed=3),
        config=network,
        num_outputs=6,
        mean=(0.3,) * 3,
        std=(0.3,) * 3,
        image_size=8,
    )
    standardize_head(target.model.fc, target.plain(store, torch.arange(400)))
    target.save(folder / "target.safetensors")
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
        lr_images=10.0,
        lr_targets=0.5,
        lr_rate=0.03,
        student_lr=0.1,
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
    with torch.no_grad():
        losses = [float(learner.matching_loss(*start, draw, experts=others)) for start in starts]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("method", [MTT, MKDT])
def test_the_outer_loss_falls_on_experts_that_are_not_matched(
    method: type, folder: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(method.__name__.lower())
    others = replace(
        config,
        experts=replace(EXPERTS, seed=9),
        expert_folder=folder / f"{method.__name__} others",
    )
    held, learner = method(others).experts, method(config)
    real, targets = learner.images.detach().clone(), learner.targets.detach().clone()
    rates = [learner.advance()["student_lr"] for _ in range(25)]
    learnt = held_out(learner, held)
    assert rates[0] == pytest.approx(config.student_lr) and len(set(rates)) == 25
    assert abs(learner.student_lr / config.student_lr - 1) > 0.05
    # The rival: the real images that the set began as, at whichever rate is best for them.
    with torch.no_grad():
        learner.images.copy_(real)
        learner.targets.copy_(targets)
        rivals = []
        for rate in (0.02, 0.04, 0.08, 0.12, 0.16, 0.24):
            learner.log_rate.fill_(rate).log_()
            rivals.append(held_out(learner, held))
    assert learnt < 0.9 * min(rivals)


@pytest.mark.parametrize("loss", [functional.mse_loss, functional.cross_entropy])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_the_gradient_through_the_steps_is_that_of_finite_differences(
    loss: Loss, norm: Norm
) -> None:
    model = ModelConfig(widths=(3,), norm=norm)
    student = Student(model, image_size=4, num_outputs=2, channels=1, device=torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    start, end = student.fresh(0).double(), student.fresh(1).double()
    images = torch.randn(3, 1, 4, 4, generator=draw, dtype=torch.float64).requires_grad_()
    # Cross-entropy takes probabilities too, by which it is as differentiable.
    targets = torch.rand(3, 2, generator=draw, dtype=torch.float64).requires_grad_()
    log_rate = torch.tensor(-2.0, dtype=torch.float64).requires_grad_()

    def outer(images: Tensor, targets: Tensor, log_rate: Tensor) -> Tensor:
        batches = [(images[:2], targets[:2]), (images[1:], targets[1:]), (images, targets)]
        reached = student.unroll(start, log_rate.exp(), batches, loss)
        return distance_ratio(reached, start, end)

    assert torch.autograd.gradcheck(outer, (images, targets, log_rate), eps=1e-6, atol=1e-7)
    with torch.no_grad():
        without = outer(images, targets, log_rate)
    assert not without.requires_grad and torch.equal(without, outer(images, targets, log_rate))


def test_a_student_takes_the_steps_of_torchs_sgd() -> None:
    model = ModelConfig(widths=(3, 4), norm="batch")
    student = Student(model, image_size=8, num_outputs=2, channels=3, device=torch.device("cpu"))
    net = build(model, image_size=8, num_outputs=2, seed=5)
    draw = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, 8, 8, generator=draw), torch.randn(4, 2, generator=draw)) for _ in "123"
    ]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for images, targets in batches:
        optimizer.zero_grad()
        functional.mse_loss(net(images), targets).backward()
        optimizer.step()
    expected = torch.nn.utils.parameters_to_vector(net.parameters())
    got = student.unroll(student.fresh(5), torch.tensor(0.1), batches, functional.mse_loss)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [MTT, MKDT])
def test_a_learner_that_is_taken_up_gives_the_same_bits(
    method: type, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(method.__name__.lower())
    if method is MTT:
        config = replace(config, augment=True, batch_size=7, expert_folder=tmp_path / "augmented")
    whole, first, second = method(config), method(config), method(config)
    rows = [whole.advance() for _ in range(4)]
    assert [first.advance() for _ in range(2)] == rows[:2]
    save_state(tmp_path / "state.pt", first.state_dict())
    first.advance()
    second.load_state_dict(load_state(tmp_path / "state.pt"))
    assert [second.advance() for _ in range(2)] == rows[2:] and second.step == 4
    for got, expected in zip(result_of(second), result_of(whole)):
        assert torch.equal(got, expected)
    assert second.result().meta == whole.result().meta
    assert not torch.equal(whole.images, method(config).images)


def result_of(learner: TrajectoryMatching) -> tuple[Tensor, Tensor, Tensor]:
    made = learner.result()
    return made.images, made.targets, learner.log_rate.detach().clone()


def test_mtt_begins_with_real_images_and_makes_a_set_of_labels(mtt: MTTConfig) -> None:
    learner = MTT(replace(mtt, images_per_class=2))
    store, made = open_store(mtt.store), learner.result()
    assert made.meta["method"] == "mtt" and float(made.meta["learning_rate"]) == pytest.approx(0.1)
    assert classes_in(made.meta) == store.classes
    labels = labels_in(made.targets, made.meta)
    assert labels.kind == "class" and labels.values.tolist() == [i // 2 for i in range(20)]
    real = {
        (pixels.numpy().tobytes(), label)
        for pixels, label in zip(store.images(), store.labels("train").tolist())
    }
    pixels = made.pixels().permute(0, 3, 1, 2).contiguous()
    chosen = {(x.numpy().tobytes(), label) for x, label in zip(pixels, labels.values.tolist())}
    assert len(chosen) == 20 and chosen <= real


def test_mkdt_begins_with_the_images_on_which_the_experts_are_worst(mkdt: MKDTConfig) -> None:
    learner = MKDT(replace(mkdt, high_loss=True))
    store, target, made = open_store(mkdt.store), load_target(mkdt.target), learner.result()
    everything = plain_views(store.images(), torch.arange(400), target.mean, target.std)
    losses = learner.experts.losses(progress=False)
    worst = everything[losses.topk(10).indices]
    assert torch.allclose(made.images, worst) and made.meta["method"] == "mkdt"
    assert torch.allclose(made.targets, target(worst), atol=1e-5)
    assert labels_in(made.targets, made.meta).kind == "representation"
    assert made.mean == target.mean and made.std == target.std
    drawn = MKDT(mkdt).result()
    assert not torch.equal(drawn.images, made.images)
    assert torch.allclose(drawn.targets, target(drawn.images), atol=1e-5)


def test_representations_stay_where_their_rate_is_zero(mkdt: MKDTConfig) -> None:
    learner = MKDT(replace(mkdt, lr_targets=0.0))
    before = result_of(learner)
    learner.advance()
    for was, now, moves in zip(before, result_of(learner), (True, False, True)):
        assert torch.equal(was, now) != moves


def test_a_set_that_teaches_nothing_is_told_and_one_that_diverges_is_refused(
    mkdt: MKDTConfig,
) -> None:
    learner = MKDT(replace(mkdt, lr_rate=1e-9))
    with torch.no_grad():
        learner.log_rate -= 5
    with pytest.warns(UserWarning, match="mkdt: at step 1 the student's rate has fallen from 0.1 "):
        learner.advance()
    learner.advance()  # and no more: warnings are errors here
    before = result_of(learner)
    with torch.no_grad():
        learner.log_rate.fill_(30.0)
    with pytest.raises(NonFiniteError, match=r"mkdt: step 3, expert . .*lower lr_images or stu"):
        learner.advance()
    assert learner.step == 2 and torch.equal(learner.images, before[0])
    with torch.no_grad():
        learner.images[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="mkdt: images holds NaN or infinity at step 2"):
        learner.state_dict()


def test_what_does_not_fit_is_refused_before_any_expert_is_trained(
    mtt: MTTConfig, mkdt: MKDTConfig, tmp_path: Path
) -> None:
    experts = tmp_path / "none"
    with pytest.raises(DataError, match="401 real images were asked for"):
        MKDT(replace(mkdt, num_images=401, expert_folder=experts))
    with pytest.raises(DataError, match="100 images of each class are needed"):
        MTT(replace(mtt, images_per_class=100, expert_folder=experts))
    with pytest.raises(ConfigError, match="needs at least 16 pixels, got image_size 8"):
        MTT(replace(mtt, model=ModelConfig(widths=(4,) * 4), expert_folder=experts))
    assert not experts.exists()
    with pytest.raises(CheckpointError, match="holds other experts: .*; target was None and"):
        MKDT(replace(mkdt, experts=EXPERTS, expert_folder=mtt.expert_folder))
    own = ModelConfig(kind="networks.py:Net")
    for wrong, told in (
        ({"model": own}, "MTTConfig: model must be a network that is built in"),
        ({"student_steps": 0}, "MTTConfig: student_steps must be at least 1"),
        ({"lr_images": 0}, "MTTConfig: lr_images must be positive"),
        ({"momentum": 1}, r"MTTConfig: momentum must be in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=told):
            replace(mtt, **wrong)
    with pytest.raises(ConfigError, match="ExpertConfig: count must be at least 1"):
        ExpertConfig(count=0)


def test_an_expert_file_that_is_damaged_ends_the_step_by_name(
    mtt: MTTConfig, tmp_path: Path
) -> None:
    learner = MTT(replace(mtt, expert_folder=tmp_path / "experts"))
    for file in (tmp_path / "experts").glob("*/epoch-0001.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"epoch-0001\.safetensors: .*checksum is wrong"):
        learner.advance()
    assert learner.step == 0
