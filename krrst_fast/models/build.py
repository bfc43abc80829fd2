"""One network from its settings and a seed."""

import torch

from krrst_fast.errors import ConfigError
from krrst_fast.models.config import ModelConfig
from krrst_fast.models.convnet import ConvNet
from krrst_fast.models.network import Network
from krrst_fast.models.resnet import ResNet


def build(
    config: ModelConfig, *, image_size: int, num_outputs: int, seed: int, channels: int = 3
) -> Network:
    """Return a freshly initialised network on the CPU, in training mode.

    Args:
        config: Architecture.
        image_size: Height and width of the images it will see.
        num_outputs: P, the outputs of its linear head; 0 for no head (forward is embed).
        seed: The same seed gives the same bits; the global random state is left as it was.
        channels: Channels of the images.

    Raises:
        ConfigError: The images are too small for that many poolings, or a number is negative.
    """
    if num_outputs < 0 or channels < 1:
        raise ConfigError(
            f"build: num_outputs must be >= 0 and channels >= 1, got {num_outputs} and {channels}"
        )
    depth = len(config.widths) if config.kind == "convnet" else 0
    if image_size < 2**depth:
        raise ConfigError(
            f"build: a convnet of {depth} widths halves the image {depth} times and needs at least "
            f"{2**depth} pixels, got image_size {image_size}"
        )
    # The default generator alone: torch.manual_seed would reseed the GPUs as well.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        if config.kind == "convnet":
            return ConvNet(
                config.widths,
                config.norm,
                image_size=image_size,
                num_outputs=num_outputs,
                channels=channels,
            )
        return ResNet(config.kind, config.stem, num_outputs=num_outputs, channels=channels)
