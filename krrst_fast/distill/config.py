"""Every setting of a distillation. The defaults are the paper's for CIFAR-100."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from krrst_fast.data.config import ViewConfig
from krrst_fast.models.config import ModelConfig
from krrst_fast.ops.solver import RidgeOf, Solver
from krrst_fast.runs.config import require, require_at_least, require_positive, settle
from krrst_fast.runs.sinks import SinkName


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The pool of networks that give features to the outer loss, and their training."""

    size: int = 10
    """How many networks are alive at once."""
    online_steps: int = 1000
    """SGD steps a network gets before a fresh one takes its slot (the paper's T)."""
    lr: float = 0.1
    """Of the SGD steps. It is halved, with a warning, when a network diverges. If `size` of them
    have had all their steps since one did, it stays, and another network takes the place."""
    momentum: float = 0.9
    weight_decay: float = 1e-3
    reset: Literal["paper", "released"] = "paper"
    """"paper": a fresh network is trained like the one before it. "released": once a slot has been
    renewed it is renewed at every visit, so nearly all outer steps see an untrained network."""
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(1, self, "size")
        require_at_least(2, self, "online_steps")
        require_positive(self, "lr")
        require(0 <= self.momentum < 1, self, "momentum", "in [0, 1)")
        require_at_least(0, self, "weight_decay")


FREE_SETTINGS = (
    "store",
    "target",
    "out",
    "device",
    "tf32",
    "target_cache_place",
    "cuda_graph",
    "checkpoint_every",
    "checkpoint_minutes",
    "log_every",
    "sinks",
)
"""Settings that may change in the middle of a run: they say where and how often, not what.

`device` and `tf32` change bits all the same: what they come to is part of the environment, of which
a run keeps all that it had, with a warning. The images and the target themselves may not change:
the identities of both are compared.
"""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """One distillation: from a store and a target to a run folder."""

    store: Path
    """A folder made by `krrst prepare`; its train split is distilled, labels are not looked at."""
    target: Path
    """A folder made by `krrst target`, or the file in it."""
    out: Path
    """The run folder."""
    num_images: int
    """How many synthetic images (M)."""
    steps: int = 160_000
    batch_size: int = 1024
    """Real images in an outer step (B). May be larger than the store: batches run through the
    shuffled store again and again, so such a batch holds an image more than once."""
    lr: float = 1e-4
    """The rate of AdamW on the images and the targets; it decays linearly. With 0 the images stay
    those that the run starts with, and no gradient to them is computed."""
    lr_targets: float | None = None
    """The rate of AdamW on the targets, where it is another than `lr`. With 0 they stay as they
    are."""
    final_lr_fraction: float = 1e-3
    """What is left of both rates at the end."""
    ridge: float = 1e-6
    ridge_of: RidgeOf = "trace"
    """What `ridge` is a multiple of."""
    solver: Solver = Solver()
    """How the outer loss is computed. With check "flag" no step waits for its loss, and a failed
    one is found when the next row is logged or the next checkpoint is due."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """The augmentation of the real batch."""
    fixed_views: int = 0
    """Draw among this many of the views only, the plain one and others that are always the same, so
    that an encoder runs on fewer images: a changed algorithm. 0 draws among all."""
    target_cache: Literal["auto", "on", "off"] = "auto"
    """Whether the target runs once on every view of every image, beforehand, and not at every step.
    "auto": if the table of its outputs is within the limit, and the steps would run it on more
    images. What an encoder has computed is kept in the target's folder, for later runs and for one
    that was killed."""
    target_cache_dtype: Literal["auto", "float16", "float32"] = "auto"
    """Of the table; "auto": float16 where the networks compute in it, else float32."""
    target_cache_place: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where outputs are looked up: on the device, in the CPU's memory, or in a file in the target's
    folder that is mapped into it, and taken up after a kill. "auto": on the device within the
    limit, else on the disk."""
    target_cache_limit: float | None = None
    """GiB; None is 1, and for networks on a GPU a quarter of its memory."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    image_space: Literal["normalized", "raw"] = "normalized"
    """"raw": the images start as pixels in [0, 1], which the networks then see as they are, while
    the real batch is normalised; so does the released code."""
    init_images: Literal["real", "noise"] = "real"
    """"noise": normal, with the mean and standard deviation of the real pixels."""
    init_targets: Literal["target", "random"] = "target"
    """"target": the target's outputs on the first images. "random": normal, with the mean and
    standard deviation of its outputs on real ones."""
    dtype: Literal["float16", "float32", "float64"] = "float32"
    """In which the networks compute. With float16 the images, the parameters and the KRR loss stay
    in float32, and so do networks of your own and encoders."""
    tf32: bool = True
    """Whether convolutions in float32 may round to TF32 (10 bits) on a GPU, as is PyTorch's
    default: they take a third of the time. A CPU always computes in float32."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Whether a GPU replays the steps without the host in between: two CUDA graphs for each slot of
    the pool. What failed is then read every 50 steps; a step that failed has changed no image.
    "auto": where that is possible, which takes solver.check "flag"; "on" refuses to run without."""
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int = 2000
    """Outer steps between checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is a checkpoint whatever the step, also of the pool's warm-up."""
    log_every: int = 20
    """Outer steps between rows of metrics.jsonl. Where the store has a test or val split there are
    also rows with the held-out R2: at the start, and at the end of every tenth of the run."""
    sinks: tuple[SinkName, ...] = ()
    """Who gets the rows of metrics.jsonl too: tensorboard (OUT/tensorboard) and wandb (OUT/wandb,
    offline unless WANDB_MODE says online), each an extra of its name."""

    def __post_init__(self) -> None:
        settle(self)
        require_at_least(
            *(1, self, "num_images", "steps", "batch_size", "checkpoint_every", "log_every")
        )
        require_at_least(0, self, "fixed_views")
        require_positive(self, "ridge", "checkpoint_minutes")
        require_at_least(0, self, "lr")
        if self.target_cache_limit is not None:
            require_positive(self, "target_cache_limit")
        if self.lr_targets is None:
            require(self.lr > 0, self, "lr", "positive, or lr_targets given")
        else:
            require_at_least(0, self, "lr_targets")
            at_rest = self.lr == self.lr_targets == 0
            require(not at_rest, self, "lr_targets", "positive where lr is 0")
        require(len(set(self.sinks)) == len(self.sinks), self, "sinks", "given once each")
        if self.cuda_graph == "on":
            require(self.solver.check == "flag", self, "cuda_graph", 'on with solver.check "flag"')
        require(0 < self.final_lr_fraction <= 1, self, "final_lr_fraction", "in (0, 1]")
        reference = self.solver.backend == "reference"
        require(not reference, self, "solver", "of another backend than reference")
