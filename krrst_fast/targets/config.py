"""The settings of a target network and of its training."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from krrst_fast.errors import ConfigError
from krrst_fast.models.config import ModelConfig
from krrst_fast.runs.config import require, require_at_least, require_positive, settle
from krrst_fast.runs.sinks import SinkName

Fill = Literal["zeros", "border", "reflection"]

FREE_SETTINGS = (
    "store",
    "out",
    "device",
    "checkpoint_every",
    "checkpoint_minutes",
    "log_every",
    "sinks",
)
"""Settings that may change in the middle of a run: they say where and how often, not what.

The images themselves may not change: the identity of the store is compared.
"""


@dataclass(frozen=True, kw_only=True)
class SSLAugmentConfig:
    """Strength of the augmentations of a view; a field at its neutral value is off."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Area of the random crop as a fraction of the image; above 1 zooms out."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    rotation: float = 0.0
    """Largest angle in degrees, either way."""
    fill: Fill = "reflection"
    """What lies outside the image, where a view shows it."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue change, in this order."""
    brightness: float = 0.4
    """The factor is drawn from [1 - brightness, 1 + brightness], likewise the next two."""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Largest turn of the hue, either way, in revolutions (0 to 0.5)."""
    greyscale: float = 0.2
    """Probability of losing the colour."""
    blur: float = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    noise: float = 0.0
    """Standard deviation of Gaussian pixel noise, in units of the full range."""

    def __post_init__(self) -> None:
        settle(self)
        require(0 < self.scale[0] <= self.scale[1] <= 4, self, "scale", "0 < low <= high <= 4")
        require(0 < self.ratio[0] <= self.ratio[1], self, "ratio", "0 < low <= high")
        require(0 <= self.rotation <= 180, self, "rotation", "0 to 180")
        for name in ("flip", "jitter", "greyscale", "blur"):
            require(0 <= getattr(self, name) <= 1, self, name, "a probability, 0 to 1")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, self, name, "0 to 1")
        require(0 <= self.hue <= 0.5, self, "hue", "0 to 0.5")
        low, high = self.blur_sigma
        require(0 < low <= high, self, "blur_sigma", "0 < low <= high")
        require(0 <= self.noise <= 1, self, "noise", "0 to 1")

    @property
    def moves(self) -> bool:
        """Whether anything but the flip changes the geometry."""
        return not (self.scale == self.ratio == (1, 1) and self.rotation == 0)


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Settings of a target network: trained without labels on a train split, or loaded."""

    store: Path
    """Folder of the images."""
    out: Path
    """Folder of the run; the target is in its target.safetensors."""
    weights: Path | None = None
    """Load these .pth, .pt or .safetensors weights (torchvision's names) and train nothing."""
    weights_prefix: str = ""
    """Take only the weights whose names start with this, as `encoder_q.`, and without it. The
    prefixes that the usual frameworks write are found without it."""
    encoder: str | None = None
    """Take this encoder and train nothing: efficientnet_lite0, module:callable, file.py:callable,
    a .pt (TorchScript), .pt2 or .onnx file, or a .npy matrix of features. All but the last run
    code: see docs/encoders.md."""
    input_size: int = 0
    """Size of the images an encoder sees, to which those of the store are resized; 0 takes what it
    says of itself. `mean` and `std` are the encoder's too, and the store keeps its own."""
    num_outputs: int = 0
    """Outputs of a linear head, the representation; 0 takes the network's features. Those of an
    encoder are reduced by PCA."""
    loss: Literal["barlow_twins", "simclr", "vicreg"] = "barlow_twins"
    off_diagonal: float = 0.005
    """Weight of the off-diagonal correlations in barlow_twins."""
    temperature: float = 0.5
    """Of the similarities in simclr."""
    steps: int = 40_000
    """Optimizer steps."""
    batch_size: int = 256
    """Images a step, two views of each."""
    lr: float = 1e-3
    """Peak rate of AdamW, after the warm-up; it falls to 0 as a cosine."""
    weight_decay: float = 1e-4
    """Of the weight matrices and convolutions; biases and norms have none."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly."""
    projector: tuple[int, ...] = (2048, 2048, 2048)
    """Widths of the MLP between representation and loss, dropped after training; may be empty."""
    standardize: bool = False
    """Scale and shift the head, once trained, to outputs of mean 0 and variance 1. The loss hardly
    sees their scale, and all that is trained on them does: a network that is to learn small outputs
    fits them with its head and keeps the features it began with."""
    mean: tuple[float, ...] | None = None
    """Normalise the images by this mean instead of the store's (for weights from elsewhere)."""
    std: tuple[float, ...] | None = None
    """Likewise the standard deviation."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda[:index] or mps."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    checkpoint_minutes: float = 10.0
    """Minutes after which there is a checkpoint whatever the step."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    sinks: tuple[SinkName, ...] = ()
    """Who gets the rows of metrics.jsonl too: tensorboard (OUT/tensorboard) and wandb (OUT/wandb,
    offline unless WANDB_MODE says online), each an extra of its name."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(kind="resnet18"))
    augment: SSLAugmentConfig = field(default_factory=SSLAugmentConfig)

    def __post_init__(self) -> None:
        settle(self)
        if self.model.is_own:
            raise ConfigError(
                "TargetConfig: model.kind must be built in, since the file of a target never names "
                f"code to run, got {self.model.kind!r}"
            )
        require_at_least(
            0, self, "num_outputs", "off_diagonal", "weight_decay", "seed", "input_size"
        )
        require_at_least(1, self, "steps", "checkpoint_every", "log_every")
        require_at_least(2, self, "batch_size")
        require_positive(self, "temperature", "lr", "checkpoint_minutes")
        require(len(set(self.sinks)) == len(self.sinks), self, "sinks", "given once each")
        trained = self.encoder is None and self.weights is None
        require(trained or not self.sinks, self, "sinks", "left out where nothing is trained")
        for other in ("weights", "weights_prefix") if self.encoder is not None else ():
            require(not getattr(self, other), self, other, "left out where there is an encoder")
        plain = self.encoder is not None or not self.input_size
        require(plain, self, "input_size", "0 without an encoder: networks see the store's size")
        prefixed = self.weights is not None or not self.weights_prefix
        require(prefixed, self, "weights_prefix", "left out where there are no weights")
        headed = self.num_outputs > 0 or not self.standardize
        require(headed, self, "standardize", "off without num_outputs: there is no head to scale")
        low, high = 0, self.steps - 1
        require(low <= self.warmup_steps <= high, self, "warmup_steps", f"from 0 to {high}")
        require(all(width > 0 for width in self.projector), self, "projector", "positive widths")
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(values is None or len(values) > 0, self, name, "a number a channel")
        require(self.std is None or min(self.std) > 0, self, "std", "positive")
