"""Settings of trajectory matching: MTT on labels, MKDT on a target's representations."""

from dataclasses import dataclass, field
from pathlib import Path

from krrst_fast.baselines.learner_config import LearnerConfig
from krrst_fast.models.config import ModelConfig
from krrst_fast.runs.config import require, require_at_least, require_positive, settle


def _student() -> ModelConfig:
    return ModelConfig(widths=(128, 128, 128), norm="instance")


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """The networks trained on the real images, whose trajectories are matched, by SGD."""

    count: int = 100
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 256
    seed: int = 0
    """Of the experts alone: runs with other seeds can share them."""

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(1, self, "count", "batch_size")
        require_positive(self, "lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        require_at_least(0, self, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(LearnerConfig):
    """Settings that MTT and MKDT share. An outer step unrolls SGD steps of a student."""

    steps: int = 5000
    lr_images: float = 1000.0
    """The rate of SGD on the images."""
    lr_rate: float
    """The rate of SGD on the logarithm of the student's rate r: as r * r times as much on r itself,
    which is what the released code's rate is of."""
    momentum: float = 0.5
    """Of SGD on everything that is learnt."""
    student_lr: float
    """The student's rate at the start."""
    student_steps: int
    """SGD steps of the student in an outer step (N). The memory grows with them."""
    batch_size: int
    """Synthetic images in a step of the student; 0 takes all. A smaller batch saves memory."""
    expert_epochs: int
    """Epochs of an expert that the student's steps are to match (M)."""
    max_start_epoch: int
    """The student starts at an epoch of an expert that is below it."""
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    expert_folder: Path | None = None
    """Where experts are kept, and found again by other runs; OUT.experts if left out."""
    model: ModelConfig = field(default_factory=_student)
    """The network of students and experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "student_steps", "expert_epochs", "max_start_epoch")
        require_at_least(0, self, "batch_size", "lr_rate")
        require_positive(self, "lr_images", "student_lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        require(not self.model.is_own, self, "model", "a network that is built in")

    @property
    def last_epoch(self) -> int:
        """The last epoch of the experts that is looked at."""
        return self.max_start_epoch - 1 + self.expert_epochs

    @property
    def folder_of_experts(self) -> Path:
        """The folder of the experts of a run."""
        return self.expert_folder or self.out.with_name(f"{self.out.name}.experts")


@dataclass(frozen=True, kw_only=True)
class MTTConfig(TrajectoryConfig):
    """Matching Training Trajectories (Cazenavette et al. 2022, arXiv 2203.11932).

    The defaults are those of the released code (buffer.py, distill.py). Three things differ: there
    is no ZCA; experts are trained for the epochs that are matched and not for 50; and the student's
    rate is learnt as its logarithm, so that it cannot become negative.
    """

    images_per_class: int
    lr_rate: float = 0.1
    student_lr: float = 0.01
    student_steps: int = 20
    batch_size: int = 0
    expert_epochs: int = 3
    max_start_epoch: int = 25
    augment: bool = True
    """Differentiable augmentation (DSA) of what experts and students are trained on, drawn
    for each image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "images_per_class")


@dataclass(frozen=True, kw_only=True)
class MKDTConfig(TrajectoryConfig):
    """Matching Knowledge Distillation Trajectories (Joshi et al. 2024, arXiv 2410.02116).

    Experts and students are trained to give a target's outputs, by mean squared error; labels are
    not looked at. The defaults are those of the released code for CIFAR-100 (buffer.py, distill.py
    and its scripts). Two things differ: experts are trained for the epochs that are matched and not
    for 20, and the student's rate is learnt as its logarithm.
    """

    target: Path
    """A folder made by `krrst target`, or the file in it."""
    num_images: int
    """How many synthetic images (M). The rates of images and targets are published for 1,000; the
    gradient of an image grows as M falls, so lower both rates in proportion."""
    lr_targets: float = 1.0
    """The rate of SGD on the representations of the images; 0 leaves them as they are."""
    lr_rate: float = 0.01
    student_lr: float = 0.1
    student_steps: int = 40
    batch_size: int = 256
    expert_epochs: int = 2
    max_start_epoch: int = 2
    high_loss: bool = True
    """Start with the real images on which the experts are worst; false draws them."""
    experts: ExpertConfig = field(
        default_factory=lambda: ExpertConfig(lr=0.1, momentum=0.9, weight_decay=1e-4)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "num_images")
        require_at_least(0, self, "lr_targets")
