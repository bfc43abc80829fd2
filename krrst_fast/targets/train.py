"""`krrst target`: from a store of images to a frozen target network."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast import environment
from krrst_fast.config import to_dict
from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.files import append_jsonl, new_folder, write_json
from krrst_fast.models import Network, build, place
from krrst_fast.targets.augment import check_channels
from krrst_fast.targets.checkpoint import (
    check_folder,
    cut_metrics,
    load_checkpoint,
    require_same_images,
    save_checkpoint,
    store_identity,
)
from krrst_fast.targets.config import TargetConfig
from krrst_fast.targets.diagnose import collapse_metrics
from krrst_fast.targets.frozen import TARGET_FILE, FrozenTarget, load_target
from krrst_fast.targets.standardize import standardize_head
from krrst_fast.targets.trainer import Trainer, learning_rate
from krrst_fast.targets.weights import load_weights

_CHECKED_IMAGES = 1024
_STANDARDIZED_BY = 8192
_CHUNK = 256


def train_target(
    config: TargetConfig, *, resume: bool = False, progress: bool = True
) -> FrozenTarget:
    """Train a target network without labels, or make one of existing weights.

    The folder `config.out` gets config.json, environment.json, metrics.jsonl, checkpoint.pt while
    it runs, summary.json, and last of all target.safetensors.

    Args:
        config: the settings.
        resume: go on from the folder's checkpoint. A finished run gives its target at once; one
            killed before its first checkpoint, or never begun, starts. On a CPU with as many
            threads the result has the bits of a run that was not interrupted.
        progress: show a bar where there is a terminal (and tqdm).

    Returns:
        The target, on the CPU.

    Raises:
        ConfigError: the folder is in use, or settings and images do not fit each other.
        DataError: the store cannot be read, or holds fewer images than a batch.
        CheckpointError: the run to resume has other settings or images, or is damaged; or the
            weights cannot be read or do not fit.
        NonFiniteError: the loss or a weight became NaN; the last checkpoint is kept.
    """
    check_folder(config, resume=resume)
    store = open_store(config.store)
    identity = store_identity(store)
    if resume and (config.out / TARGET_FILE).exists():
        target = load_target(config.out)
        require_same_images(config.out / TARGET_FILE, target.meta.get("store", ""), identity)
        (config.out / "checkpoint.pt").unlink(missing_ok=True)
        return target
    mean, std = _normalisation(config, store)
    _check_inputs(config, store)
    device = environment.pick_device(config.device)
    run = None if config.weights else Trainer(config, store, mean, std, device)
    model = run.model if run else place(_loaded(config, store), device)

    new_folder(config.out, overwrite=resume)
    write_json(config.out / "config.json", to_dict(config))
    write_json(config.out / "environment.json", environment.describe())
    totals = _train(run, identity, progress) if run else {"steps": 0}

    target = FrozenTarget(
        model=model,
        config=config.model,
        num_outputs=config.num_outputs,
        mean=mean,
        std=std,
        image_size=store.size,
        meta=_meta(config, identity),
    )
    if config.standardize:
        assert isinstance(model.fc, nn.Linear)
        standardize_head(model.fc, _outputs(target, store, _STANDARDIZED_BY))
    write_json(config.out / "summary.json", totals | _spread(target, store))
    target.save(config.out / TARGET_FILE)
    (config.out / "checkpoint.pt").unlink(missing_ok=True)
    return load_target(config.out)


def _normalisation(
    config: TargetConfig, store: ImageStore
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = config.mean or store.mean, config.std or store.std
    if not len(mean) == len(std) == store.channels:
        raise ConfigError(
            f"TargetConfig: mean and std must have a number for each of the {store.channels} "
            f"channels of {store.path}, got {list(mean)} and {list(std)}"
        )
    return tuple(mean), tuple(std)


def _check_inputs(config: TargetConfig, store: ImageStore) -> None:
    if config.weights:
        return
    check_channels(config.augment, store.channels)
    count = store.count("train")
    if count < config.batch_size:
        raise DataError(
            f"train_target: batch_size {config.batch_size} needs as many images, "
            f"and {store.path} has {count}"
        )


def _loaded(config: TargetConfig, store: ImageStore) -> Network:
    assert config.weights is not None
    model = build(
        config.model,
        image_size=store.size,
        num_outputs=config.num_outputs,
        seed=config.seed,
        channels=store.channels,
    )
    load_weights(model, config.weights)
    return model


def _train(run: Trainer, identity: str, progress: bool) -> dict[str, float]:
    """The steps that are left, with log and checkpoints. Returns the totals of the whole run."""
    config, out = run.config, run.config.out
    totals = {"seconds": 0.0, "peak_memory_mb": 0.0}
    if (out / "checkpoint.pt").exists():
        saved = load_checkpoint(out / "checkpoint.pt", config, identity)
        run.load_state_dict(saved["trainer"])
        totals = saved["totals"]
    cut_metrics(out / "metrics.jsonl", run.step)
    log = _Log(run, totals)
    with _bar(progress, total=config.steps, initial=run.step) as bar:
        while run.step < config.steps:
            loss, outputs = run.train_step()
            last = run.step == config.steps
            if last or run.step % config.log_every == 0:
                row = log.write(loss, collapse_metrics(outputs))
                if bar is not None:
                    bar.set_postfix(_shown(row), refresh=False)
            if last or run.step % config.checkpoint_every == 0:
                log.count_time()
                state = {"trainer": run.state_dict(), "totals": totals}
                save_checkpoint(out / "checkpoint.pt", config, identity, state)
            if bar is not None:
                bar.update()
    per_step = totals["seconds"] / config.steps
    speed = {"steps": config.steps, "seconds_per_step": per_step}
    return totals | speed | {"images_per_second": config.batch_size / per_step}


class _Log:
    """Writes the rows of metrics.jsonl, and keeps the totals of the run up to date."""

    def __init__(self, run: Trainer, totals: dict[str, float]) -> None:
        self._run, self._totals = run, totals
        self._began = self._row_began = time.perf_counter()
        self._row_step = run.step

    def count_time(self) -> None:
        now = time.perf_counter()
        self._totals["seconds"] += now - self._began
        self._began = now
        peak = environment.peak_memory_mb(self._run.device)
        self._totals["peak_memory_mb"] = max(peak, self._totals["peak_memory_mb"])

    def write(self, loss: float, spread: dict[str, float]) -> dict[str, float]:
        run, now = self._run, time.perf_counter()
        self.count_time()
        done = (run.step - self._row_step) * run.config.batch_size
        row = {
            "step": run.step,
            "loss": loss,
            **spread,
            "lr": learning_rate(run.config, run.step - 1),
            "images_per_second": done / (now - self._row_began),
            **self._totals,
        }
        append_jsonl(run.config.out / "metrics.jsonl", row)
        self._row_began, self._row_step = now, run.step
        return row


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.4g}",
        "rank": f"{row['effective_rank']:.0f}",
        "img/s": f"{row['images_per_second']:.0f}",
    }


def _bar(progress: bool, **options: int) -> AbstractContextManager[Any]:
    """A progress bar on a terminal, or None where there is none to show."""
    if not progress:
        return nullcontext()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return nullcontext()
    return tqdm(desc="target", unit="step", disable=None, **options)


def _meta(config: TargetConfig, identity: str) -> dict[str, str]:
    if config.weights:
        return {"weights": config.weights.name, "store": identity}
    names = ("loss", "steps", "batch_size", "lr", "standardize", "seed")
    return {name: str(getattr(config, name)) for name in names} | {"store": identity}


def _outputs(target: FrozenTarget, store: ImageStore, limit: int) -> Tensor:
    """The target's outputs [N, P] on images all over the store, not augmented, on the CPU."""
    device = next(target.model.parameters()).device
    images = store.images("train")
    count = min(len(images), limit)
    numbers = torch.arange(count) * len(images) // count
    outputs = [
        target(plain_views(images, chunk, target.mean, target.std).to(device)).cpu()
        for chunk in numbers.split(_CHUNK)
    ]
    return torch.cat(outputs)


def _spread(target: FrozenTarget, store: ImageStore) -> dict[str, float]:
    """The collapse diagnostics of the finished target."""
    outputs = _outputs(target, store, _CHECKED_IMAGES)
    return {"dim": target.dim, **collapse_metrics(outputs)}
