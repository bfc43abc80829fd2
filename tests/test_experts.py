"""Experts on disk: exact resume and growth, and what is refused by name."""

import dataclasses
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import krrst_fast.baselines.experts as module
from krrst_fast.baselines.experts import Experts, Lesson
from krrst_fast.baselines.student import Student
from krrst_fast.baselines.trajectory_config import ExpertConfig
from krrst_fast.errors import CheckpointError, ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.interrupt import Interrupted

MODEL = ModelConfig(widths=(3, 4), norm="instance")
CONFIG = ExpertConfig(count=2, lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=8)
Make = Callable[..., Experts]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Experts of 20 random images with representations, by default in tmp_path/experts."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, 4, 4, generator=draw)
    targets = torch.randn(20, 5, generator=draw)

    def experts(
        folder: str = "experts", epochs: int = 3, identity: str = "random", **changes: object
    ) -> Experts:
        student = Student(
            MODEL, image_size=4, num_outputs=5, channels=3, device=torch.device("cpu")
        )
        lesson = Lesson(
            loss=torch.nn.functional.mse_loss,
            images=lambda index: images[index],
            augment=lambda batch, draw: batch + torch.randn(batch.shape, generator=draw),
            targets=lambda: targets,
            count=20,
            identity={"store": identity},
        )
        config = dataclasses.replace(CONFIG, **changes)  # type: ignore[arg-type]
        return Experts(tmp_path / folder, config, MODEL, student, epochs, lesson)

    return experts


class Stop(BaseException):
    """Ends a training at a chosen place, as a kill would."""


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """stop("save_state", 2): the third call of that function of the module raises Stop."""

    def at(name: str, calls: int) -> None:
        real, left = getattr(module, name), iter(range(calls))

        def counted(*args: object, **options: object) -> object:
            if next(left, None) is None:
                monkeypatch.setattr(module, name, real)
                raise Stop
            return real(*args, **options)

        monkeypatch.setattr(module, name, counted)

    yield at


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the files of experts, and the one record."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pt")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("name", "calls"), [("save_tensors", 0), ("save_tensors", 2), ("save_state", 1)]
)
@pytest.mark.parametrize("expert", [0, 1])
def test_a_training_that_was_killed_goes_on_with_the_same_bits(
    make: Make, stop: Callable[[str, int], None], tmp_path: Path, name: str, calls: int, expert: int
) -> None:
    make("whole").train(progress=False)
    # An expert of three epochs writes four files and three states.
    stop(name, calls + expert * (4 if name == "save_tensors" else 3))
    with pytest.raises(Stop):
        make().train(progress=False)
    assert make().epochs_left() > 0
    make().train(progress=False)
    assert make().epochs_left() == 0
    assert contents(tmp_path / "experts") == contents(tmp_path / "whole")
    assert len(contents(tmp_path / "whole")) == 2 * 4 + 1


def test_more_experts_and_epochs_come_on_top_and_the_old_ones_stay(
    make: Make, tmp_path: Path
) -> None:
    make("whole", epochs=4, count=3).train(progress=False)
    make(epochs=1, count=1).train(progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "experts").rglob("epoch-*")}
    more = make(epochs=4, count=3)
    assert more.epochs_left() == 3 + 4 + 4
    more.train(progress=False)
    assert contents(tmp_path / "experts") == contents(tmp_path / "whole")
    assert len(before) == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_steps_are_those_of_torchs_sgd(make: Make) -> None:
    experts = make(epochs=1, batch_size=20)
    experts.train(progress=False)
    vector = experts.parameters(1, 0).requires_grad_()
    lesson, draw = (
        experts._lesson,
        module.generator(module.derive(0, "expert", 1), "expert views", 0),
    )
    order = module.Epochs(20, module.derive(0, "expert", 1), "expert").take(0, 20)
    images = lesson.augment(lesson.images(order), draw)
    lesson.loss(experts._student(vector, images), lesson.targets[order]).backward()
    assert vector.grad is not None
    stepped = vector.detach() - 0.05 * (vector.grad + 1e-3 * vector.detach())
    assert torch.allclose(experts.parameters(1, 1), stepped, rtol=0, atol=1e-7)
    assert not torch.equal(experts.parameters(1, 0), experts.parameters(0, 0))


def test_files_that_are_damaged_missing_or_swapped_are_refused_by_name(
    make: Make, tmp_path: Path
) -> None:
    experts = make()
    experts.train(progress=False)
    first, second, third = (
        tmp_path / "experts" / "expert-0001" / f"epoch-000{epoch}.safetensors"
        for epoch in (1, 2, 3)
    )
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"expert-0001/epoch-0001\.safetensors: .*damaged"):
        experts.parameters(1, 1)
    shutil.copyfile(third, second)
    with pytest.raises(CheckpointError, match=r"epoch-0002.*need that of expert 1, epoch 2"):
        experts.parameters(1, 2)
    third.unlink()
    with pytest.raises(CheckpointError, match=r"epoch-0003\.safetensors: there is no such file"):
        experts.parameters(1, 3)
    # What is missing is trained again; the state says where from.
    make("whole").train(progress=False)
    experts.train(progress=False)
    assert torch.equal(experts.parameters(1, 3), make("whole").parameters(1, 3))
    state = first.with_name("training.pt")
    state.write_bytes(state.read_bytes()[:-9])
    third.unlink()
    with pytest.raises(CheckpointError, match=r"expert-0001/training\.pt"):
        experts.train(progress=False)


def test_experts_of_other_settings_or_images_are_not_mixed(make: Make, tmp_path: Path) -> None:
    make().train(progress=False)
    for changed, told in (
        ({"lr": 0.1}, r"experts was .*'lr': 0\.05.* and is .*'lr': 0\.1.*another expert_folder"),
        ({"identity": "others"}, "store was random and is others"),
    ):
        with pytest.raises(CheckpointError, match=told):
            make(**changed).train(progress=False)
    # Without the record the files still tell.
    (tmp_path / "experts" / "experts.json").unlink()
    with pytest.raises(ConfigError, match=r"holds files and no experts\.json"):
        make(lr=0.1).train(progress=False)
    with pytest.raises(CheckpointError, match="need that of expert 0, epoch 1, settings"):
        make(lr=0.1).parameters(0, 1)


def test_the_room_that_is_needed_is_told_and_compared(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    make("small", count=1, epochs=1).train(progress=True)
    told = f"experts: 0.00365 MB are needed for 1 x 1 epochs in {tmp_path / 'small'}\n"
    assert capsys.readouterr().err == told
    experts = make()
    need = experts.bytes_missing()
    assert need == 2 * (4 + 2) * 4 * experts._student.size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(ConfigError, match="0.0109 MB are needed .* MB are free; lower experts"):
        experts.train(progress=False)
    assert not experts.folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need))
    experts.train(progress=False)
    assert experts.bytes_missing() == 0
    assert make(epochs=4).bytes_missing() == 2 * 4 * experts._student.size


def test_an_expert_that_diverges_is_not_saved(make: Make) -> None:
    experts = make(lr=1e30)
    with pytest.raises(NonFiniteError, match=r"expert 0 hold NaN.*experts\.lr, which is 1e\+30"):
        experts.train(progress=False)
    assert experts.epochs_left() == 6


def test_a_signal_says_what_is_saved(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make()
    real, calls = module.save_state, []

    def interrupted(*args: object) -> None:
        real(*args)  # type: ignore[arg-type]
        calls.append(args)
        if len(calls) == 4:
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(module, "save_state", interrupted)
    told = "^interrupted by SIGTERM while expert 1 was trained; its epochs are saved$"
    with pytest.raises(Interrupted, match=told):
        experts.train(progress=False)
    assert experts.epochs_left() == 2


def test_losses_are_means_over_experts_and_are_kept(make: Make, tmp_path: Path) -> None:
    experts = make()
    experts.train(progress=False)
    found = experts.losses(progress=False)
    lesson, student = experts._lesson, experts._student
    each = []
    for expert in range(2):
        outputs = student(experts.parameters(expert, 3), lesson.images(torch.arange(20)))
        each.append((outputs - lesson.targets).square().mean(1))
    assert torch.allclose(found, torch.stack(each).mean(0), rtol=1e-5)
    (file,) = (tmp_path / "experts").glob("losses*")
    shutil.rmtree(tmp_path / "experts" / "expert-0000")
    assert torch.equal(make().losses(progress=False), found)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"losses-2-3\.safetensors"):
        make().losses(progress=False)
