"""Two random views of a batch of uint8 images, for self-supervised training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.errors import ConfigError
from krrst_fast.runs.config import require, require_choices
from krrst_fast.targets import transforms
from krrst_fast.targets.transforms import Fill

_DRAWN = (
    *("area", "ratio", "center_x", "center_y", "angle", "flip", "jitter", "brightness"),
    *("contrast", "saturation", "hue", "grey", "blur", "sigma"),
)


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
        require(0 < self.scale[0] <= self.scale[1] <= 4, self, "scale", "0 < low <= high <= 4")
        require(0 < self.ratio[0] <= self.ratio[1], self, "ratio", "0 < low <= high")
        require(0 <= self.rotation <= 180, self, "rotation", "0 to 180")
        require_choices(self)
        for field in ("flip", "jitter", "greyscale", "blur"):
            require(0 <= getattr(self, field) <= 1, self, field, "a probability, 0 to 1")
        for field in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, field) <= 1, self, field, "0 to 1")
        require(0 <= self.hue <= 0.5, self, "hue", "0 to 0.5")
        low, high = self.blur_sigma
        require(0 < low <= high, self, "blur_sigma", "0 < low <= high")
        require(0 <= self.noise <= 1, self, "noise", "0 to 1")

    @property
    def moves(self) -> bool:
        """Whether anything but the flip changes the geometry."""
        return not (self.scale == self.ratio == (1, 1) and self.rotation == 0)


def check_channels(config: SSLAugmentConfig, channels: int) -> None:
    """Raise ConfigError if a colour transform is on and the images have no colours."""
    for field in ("saturation", "hue", "greyscale"):
        if channels != 3 and getattr(config, field):
            raise ConfigError(
                f"SSLAugmentConfig: {field} needs images of 3 channels, got {channels}; set it to 0"
            )


def augment_pair(
    images: Tensor,
    index: Tensor,
    config: SSLAugmentConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw two independent, normalised views of `images[index]`.

    Args:
        images: uint8 [N, C, H, H], on the CPU or on `device`.
        index: int64 [B].
        config: Strength of the augmentations.
        mean, std: Mean and standard deviation of each channel, for pixels in [0, 1].
        generator: A CPU generator, the only source of randomness.
        device: Device of the views; default: that of `images`.

    Returns:
        Two float32 tensors [B, C, H, H].
    """
    device = device or images.device
    pixels = images[index.to(images.device)].to(device).float().div_(255)
    both = augment(pixels.repeat(2, 1, 1, 1), config, generator)
    both.sub_(_channels(mean, both)).div_(_channels(std, both))
    first, second = both.chunk(2)
    return first, second


def augment(x: Tensor, config: SSLAugmentConfig, generator: torch.Generator) -> Tensor:
    """Draw a random view of each image x [B, C, H, H] in [0, 1], which may be overwritten."""
    uniform = torch.rand(len(_DRAWN), len(x), generator=generator).to(x.device)
    noise_seed = int(torch.randint(2**62, (), generator=generator))
    u = dict(zip(_DRAWN, uniform))
    if config.moves:
        x = transforms.warp(x, _crop(u, config), config.fill)
    if config.flip:
        x = transforms.flip(x, u["flip"] < config.flip)
    x = _jitter(x, u, config)
    if config.greyscale:
        x = transforms.greyscale(x, u["grey"] < config.greyscale)
    if config.blur:
        low, high = config.blur_sigma
        x = transforms.blur(x, low + (high - low) * u["sigma"], u["blur"] < config.blur)
    if config.noise:
        x = transforms.noise(x, config.noise, noise_seed)
    return x


def _crop(u: dict[str, Tensor], config: SSLAugmentConfig) -> Tensor:
    """Draw a rectangle of random area and shape, rotated, in the image or partly outside it."""
    low, high = config.scale
    area = low + (high - low) * u["area"]
    log_low, log_high = (math.log(ratio) for ratio in config.ratio)
    ratio = torch.exp(log_low + (log_high - log_low) * u["ratio"])
    # A long crop is shortened to the image unless zooming out was asked for.
    longest = max(1.0, math.sqrt(high))
    width = torch.sqrt(area * ratio).clamp(max=longest)
    height = torch.sqrt(area / ratio).clamp(max=longest)
    return transforms.crop_matrix(
        width,
        height,
        width / 2 + u["center_x"] * (1 - width),
        height / 2 + u["center_y"] * (1 - height),
        math.radians(config.rotation) * (2 * u["angle"] - 1),
    )


def _jitter(x: Tensor, u: dict[str, Tensor], config: SSLAugmentConfig) -> Tensor:
    if not config.jitter:
        return x
    strength = (u["jitter"] < config.jitter).float()
    for name in ("brightness", "contrast", "saturation"):
        if amount := getattr(config, name):
            x = getattr(transforms, name)(x, 1 + amount * strength * (2 * u[name] - 1))
    if config.hue:
        x = transforms.hue(x, config.hue * strength * (2 * u["hue"] - 1))
    return x


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
