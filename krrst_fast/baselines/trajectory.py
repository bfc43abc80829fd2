"""Trajectory matching: MTT on labels, MKDT on the outputs of a target."""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from krrst_fast.baselines.experts import Experts, Lesson
from krrst_fast.baselines.labelled import RealClasses
from krrst_fast.baselines.matching_config import FAMILIES, Family
from krrst_fast.baselines.random_images import random_index
from krrst_fast.baselines.siamese import draw_augmentation
from krrst_fast.baselines.student import Student, distance_ratio
from krrst_fast.baselines.subset import require_enough
from krrst_fast.baselines.trajectory_config import MKDTConfig, MTTConfig
from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import LABELS, ImageStore, checksums, open_store
from krrst_fast.data.verify import Verification
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.distill.step import require_finite
from krrst_fast.errors import NonFiniteError
from krrst_fast.runs.environment import pick_device
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import load_target

STANDSTILL = 1e-2
"""Share of the student's first rate below which its steps are worth nothing."""


class TrajectoryMatching(ABC):
    """Synthetic images on which a student's SGD goes where an expert's epochs went.

    An outer step starts a student at a random early epoch of a random expert, takes some SGD steps
    on the synthetic images, and moves the images, what they are trained on where that is learnt,
    and the student's rate so that the student comes nearer to the parameters that the expert had
    some epochs later. All draws are functions of the seed and the step.

    The graph of all the student's steps is in memory at once: ConvNet 128-128-128 at 32 px takes
    4 MB for each image of each step (measured), so 0.8 GB for 20 steps on 10 images, and 40 GB for
    40 steps on 256. Fewer `student_steps` and a smaller `batch_size` take less in proportion.

    Args:
        config: The settings.
        method: What the set says that it was made by.
        experts: Trained.
        student: Of the experts' architecture.
        lesson: What the experts are trained on.
        images: The first images [M, C, H, W], normalised.
        targets: Their labels [M], or representations [M, P].

    Attributes:
        step: The outer steps done.
        images: [M, C, H, W], normalised, a leaf.
        targets: Labels [M], or representations [M, P], a leaf where they are learnt.
        log_rate: The logarithm of the student's rate, a leaf.
    """

    def __init__(
        self,
        config: MTTConfig | MKDTConfig,
        *,
        method: str,
        experts: Experts,
        student: Student,
        lesson: Lesson,
        images: Tensor,
        targets: Tensor,
    ) -> None:
        self.config, self.method, self.step = config, method, 0
        self.experts, self._student, self._lesson = experts, student, lesson
        device = student.device
        self.images = images.detach().to(device, copy=True).requires_grad_()
        self.targets = targets.detach().to(device, copy=True)
        self.log_rate = torch.tensor(math.log(config.student_lr), device=device).requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [self.images], "lr": config.lr_images},
            {"params": [self.log_rate], "lr": config.lr_rate},
        ]
        if isinstance(config, MKDTConfig) and config.lr_targets > 0:
            groups.append({"params": [self.targets.requires_grad_()], "lr": config.lr_targets})
        self._optimizer = torch.optim.SGD(groups, momentum=config.momentum)
        self._warned = False

    @property
    def student_lr(self) -> float:
        """Return the student's rate as it is now."""
        return math.exp(float(self.log_rate.detach()))

    def matching_loss(
        self,
        expert: int,
        start_epoch: int,
        draw: torch.Generator,
        *,
        experts: Experts | None = None,
    ) -> Tensor:
        """Compute the outer loss of one start, differentiable by images, targets and log_rate.

        Args:
            expert: Number of the expert.
            start_epoch: Where the student starts.
            draw: Orders and augments the student's batches.
            experts: Others than those that are matched, to see what the images are worth there.

        Returns:
            `distance_ratio` of the student's end, a scalar.
        """
        of, device = experts or self.experts, self._student.device
        start = of.parameters(expert, start_epoch).to(device)
        end = of.parameters(expert, start_epoch + self.config.expert_epochs).to(device)
        rate, loss = self.log_rate.exp(), self._lesson.loss
        reached = self._student.unroll(start, rate, self._batches(draw), loss)
        return distance_ratio(reached, start, end)

    def _batches(self, draw: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        size = min(self.config.batch_size or count, count)
        order = Epochs(count, int(torch.randint(2**62, (), generator=draw)))
        for step in range(self.config.student_steps):
            index = order.take(step * size, size).to(self.images.device)
            yield self._lesson.augment(self.images[index], draw), self.targets[index]

    def advance(self) -> dict[str, float]:
        """Take one outer step, in place.

        Returns:
            The loss, the student's rate in this step, and the expert and the epoch of its start.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite; nothing has changed.
            CheckpointError: A file of an expert is missing or damaged.
        """
        config = self.config
        draw = generator(config.seed, "trajectory", self.step)
        expert = int(torch.randint(config.experts.count, (), generator=draw))
        start_epoch = int(torch.randint(config.max_start_epoch, (), generator=draw))
        self._optimizer.zero_grad(set_to_none=True)
        rate = self.student_lr
        loss = self.matching_loss(expert, start_epoch, draw)
        loss.backward()
        try:
            require_finite(loss, self.images.grad, self.targets.grad, self.log_rate.grad)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{self.method}: step {self.step + 1}, expert {expert} from epoch {start_epoch} "
                f"on: {error}; lower lr_images or student_lr, which is {rate:.3g} by now"
            ) from None
        self._optimizer.step()
        self.step += 1
        self._warn_of_a_standstill()
        return {
            "loss": float(loss.detach()),
            "student_lr": rate,
            "expert": expert,
            "start_epoch": start_epoch,
        }

    def _warn_of_a_standstill(self) -> None:
        """Warn once if the student hardly moves: its rate fell because its images are no use."""
        if self._warned or self.student_lr > self.config.student_lr * STANDSTILL:
            return
        self._warned = True
        warnings.warn(
            f"{self.method}: at step {self.step} the student's rate has fallen from "
            f"{self.config.student_lr:g} to {self.student_lr:.2g}, so nothing is learnt any more; "
            "start again with a lower lr_rate, or lower rates of the images and targets",
            stacklevel=3,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors: `load_state_dict` goes on from them with the same bits.

        Raises:
            NonFiniteError: What is learnt holds NaN or infinity.
        """
        learnt = {"images": self.images, "targets": self.targets, "log_rate": self.log_rate}
        for name, tensor in learnt.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.method}: {name} holds NaN or infinity at step {self.step}"
                )
        return {
            "step": self.step,
            **{name: tensor.detach() for name, tensor in learnt.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        with torch.no_grad():
            self.images.copy_(state["images"])
            self.targets.copy_(state["targets"])
            self.log_rate.copy_(state["log_rate"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))

    def result(self) -> DistilledSet:
        """Return the set as it is, with the student's rate as `learning_rate`."""
        # The name under which `krrst import` keeps a rate that another project learnt.
        found = self._as_set()
        return replace(found, meta={**found.meta, "learning_rate": repr(self.student_lr)})

    @abstractmethod
    def _as_set(self) -> DistilledSet:
        """Return images and targets, on the CPU, with the method in the metadata."""


class MTT(TrajectoryMatching):
    """Labelled images, as many of each class; the experts are trained by cross-entropy.

    Args:
        config: The settings.
        progress: Show that of the experts' training.

    Raises:
        DataError: The store cannot be read, is damaged, is not labelled, or a class has too few
            images.
        ConfigError: There is no such device, or the disk has no room for the experts.
        CheckpointError: The experts' folder holds other experts, or is damaged.
    """

    def __init__(self, config: MTTConfig, *, progress: bool = False) -> None:
        device = pick_device(config.device)
        store = open_store(config.store)
        self._real = RealClasses(store, device)
        first = self._real.first_images(
            config.images_per_class, real=True, generator=generator(config.seed, "initial")
        )
        student = _student(config, store, self._real.count, device)
        families = FAMILIES if config.augment else ()
        labels = f"crc32 {checksums(store.path)[LABELS]:08x}"
        lesson = Lesson(
            loss=F.cross_entropy,
            images=_normalised(store, store.mean, store.std, device),
            augment=partial(_augmented, families) if families else None,
            targets=partial(store.labels, "train"),
            count=store.count("train"),
            identity={"labels": labels, **_about(store, store.mean, store.std, families)},
        )
        super().__init__(
            config,
            method="mtt",
            experts=_trained(config, store, student, lesson, progress),
            student=student,
            lesson=lesson,
            images=first,
            targets=self._real.labels_of_set(config.images_per_class),
        )

    def _as_set(self) -> DistilledSet:
        return self._real.as_set(self.images, self.targets, method=self.method)


class MKDT(TrajectoryMatching):
    """Images with representations; the experts are trained to give the target's outputs.

    Args:
        config: The settings.
        progress: Show that of the experts' training.

    Raises:
        DataError: The store cannot be read, is damaged, has too few images, or does not fit the
            target.
        ConfigError: There is no such device, or the disk has no room for the experts.
        CheckpointError: The experts' folder holds other experts, or is damaged; or the target
            cannot be read.
    """

    def __init__(self, config: MKDTConfig, *, progress: bool = False) -> None:
        device = pick_device(config.device)
        store, self._target = open_store(config.store), load_target(config.target).to(device)
        target = self._target
        target.check_store(store)
        require_enough(store, config.num_images)
        student = _student(config, store, target.dim, device)
        everything = torch.arange(store.count("train"))
        lesson = Lesson(
            loss=F.mse_loss,
            images=_normalised(store, target.mean, target.std, device),
            augment=None,
            targets=partial(target.plain, store, everything),
            count=len(everything),
            identity={"target": target.identity(), **_about(store, target.mean, target.std, ())},
        )
        experts = _trained(config, store, student, lesson, progress)
        if config.high_loss:
            losses = experts.losses(progress=progress)
            index = losses.argsort(descending=True, stable=True)[: config.num_images]
        else:
            index = random_index(store, config.num_images, seed=config.seed)
        super().__init__(
            config,
            method="mkdt",
            experts=experts,
            student=student,
            lesson=lesson,
            images=lesson.images(index),
            targets=target.plain(store, index),
        )

    def _as_set(self) -> DistilledSet:
        return DistilledSet(
            images=self.images.detach().cpu().float().clone(),
            targets=self.targets.detach().cpu().float().clone(),
            mean=self._target.mean,
            std=self._target.std,
            meta={"method": self.method},
        )


def _student(
    config: MTTConfig | MKDTConfig, store: ImageStore, num_outputs: int, device: torch.device
) -> Student:
    return Student(
        config.model,
        image_size=store.size,
        num_outputs=num_outputs,
        channels=store.channels,
        device=device,
    )


def _trained(
    config: MTTConfig | MKDTConfig,
    store: ImageStore,
    student: Student,
    lesson: Lesson,
    progress: bool,
) -> Experts:
    folder, epochs = config.folder_of_experts, config.last_epoch
    experts = Experts(folder, config.experts, config.model, student, epochs, lesson)
    experts.check()
    if experts.epochs_left():
        # What a damaged store leads to is not saved.
        Verification(store).finish()
        experts.train(progress=progress)
    return experts


def _normalised(
    store: ImageStore, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Callable[[Tensor], Tensor]:
    pixels = store.images("train").to(device)
    return lambda index: plain_views(pixels, index.to(device), mean, std)


def _augmented(families: Sequence[Family], images: Tensor, draw: torch.Generator) -> Tensor:
    """Transform images by one family of the augmentation, each by parameters of its own."""
    size, count = images.shape[-1], len(images)
    return draw_augmentation(families, draw, size=size, count=count)(images)


def _about(
    store: ImageStore, mean: tuple[float, ...], std: tuple[float, ...], families: tuple[str, ...]
) -> dict[str, str]:
    return {
        "store": store.identity(),
        "normalised by": f"{[*mean]} {[*std]}",
        "augmentation": ", ".join(families) or "none",
    }
