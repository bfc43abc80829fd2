"""Settings of an evaluation. The defaults are the paper's."""

import re
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
    "random_5x",
    "random_20x",
    "random_100x",
    "distilled",
    "target",
]
METHODS: tuple[Method, ...] = get_args(Method)
OURS: Method = "distilled"
RIVAL: Method = "random_target"
"""The baseline: as many real images, with the same target and the same training."""
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


Labels = int | str
"""How many labelled images: a number of each class, a share of the train split ("5%"), or "all"."""
Measure = Literal["probe", "outputs", "knn"]
_SHARE = re.compile(r"(0|[1-9]\d?)(\.\d*[1-9])?%")


def _is_labels(labels: Labels) -> bool:
    """Return whether it is a whole number from 1, "all", or a share above 0 % and below 100 %."""
    if isinstance(labels, int):
        return labels >= 1
    return labels == "all" or (bool(_SHARE.fullmatch(labels)) and float(labels[:-1]) > 0)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is measured on frozen features, and with how many labels."""

    solver: Literal["sgd", "ridge", "lbfgs"] = "sgd"
    """"sgd": cross-entropy on the raw features as in the paper (momentum 0.9, no weight decay,
    cosine decay). "ridge": regression to one-hot labels in closed form, for when labels are few.
    "lbfgs": logistic regression on standardised features."""
    labels: tuple[Labels, ...] = ("all",)
    """With how many labels: any of a number of each class (5), a share of the train split ("1%",
    the same of each class and at least one image), and "all". Each is a column of the table. Few
    are drawn anew for each seed; every pre-trained network is measured with all of them."""
    label_draws: int = 1
    """Draws of few labels in each seed, whose accuracies are averaged: the luck of one draw is most
    of the spread when labels are few, and needs no further pre-training to average out."""
    measures: tuple[Measure, ...] = ("probe", "outputs")
    """"probe": a linear classifier on features. "outputs": one on the network's outputs, where they
    stand for the target's. "knn": the 20 nearest neighbours of the features, weighted."""
    steps: int = 5000
    batch_size: int = 512
    lr: float = 0.2
    ridge: float = 0.1
    """Of the ridge solver only: multiple of the mean diagonal of the centred gram. Accuracy is flat
    from 0.01 to 0.1 with two labels a class as with all; leave-one-out on so few picks badly."""
    penalty: float = 1.0
    """Of lbfgs only: weight of half the squared norm of the weights beside the summed cross-entropy
    (scikit-learn's 1 / C)."""

    def __post_init__(self) -> None:
        settle(self)
        known = len(self.labels) > 0 and all(map(_is_labels, self.labels))
        require(known, self, "labels", "one or more of a number from 1, a share as '1%', or 'all'")
        for field in ("labels", "measures"):
            values = getattr(self, field)
            require(0 < len(values) == len(set(values)), self, field, "given once each")
        draws = self.label_draws == 1 if self.labels == ("all",) else self.label_draws >= 1
        require(draws, self, "label_draws", "at least 1, and 1 where all labels are taken")
        require_at_least(1, self, "steps", "batch_size")
        require_positive(self, "lr", "ridge", "penalty")

    def draws(self, labels: Labels) -> int:
        """Return how often so many labels are drawn."""
        return 1 if labels == "all" else self.label_draws


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Training of all weights on the labelled images: SGD with cosine decay, crop and flip."""

    steps: int = 10_000
    """0 leaves fine-tuning out."""
    batch_size: int = 256
    lr: float | tuple[float, ...] = 0.01
    """One rate, or several (0.003,0.01,0.03,0.1) of which each method and seed takes the one that
    is best on labelled training images that fine-tuning does not use."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    labels_per_class: int | None = None
    """How many labelled images of each class; None takes the whole train split."""
    label_draws: int = 1
    """Draws of few labels in each seed, whose accuracies are averaged, as in the probe; each is a
    fine-tuning of its own."""
    views: ViewConfig = ViewConfig()

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(0, self, "steps", "weight_decay")
        require_at_least(1, self, "batch_size")
        rates = self.rates
        if len(rates) == 1:  # the command line reads a list of one, which is the same setting
            object.__setattr__(self, "lr", rates[0])
        positive = all(rate > 0 for rate in rates) and 0 < len(rates) == len(set(rates))
        require(positive, self, "lr", "positive, one rate or several different ones")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        few = self.labels_per_class
        require(few is None or few >= 1, self, "labels_per_class", "at least 1, or none for all")
        draws = self.label_draws == 1 if few is None else self.label_draws >= 1
        require(draws, self, "label_draws", "at least 1, and 1 where all labels are taken")

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates, one or several."""
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)


@dataclass(frozen=True, kw_only=True)
class KDConfig:
    """Knowledge distillation without the labelled images: a student sees only its method's images.

    A teacher is trained on the labelled images. The student, pre-trained by its method, learns the
    teacher's outputs on augmented images of that method; without pre-training, on noise.
    """

    steps: int = 0
    """AdamW steps of a student; 0 leaves it out. The paper's 1000 epochs of 1000 images in batches
    of 512 are 2000."""
    batch_size: int = 512
    lr: float = 1e-4
    noise_lr: float = 1e-3
    """Rate of the student that learns on noise; both decay to 0 by a cosine."""
    teacher: ModelConfig = ModelConfig(kind="resnet18")
    teacher_steps: int = 10_000
    """SGD steps of the teacher; batch size, momentum, weight decay and views are fine-tuning's."""
    teacher_lr: float = 0.1

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(0, self, "steps")
        require_at_least(1, self, "batch_size", "teacher_steps")
        require_positive(self, "lr", "noise_lr", "teacher_lr")


@dataclass(frozen=True, kw_only=True)
class Common:
    """What an evaluation and a suite of them have in common."""

    run: Path | tuple[Path, ...]
    """A distillation run, or a distilled set alone, or several of one size: seed s takes number s
    modulo their number, so that the standard errors include the luck of the distillation. Results
    go to the folder `evaluation/` of the first. The name of a shipped set, digits-30, will do; its
    results go to `evaluation/` where you are."""
    source: Path | None = None
    """The images the random subsets are drawn from; None reads the run's config.json."""
    target: Path | None = None
    """The target network; None reads the run's config.json."""
    methods: tuple[Method, ...] = USUAL
    """How networks are pre-trained: not at all; on random real images with labels, or with the
    target's outputs (random_early: for the number of steps, up to pretrain.steps, that is best on
    labelled images held out of the training ones; random_5x, random_20x and random_100x: on so many
    times as many images, as a ceiling); on real images chosen in the space of these outputs by
    k-means, herding or k-centre; on the distilled set; or the target itself. Left out, a source
    without labels leaves out random_labels."""
    rivals: tuple[str, ...] = ()
    """Other sets to pre-train on: runs, folders of `krrst baseline` or of `krrst import`, or files,
    each as NAME=PATH, or PATH for its own name. Several of one name take turns, as runs do."""
    seeds: int = 5
    """Every method runs once for each seed, from the same weights, labels and batch order."""
    first_seed: int = 0
    pretrain: PretrainConfig = PretrainConfig()
    probe: ProbeConfig = ProbeConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    kd: KDConfig = KDConfig()
    solver: Solver = Solver()
    """How a probe in closed form (`probe.solver` ridge) is computed."""
    device: str = "auto"
    workers: int = 1
    """Processes that compute rows side by side, each with a share of the cores: for small networks
    two processes of one thread are faster than one of two. A row has the bits of its threads."""
    overwrite: bool = False
    """Replace a result of that name that was made with other settings."""

    def __post_init__(self) -> None:
        settle(self)
        known = len(self.methods) > 0 and all(method in METHODS for method in self.methods)
        require(known, self, "methods", f"one or more of {', '.join(METHODS)}")
        twice = len(set(self.methods)) < len(self.methods)
        require(not twice, self, "methods", "given once each")
        require(len(self.runs) > 0, self, "run", "a run or several")
        taken = sorted(self.rival_paths.keys() & set(METHODS))
        require(not taken, self, "rivals", "of other names than those of the methods")
        require("" not in self.rival_paths, self, "rivals", "PATH or NAME=PATH")
        require_at_least(1, self, "seeds", "workers")
        require_at_least(0, self, "first_seed")
        reference = self.solver.backend == "reference"
        require(not reference, self, "solver", "of another backend than reference")

    @property
    def runs(self) -> tuple[Path, ...]:
        """The distillation runs, one or several."""
        return self.run if isinstance(self.run, tuple) else (self.run,)

    @property
    def rival_paths(self) -> dict[str, tuple[Path, ...]]:
        """Return the sets of each rival by its name, in the order they were given.

        Raises:
            ConfigError: Two rivals have the same name by chance.
        """
        found: dict[str, tuple[Path, ...]] = {}
        for text in self.rivals:
            name, equals, path = text.partition("=")
            if not equals or Path(text).exists():
                name, path = Path(text).resolve().name, text
                alone = name not in found
                require(alone, self, "rivals", f"told apart: NAME=PATH for each {name}")
            found[name if path else ""] = (*found.get(name, ()), Path(path))
        return found

    @property
    def folder(self) -> Path:
        """Where results go."""
        first = self.runs[0]
        return (first if first.is_dir() else first.parent) / "evaluation"

    @property
    def names(self) -> tuple[str, ...]:
        """The methods and then the rivals, by name."""
        return (*self.methods, *self.rival_paths)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Common):
    """Settings of an evaluation: the sets to pre-train on, the labelled store, the training."""

    store: Path
    """The labelled images the networks are tested on."""
    name: str | None = None
    """Of the result, `evaluation/NAME.json`; None takes the name of the store."""
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = self.name is None or (self.name not in ("", ".", "..") and "/" not in self.name)
        require(plain, self, "name", "a file name without a folder")
