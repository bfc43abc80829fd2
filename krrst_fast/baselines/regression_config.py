"""Settings of KIP and FRePo. Without torch: the command line reads them at once."""

from dataclasses import dataclass, field

from krrst_fast.baselines.learner_config import LearnerConfig
from krrst_fast.models.config import ModelConfig
from krrst_fast.runs.config import require_at_least, require_positive


@dataclass(frozen=True, kw_only=True)
class RegressionConfig(LearnerConfig):
    """Settings that the methods share which regress labels on a synthetic set in closed form."""

    images_per_class: int
    batch_size: int
    """Real images in a step. May be larger than the store: batches run through the shuffled store
    again and again."""
    lr: float
    """The rate of Adam on the images, at the start."""
    learn_labels: bool
    """Whether the labels of the images are learnt too; they start as centred one-hot rows."""
    ridge: float = 1e-6
    """A multiple of the mean diagonal of the kernel matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "images_per_class", "batch_size")
        require_positive(self, "lr", "ridge")


@dataclass(frozen=True, kw_only=True)
class KIPConfig(RegressionConfig):
    """Kernel inducing points (Nguyen, Chen and Lee 2021, arXiv 2011.00050).

    Rate, batch, ridge and fixed labels are those of the released notebook (google-research/kip);
    it leaves the number of steps open. Three things differ: the kernel is the arc-cosine kernel of
    degree 1, that of an infinitely wide layer of ReLUs of which only the last layer is trained, and
    not the tangent kernel; computation is in float32; images are not augmented.
    """

    steps: int = 5000
    batch_size: int = 5000
    lr: float = 0.04
    learn_labels: bool = False


def _published_network() -> ModelConfig:
    return ModelConfig(widths=(128, 128, 128), norm="batch")


@dataclass(frozen=True, kw_only=True)
class FRePoConfig(RegressionConfig):
    """Neural feature regression with pooling (Zhou, Nezhadarya and Ba 2022, arXiv 2206.00719).

    The defaults are those of the released code (yongchao97/FRePo). Four things differ: there is no
    ZCA; Adam takes the place of LAMB, with the rate of the labels in proportion to their size as
    LAMB has it; the features have a ones column, as in KRR-ST; a network of the pool sees all
    images in each of its steps, and not at most 1,000.
    """

    steps: int = 500_000
    batch_size: int = 1024
    lr: float = 3e-4
    """The rate of Adam on the images; it falls to a tenth along a cosine. That of the labels is
    this times their root mean square at the start."""
    learn_labels: bool = True
    mirrored: bool = True
    """Regress from the mirror images too. The released code does not with 10 and more images of
    each class of CIFAR-100; digits and texts must not."""
    pool_size: int = 10
    """Networks that are alive at once."""
    online_steps: int = 100
    """Steps of Adam a network gets on the set before a fresh one takes its place."""
    network_lr: float = 3e-4
    """The rate of Adam on a network."""
    model: ModelConfig = field(default_factory=_published_network)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "pool_size")
        require_at_least(2, self, "online_steps")
        require_positive(self, "network_lr")
