"""Two random views of a batch of uint8 images, for self-supervised training."""

import math

import torch
from torch import Tensor

from krrst_fast.errors import ConfigError
from krrst_fast.targets import transforms
from krrst_fast.targets.config import SSLAugmentConfig

_DRAWN = (
    *("area", "ratio", "center_x", "center_y", "angle", "flip", "jitter", "brightness"),
    *("contrast", "saturation", "hue", "grey", "blur", "sigma"),
)


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
