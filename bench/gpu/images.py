"""The paper's CIFAR-100 step, ready to run: images, a target network, a pool, a synthetic set."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig, plain_views
from krrst_fast.data.store import open_store
from krrst_fast.distill.arithmetic import PLAIN, Arithmetic, FastTarget, RunTarget
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Epochs, Represent, Source
from krrst_fast.distill.step import State
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.standardize import standardize_head

CHUNK = 256


class Scale(NamedTuple):
    """M synthetic and B real images, P target features, the networks, the size of images."""

    m: int
    b: int
    p: int
    widths: tuple[int, ...]
    target: ModelConfig
    size: int


FULL = Scale(1000, 1024, 512, (128, 256, 512), ModelConfig(kind="resnet18", stem="small"), 32)
TOY = Scale(6, 8, 4, (4, 8), ModelConfig(widths=(4,)), 8)


class Images(NamedTuple):
    """uint8 [N, C, H, W], what they are normalised by, and what they are."""

    pixels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def read(store: Path | None, size: int) -> Images:
    """Read the train split of a prepared store, or scikit-learn's 1,797 digits at this size."""
    if store is not None:
        found = open_store(store)
        return Images(found.images("train"), found.mean, found.std, store.name)
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images)[:, None].float() * (255 / 16)
    grey = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear")
    pixels = grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    scaled = pixels.float() / 255
    mean, std = (tuple(x.tolist()) for x in (scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))))
    return Images(pixels, mean, std, f"scikit-learn's digits at {size}x{size}")


def noise(size: int, count: int = 4096) -> Images:
    """Draw images of noise: the time of a step does not depend on the pixels."""
    shape = (count, 3, size, size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, "images"))
    return Images(pixels, (0.5,) * 3, (0.3,) * 3, "noise")


class Distillation(NamedTuple):
    """All that `outer_step` takes, and the parts it is made of."""

    images: Images
    target: FrozenTarget
    run: FastTarget
    source: Source
    state: State


def make(
    scale: Scale,
    images: Images,
    device: str,
    *,
    slots: int,
    online_steps: int,
    lr: float = 0.01,
    arithmetic: Arithmetic = PLAIN,
) -> Distillation:
    """Make a distillation before its first step, with an untrained, standardised target network."""
    network = build(scale.target, image_size=images.pixels.shape[-1], num_outputs=scale.p, seed=0)
    target = FrozenTarget(
        model=network,
        config=scale.target,
        num_outputs=scale.p,
        mean=images.mean,
        std=images.std,
        image_size=images.pixels.shape[-1],
    ).to(device)
    on_device = images._replace(pixels=images.pixels.to(device))
    x_syn = _first(on_device, scale.m)
    # Else all outputs of an untrained network are nearly the same.
    assert isinstance(network.fc, torch.nn.Linear)
    standardize_head(network.fc, torch.cat([target(chunk) for chunk in x_syn.split(CHUNK)]))
    y_syn = torch.cat([target(chunk) for chunk in x_syn.split(CHUNK)])
    pool = Pool(
        PoolConfig(
            size=slots, online_steps=online_steps, lr=lr, model=ModelConfig(widths=scale.widths)
        ),
        image_size=images.pixels.shape[-1],
        num_outputs=scale.p,
        device=torch.device(device),
        arithmetic=arithmetic,
    )
    state = State(x_syn, y_syn, pool, generator(0, "steps"))
    run = FastTarget(target, arithmetic)
    return Distillation(
        on_device, target, run, source(scale, on_device, RunTarget(target, run)), state
    )


def _first(images: Images, count: int) -> Tensor:
    index = torch.arange(count, device=images.pixels.device) % len(images.pixels)
    return plain_views(images.pixels, index, images.mean, images.std)


def source(scale: Scale, images: Images, represent: Represent) -> Source:
    """Make the source of the real batches."""
    return Source(
        images=images.pixels,
        mean=images.mean,
        std=images.std,
        view=ViewConfig(),
        represent=represent,
        epochs=Epochs(len(images.pixels), seed=0),
        batch_size=scale.b,
    )
