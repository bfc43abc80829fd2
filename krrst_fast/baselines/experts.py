"""Experts: networks trained on the real images, whose parameters are kept after every epoch."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from krrst_fast.baselines.student import Loss, Student
from krrst_fast.baselines.trajectory_config import ExpertConfig
from krrst_fast.errors import CheckpointError, ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.files import read_json, write_json
from krrst_fast.runs.interrupt import Interrupted
from krrst_fast.runs.lock import locked
from krrst_fast.runs.progress import progress_bar
from krrst_fast.runs.seeding import derive, generator
from krrst_fast.runs.tensors import load_state, save_state, save_tensors
from krrst_fast.targets.weights import read_safetensors

FORMAT_VERSION = 1
SETTINGS = "experts.json"
_STATE = "training.pt"
_KEY = "krrst_fast.expert"
CHUNK = 256
_BYTES = 4
"""Of a parameter."""


class Lesson:
    """What experts and students are trained on: images, their targets, and the loss.

    Args:
        loss: (outputs, targets) -> the mean loss that experts and students make smaller.
        images: index [B] -> the plain images of the train split, normalised, on the device.
        augment: (images [B, C, H, W], generator) -> the images, transformed; None for no change.
        targets: Makes the targets of all images of the split when they are needed, [N, P] or
            labels [N], on the CPU.
        count: N.
        identity: What tells all this from another lesson, by name.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        images: Callable[[Tensor], Tensor],
        augment: Callable[[Tensor, torch.Generator], Tensor] | None,
        targets: Callable[[], Tensor],
        count: int,
        identity: Mapping[str, str],
    ) -> None:
        self.loss, self.images, self.count, self.identity = loss, images, count, identity
        self._augment, self._targets = augment, targets

    @cached_property
    def targets(self) -> Tensor:
        """Compute the targets of all images once."""
        return self._targets()

    def augment(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """Transform images [B, C, H, W] at random, differentiably."""
        return images if self._augment is None else self._augment(images, draw)


class Experts:
    """A folder of trajectories: `expert-0000/epoch-0000.safetensors` and so on.

    Each file holds the parameters of one expert after one epoch, [size] float32; epoch 0 is the
    untrained network. `training.pt` beside them is what the next epoch goes on from, so that more
    epochs, and more experts, can be asked for later.

    Args:
        folder: The folder; made by `train` if it is not there.
        config: How they are trained.
        model: Their architecture, and that of the students.
        student: A student of that architecture.
        epochs: The last epoch that is needed.
        lesson: What they are trained on.
    """

    def __init__(
        self,
        folder: Path,
        config: ExpertConfig,
        model: ModelConfig,
        student: Student,
        epochs: int,
        lesson: Lesson,
    ) -> None:
        self.folder, self.config, self.epochs = folder, config, epochs
        self._student, self._lesson = student, lesson
        settings = {k: v for k, v in to_dict(config).items() if k != "count"}
        self._about = {"experts": settings, "model": to_dict(model), **lesson.identity}
        text = json.dumps(self._about, sort_keys=True)
        self._digest = hashlib.sha256(text.encode()).hexdigest()[:16]

    def parameters(self, expert: int, epoch: int) -> Tensor:
        """Read the parameters [size] of an expert after an epoch, on the CPU.

        Raises:
            CheckpointError: The file is missing or damaged, or is of another expert.
        """
        path, name = self._file(expert, epoch), self._name(expert, epoch)
        return self._read(path, name, "parameters", self._student.size)

    def _read(self, path: Path, name: str, key: str, size: int) -> Tensor:
        """Read the vector `key` [size] of a file that is to be of `name`."""
        tensors, metadata = read_safetensors(path)
        if metadata.get(_KEY) != name:
            raise CheckpointError(
                f"{path}: need that of {name}, got {metadata.get(_KEY, 'nothing of experts')}"
            )
        found = tensors.get(key)
        if found is None or found.shape != (size,):
            shape = None if found is None else tuple(found.shape)
            raise CheckpointError(f"{path}: need {size} {key}, got {shape}")
        return found

    def bytes_missing(self) -> int:
        """Return how many bytes the snapshots and states that are not there will take."""
        of_state = 2 if self.config.momentum else 1
        vectors = 0
        for expert in range(self.config.count):
            files = [self._file(expert, epoch) for epoch in range(self.epochs + 1)]
            vectors += sum(not path.exists() for path in files)
            vectors += 0 if self._state(expert).exists() else of_state
        return vectors * self._student.size * _BYTES

    def train(self, *, progress: bool) -> None:
        """Train the experts that are missing, and the epochs that those that are there lack.

        Killed and called again, it gives the same bits as one that was not interrupted.

        Args:
            progress: Say what is needed on the disk and show a bar, on standard error.

        Raises:
            CheckpointError: The folder holds experts with other settings or of other images, or a
                file in it is damaged.
            ConfigError: The disk has not enough room, or another process writes the folder.
            NonFiniteError: An expert diverged.
            Interrupted: A signal came; the epochs that are done are saved.
        """
        self.check()
        left = self.epochs_left()
        if not left:
            return
        self._require_room(progress)
        self.folder.mkdir(parents=True, exist_ok=True)
        bar = progress_bar(progress, total=left, desc="experts", unit="epoch")
        with locked(self.folder), bar:
            self.check()  # again, as another process may have begun others meanwhile
            write_json(
                self.folder / SETTINGS,
                {"format_version": FORMAT_VERSION, **self._about},
                sealed=True,
            )
            for expert in range(self.config.count):
                try:
                    self._train_one(expert, bar.update)
                except Interrupted as error:
                    raise Interrupted(
                        error.signum, f"while expert {expert} was trained; its epochs are saved"
                    ) from None

    def _train_one(self, expert: int, tick: Callable[[], object]) -> None:
        if not self._epochs_left(expert):
            return
        seed, device = derive(self.config.seed, "expert", expert), self._student.device
        state = self._saved_state(expert)
        first = self._student.fresh(seed) if state is None else state["parameters"]
        vector = first.to(device, copy=True).requires_grad_()
        optimizer = torch.optim.SGD(
            [vector],
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        done = 0
        if state is None:
            (self.folder / f"expert-{expert:04}").mkdir(exist_ok=True)
            self._save(expert, 0, vector)
        else:
            done = state["epoch"]
            optimizer.load_state_dict(state["optimizer"])
        count = self._lesson.count
        order = Epochs(count, seed, "expert")
        for epoch in range(done, self.epochs):
            draw = generator(seed, "expert views", epoch)
            for index in order.take(epoch * count, count).split(self.config.batch_size):
                images = self._lesson.augment(self._lesson.images(index), draw)
                outputs = self._student(vector, images)
                loss = self._lesson.loss(outputs, self._lesson.targets[index].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if not torch.isfinite(vector).all():
                raise NonFiniteError(
                    f"experts: the parameters of expert {expert} hold NaN or infinity after epoch "
                    f"{epoch + 1}; lower its rate, experts.lr, which is {self.config.lr:g}"
                )
            self._save(expert, epoch + 1, vector)
            # After the epoch's file: a kill between the two trains that epoch again.
            saved = {
                "of": self._name(expert, epoch + 1),
                "epoch": epoch + 1,
                "parameters": vector.detach().cpu(),
                "optimizer": optimizer.state_dict(),
            }
            save_state(self._state(expert), saved)
            tick()

    def _save(self, expert: int, epoch: int, vector: Tensor) -> None:
        metadata = {_KEY: self._name(expert, epoch)}
        save_tensors(self._file(expert, epoch), {"parameters": vector}, metadata)

    def _saved_state(self, expert: int) -> dict | None:
        """Return the state that training goes on from; None for a start at epoch 0."""
        path = self._state(expert)
        if not path.exists():
            return None
        state = load_state(path)
        if state.get("of") != self._name(expert, state.get("epoch", 0)):
            raise CheckpointError(
                f"{path}: is not the state of {self._name(expert, state.get('epoch', 0))}"
            )
        whole = all(self._file(expert, epoch).exists() for epoch in range(state["epoch"] + 1))
        return state if whole else None

    def losses(self, *, progress: bool) -> Tensor:
        """Return the squared error of each image, mean over targets and over experts, [N].

        It is that of the last epoch, and is kept in the folder. Targets are to be [N, P].

        Raises:
            CheckpointError: A file is damaged, or of other experts.
        """
        path = self.folder / f"losses-{self.config.count}-{self.epochs}.safetensors"
        name = f"losses of {self.config.count} experts, {self._name(0, self.epochs)}"
        if path.exists():
            return self._read(path, name, "losses", self._lesson.count)
        total = torch.zeros(self._lesson.count)
        everything = torch.arange(self._lesson.count)
        bar = progress_bar(progress, total=self.config.count, desc="losses", unit="expert")
        with bar, torch.no_grad():
            for expert in range(self.config.count):
                vector = self.parameters(expert, self.epochs).to(self._student.device)
                for index in everything.split(CHUNK):
                    outputs = self._student(vector, self._lesson.images(index)).cpu()
                    total[index] += (outputs - self._lesson.targets[index]).square().mean(1)
                bar.update()
        losses = total / self.config.count
        save_tensors(path, {"losses": losses}, {_KEY: name})
        return losses

    def epochs_left(self) -> int:
        """Return how many epochs are still to be trained, of all experts together."""
        return sum(self._epochs_left(expert) for expert in range(self.config.count))

    def _epochs_left(self, expert: int) -> int:
        """Return how many epochs of an expert are to be trained: some, if a file is missing."""
        files = [self._file(expert, epoch).exists() for epoch in range(self.epochs + 1)]
        return 0 if all(files) else min(self.epochs, self.epochs + 1 - files.index(False))

    def check(self) -> None:
        """Raise an error if the folder holds something else than these experts.

        Raises:
            CheckpointError: They have other settings, or are of other images.
            ConfigError: There is no record of experts among the files.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.glob("[!.]*")):
                raise ConfigError(f"{self.folder}: holds files and no {SETTINGS}: no experts")
            return
        found = read_json(path, sealed="record of experts")
        now = {"format_version": FORMAT_VERSION, **self._about}
        names = sorted({*found, *now}) if isinstance(found, dict) else []
        changed = [
            f"{name} was {found.get(name)} and is {now.get(name)}"
            for name in names
            if found.get(name) != now.get(name)
        ]
        if changed or not names:
            raise CheckpointError(
                f"{self.folder}: holds other experts: {'; '.join(changed) or 'no record of them'}; "
                "name another expert_folder"
            )

    def _require_room(self, progress: bool) -> None:
        """Raise ConfigError if the files that are missing do not fit on the disk."""
        need = self.bytes_missing()
        on = next(path for path in (self.folder, *self.folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(on).free
        about = f"{_size(need)} are needed for {self.config.count} x {self.epochs} epochs"
        if need > free:
            raise ConfigError(
                f"experts: {about} in {self.folder}, and {_size(free)} are free; lower "
                "experts.count or max_start_epoch, or name another expert_folder"
            )
        if progress and sys.stderr is not None:
            print(f"experts: {about} in {self.folder}", file=sys.stderr)

    def _file(self, expert: int, epoch: int) -> Path:
        return self.folder / f"expert-{expert:04}" / f"epoch-{epoch:04}.safetensors"

    def _state(self, expert: int) -> Path:
        return self.folder / f"expert-{expert:04}" / _STATE

    def _name(self, expert: int, epoch: int) -> str:
        return f"expert {expert}, epoch {epoch}, settings {self._digest}"


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
