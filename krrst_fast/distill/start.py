"""The start of a run (first synthetic set, real images, pool), and its result."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from krrst_fast.data.augment import kept_views, plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.arithmetic import FastTarget, RunTarget, arithmetic, storage
from krrst_fast.distill.cache import make_cache
from krrst_fast.distill.cache_plan import plan_cache
from krrst_fast.distill.config import FREE_SETTINGS, DistillConfig
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Represent, Source
from krrst_fast.distill.step import State
from krrst_fast.runs.config import config_hash, to_dict
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import FrozenTarget

CHUNK = 256


Identity = Mapping[str, str]


def identity(config: DistillConfig, store: ImageStore, target: FrozenTarget) -> dict[str, str]:
    """Return what tells the inputs of a run from others, wherever they lie.

    These are the store, the target, and the code of a network that is not built in.
    """
    inputs = {"store": store.identity(), "target": target.identity()}
    return inputs | config.pool.model.identity()


def initial_set(config: DistillConfig, store: ImageStore, target: FrozenTarget) -> DistilledSet:
    """Make the first synthetic set: random real images, or noise, and the target's outputs."""
    draw = generator(config.seed, "initial")
    index = _first_images(config, store.count("train"), draw)
    images = real = plain_views(store.images("train"), index, target.mean, target.std)
    if config.init_images == "noise":
        images = torch.randn(real.shape, generator=draw)
    if config.init_targets == "random":
        outputs = target.plain(store, index)
        centre, spread = outputs.mean(0), outputs.std(0, correction=0)
        targets = centre + spread * torch.randn(outputs.shape, generator=draw)
    elif config.init_images == "noise":
        # Of the images the set starts with, as the target takes them.
        targets = represent(target, images)
    else:
        targets = target.plain(store, index)
    if config.image_space == "raw":
        std, mean = torch.tensor(target.std), torch.tensor(target.mean)
        images = images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    mean_of, std_of = display_scale(config, target)
    meta = {"method": "initial", "seed": str(config.seed), **identity(config, store, target)}
    return DistilledSet(images=images, targets=targets, mean=mean_of, std=std_of, meta=meta)


def initial_index(config: DistillConfig, count: int) -> Tensor:
    """Return the numbers [M] of the train images, of `count`, that the first set is made of."""
    return _first_images(config, count, generator(config.seed, "initial"))


def _first_images(config: DistillConfig, count: int, draw: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=draw)[: config.num_images]


def display_scale(
    config: DistillConfig, target: FrozenTarget
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std that make pixels of the synthetic images."""
    if config.image_space == "raw":
        return (0.0,) * len(target.mean), (1.0,) * len(target.std)
    return tuple(target.mean), tuple(target.std)


def represent(target: FrozenTarget, images: Tensor) -> Tensor:
    """Compute the target's outputs [N, P] on normalised images [N, C, H, W], in chunks."""
    device = target.device
    return torch.cat([target(chunk.to(device)).cpu().float() for chunk in images.split(CHUNK)])


def make_source(
    config: DistillConfig,
    store: ImageStore,
    target: FrozenTarget,
    device: torch.device,
    *,
    progress: bool = False,
) -> Source:
    """Put the store on the device, with the target to run on each batch, or its outputs kept."""
    images = store.images("train").to(device)
    fast = FastTarget(target, arithmetic(config, device))

    represent: Represent = RunTarget(target, fast)
    if (plan := plan_cache(config, store, target, device)) is not None:
        represent = make_cache(config, plan, target, images, compute=fast, progress=progress)
    return Source(
        images=images,
        mean=tuple(target.mean),
        std=tuple(target.std),
        view=config.views,
        represent=represent,
        epochs=Epochs(len(images), config.seed),
        batch_size=config.batch_size,
        dtype=storage(config),
        kept=kept_views(config.views, config.fixed_views) if config.fixed_views else None,
    )


def make_state(config: DistillConfig, initial: DistilledSet, device: torch.device) -> State:
    """Make the state before the pool's warm-up."""
    dtype = storage(config)
    pool = Pool(
        config.pool,
        image_size=initial.images.shape[-1],
        channels=initial.images.shape[1],
        num_outputs=initial.targets.shape[1],
        seed=config.seed,
        device=device,
        dtype=dtype,
        arithmetic=arithmetic(config, device),
    )
    images = initial.images.to(device, dtype)
    pool.lower_rate(images)
    return State(images, initial.targets.to(device, dtype), pool, generator(config.seed, "steps"))


def as_distilled(
    config: DistillConfig, inputs: Identity, state: State, target: FrozenTarget
) -> DistilledSet:
    """Return the synthetic set as it is now, with the settings and the inputs it was made by."""
    mean, std = display_scale(config, target)
    settings = {k: v for k, v in to_dict(config).items() if k not in FREE_SETTINGS}
    return DistilledSet(
        images=state.x_syn.detach().cpu().float(),
        targets=state.y_syn.detach().cpu().float(),
        mean=mean,
        std=std,
        meta={
            "method": "krr-st",
            "step": str(state.step),
            "config": json.dumps(settings, sort_keys=True),
            "config_hash": config_hash(config, ignore=FREE_SETTINGS),
            **inputs,
        },
    )
