"""One network from its settings and a seed."""

import warnings
from typing import cast, get_args

import torch

from krrst_fast.errors import ConfigError
from krrst_fast.models.config import Kind, ModelConfig, StackedKind
from krrst_fast.models.convnet import ConvNet
from krrst_fast.models.mobilenet import MobileNet
from krrst_fast.models.network import Network, place
from krrst_fast.models.own import OwnNetwork, check_own
from krrst_fast.models.resnet import ResNet
from krrst_fast.models.source import find
from krrst_fast.models.stacked import Stacked, halvings
from krrst_fast.runs.seeding import seeded


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
        ConfigError: The images are too small for that many poolings, a number is negative, or a
            network of the user's code cannot be made or is none.
    """
    if num_outputs < 0 or channels < 1:
        raise ConfigError(
            f"build: num_outputs must be >= 0 and channels >= 1, got {num_outputs} and {channels}"
        )
    _require_pixels(config, image_size)
    with seeded(seed), torch.device("cpu"):
        return _make(config, image_size, num_outputs, channels)


def check(
    config: ModelConfig,
    *,
    image_size: int,
    num_outputs: int,
    channels: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise ConfigError unless such networks can be built and trained; one is, for a step."""

    def fresh(seed: int = 0) -> Network:
        return build(
            config, image_size=image_size, num_outputs=num_outputs, seed=seed, channels=channels
        )

    network = fresh()
    if isinstance(network, OwnNetwork):
        twin, other = fresh(), fresh(1)
        assert isinstance(twin, OwnNetwork) and isinstance(other, OwnNetwork)
        with seeded(0, torch.device(device)):
            check_own(place(network, device, dtype), twin)
        pairs = zip(twin.net.parameters(), other.net.parameters(), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            warnings.warn(
                f"{config.kind}: its parameters are the same for every seed, so all networks of a "
                "pool, and all seeds of an evaluation, begin alike; is there a manual_seed in it?",
                stacklevel=2,
            )


def _require_pixels(config: ModelConfig, image_size: int) -> None:
    if config.kind == "convnet":
        depth, what = len(config.widths), f"a convnet of {len(config.widths)} widths"
    elif config.kind in get_args(StackedKind):
        depth, what = halvings(cast(StackedKind, config.kind)), config.kind
    else:
        depth, what = 0, config.kind
    if image_size < 2**depth:
        raise ConfigError(
            f"build: {what} halves the image {depth} times and needs at least "
            f"{2**depth} pixels, got image_size {image_size}"
        )


def _make(config: ModelConfig, image_size: int, num_outputs: int, channels: int) -> Network:
    if config.is_own:
        return OwnNetwork(
            find(config.kind),
            config.features,
            image_size=image_size,
            num_outputs=num_outputs,
            channels=channels,
        )
    kind = cast(Kind, config.kind)
    if kind == "convnet":
        return ConvNet(
            config.widths,
            config.norm,
            image_size=image_size,
            num_outputs=num_outputs,
            channels=channels,
        )
    if kind == "mobilenet":
        return MobileNet(num_outputs=num_outputs, channels=channels)
    if kind == "vgg11" or kind == "alexnet":
        return Stacked(kind, image_size=image_size, num_outputs=num_outputs, channels=channels)
    return ResNet(kind, config.stem, num_outputs=num_outputs, channels=channels)
