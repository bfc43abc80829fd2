"""Settings of an evaluation. The defaults are the paper's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from krrst_fast.data.config import ViewConfig
from krrst_fast.models.config import ModelConfig
from krrst_fast.ops.solver import Solver
from krrst_fast.runs.config import require, require_at_least, require_positive, settle

Method = Literal[
    "none",
    "random_labels",
    "random_target",
    "random_early",
    "kmeans",
    "herding",
    "k_centre",
    "distilled",
    "target",
]
METHODS: tuple[Method, ...] = get_args(Method)
USUAL: tuple[Method, ...] = ("none", "random_labels", "random_target", "distilled", "target")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-training of a fresh network on a few images: SGD at a constant rate, no augmentation."""

    steps: int = 4000
    """SGD steps, not epochs: the paper's 1000 epochs of 1000 images in batches of 256."""
    batch_size: int = 256
    """At most: a set of fewer images is one batch."""
    lr: float = 0.1
    """At most: a rate that the head cannot bear is lowered, for all methods by the same rule."""
    momentum: float = 0.9
    weight_decay: float = 1e-3
    label_lr: float = 0.01
    """Rate of the cross-entropy rival, which the paper trains with other settings than the rest."""
    label_weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(1, self, "steps", "batch_size")
        require_positive(self, "lr", "label_lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        require_at_least(0, self, "weight_decay", "label_weight_decay")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A linear classifier on frozen features."""

    solver: Literal["sgd", "ridge"] = "sgd"
    """"sgd": cross-entropy on the raw features as in the paper (momentum 0.9, no weight decay,
    cosine decay). "ridge": regression to one-hot labels in closed form, for when labels are few."""
    labels_per_class: int | None = None
    """Labelled images of each class, drawn anew for each seed; None takes the whole train split."""
    label_draws: int = 1
    """Draws of few labels in each seed, whose accuracies are averaged: the luck of one draw is most
    of the spread when labels are few, and needs no further pre-training to average out."""
    steps: int = 5000
    batch_size: int = 512
    lr: float = 0.2
    ridge: float = 0.1
    """Of the ridge solver only: multiple of the mean diagonal of the centred gram. Accuracy is flat
    from 0.01 to 0.1 with two labels a class as with all; leave-one-out on so few picks badly."""

    def __post_init__(self) -> None:
        settle(self)
        enough = self.labels_per_class is None or self.labels_per_class >= 1
        require(enough, self, "labels_per_class", "at least 1, or none for all")
        draws = self.label_draws == 1 if self.labels_per_class is None else self.label_draws >= 1
        require(draws, self, "label_draws", "at least 1, and 1 where all labels are taken")
        require_at_least(1, self, "steps", "batch_size")
        require_positive(self, "lr", "ridge")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Training of all weights on the labelled images: SGD with cosine decay, crop and flip."""

    steps: int = 10_000
    """0 leaves fine-tuning out."""
    batch_size: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    labels_per_class: int | None = None
    """As in the probe: None takes the whole train split."""
    views: ViewConfig = ViewConfig()

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(0, self, "steps", "weight_decay")
        require_at_least(1, self, "batch_size")
        require_positive(self, "lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        enough = self.labels_per_class is None or self.labels_per_class >= 1
        require(enough, self, "labels_per_class", "at least 1, or none for all")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation: the sets to pre-train on, the labelled store, the training."""

    run: Path
    """A distillation run, or a distilled set alone; results go to its folder `evaluation/`. The
    name of a shipped set, digits-30, will do; its results go to `evaluation/` where you are."""
    store: Path
    """The labelled images the networks are tested on."""
    source: Path | None = None
    """The images the random subsets are drawn from; None reads the run's config.json."""
    target: Path | None = None
    """The target network; None reads the run's config.json."""
    name: str | None = None
    """Of the result, `evaluation/NAME.json`; None takes the name of the store."""
    methods: tuple[Method, ...] = USUAL
    """How networks are pre-trained: not at all; on random real images with labels, or with the
    target's outputs (random_early: for the number of steps, up to pretrain.steps, that is best on
    labelled images held out of the training ones); on real images chosen in the space of these
    outputs by k-means, herding or k-centre; on the distilled set; or the target itself. Left out, a
    source without labels leaves out random_labels."""
    seeds: int = 5
    """Every method runs once for each seed, from the same weights, labels and batch order."""
    first_seed: int = 0
    model: ModelConfig = ModelConfig()
    pretrain: PretrainConfig = PretrainConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    solver: Solver = Solver()
    """How a probe in closed form (`probe.solver` ridge) is computed."""
    device: str = "auto"
    overwrite: bool = False
    """Replace a result of that name that was made with other settings."""

    def __post_init__(self) -> None:
        settle(self)
        known = len(self.methods) > 0 and all(method in METHODS for method in self.methods)
        require(known, self, "methods", f"one or more of {', '.join(METHODS)}")
        twice = len(set(self.methods)) < len(self.methods)
        require(not twice, self, "methods", "given once each")
        require_at_least(1, self, "seeds")
        require_at_least(0, self, "first_seed")
        reference = self.solver.backend == "reference"
        require(not reference, self, "solver", "of another backend than reference")
        plain = self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name)
        require(plain, self, "name", "a file name without a folder")
