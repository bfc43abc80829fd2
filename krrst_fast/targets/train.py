"""`krrst target`: from a store of images to a frozen target network."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.data.verify import Verification
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.models import Network, build, place
from krrst_fast.runs import environment
from krrst_fast.runs.checkpoint import (
    Saves,
    cut_metrics,
    load_checkpoint,
    require_same_inputs,
    save_checkpoint,
)
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.files import new_folder, read_jsonl, write_json
from krrst_fast.runs.folder import check_folder
from krrst_fast.runs.interrupt import Interrupts
from krrst_fast.runs.lock import locked
from krrst_fast.runs.log import RunLog, due, summary
from krrst_fast.runs.progress import progress_bar
from krrst_fast.runs.sinks import Sinks, require_sinks
from krrst_fast.targets.augment import check_channels
from krrst_fast.targets.config import FREE_SETTINGS, TargetConfig
from krrst_fast.targets.diagnose import collapse_metrics
from krrst_fast.targets.encode import make_target
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
    """Train a target network without labels, or make one of existing weights or an encoder.

    The folder `config.out` gets config.json, environment.json, metrics.jsonl, checkpoint.pt while
    it runs, summary.json, and last of all target.safetensors.

    Args:
        config: The settings.
        resume: Go on from the folder's checkpoint. A finished run gives its target at once; one
            killed before its first checkpoint, or never begun, starts. On a CPU with as many
            threads the result has the bits of a run that was not interrupted.
        progress: Show a bar where there is a terminal (and tqdm).

    Returns:
        The target, on the CPU.

    Raises:
        ConfigError: The folder is in use, or settings and images do not fit each other.
        DataError: The store cannot be read, is damaged, or holds fewer images than a batch.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; its step is saved. A second one ends at once.
        CheckpointError: The run to resume has other settings or images, or is damaged; or the
            weights cannot be read or do not fit.
        NonFiniteError: The loss or a weight became NaN; the last checkpoint is kept.
    """
    # Before the folder is looked at, so that nobody changes it meanwhile; a new one comes later.
    held = resume and config.out.is_dir()
    with locked(config.out) if held else nullcontext():
        return _train_target(config, resume, progress, held)


def _train_target(config: TargetConfig, resume: bool, progress: bool, held: bool) -> FrozenTarget:
    require_sinks(config.sinks)
    check_folder(config.out, config, resume=resume, free=FREE_SETTINGS)
    store = open_store(config.store)
    identity = store.identity()
    if resume and (config.out / TARGET_FILE).exists():
        target = load_target(config.out)
        require_same_inputs(config.out / TARGET_FILE, target.meta, {"store": identity})
        (config.out / "checkpoint.pt").unlink(missing_ok=True)
        return target
    if config.encoder is not None:
        return make_target(config, store, progress=progress)
    mean, std = _normalisation(config, store)
    _check_inputs(config, store)
    verification = Verification(store)
    device = environment.pick_device(config.device)
    run = None if config.weights else Trainer(config, store, mean, std, device)
    model = run.model if run else place(_loaded(config, store), device)

    new_folder(config.out, overwrite=resume)
    with nullcontext() if held else locked(config.out):
        write_json(config.out / "config.json", to_dict(config))
        environment.record(config.out, device)
        totals = _train(run, identity, verification, progress) if run else {"steps": 0}

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
        summarised = totals | _spread(target, store)
        verification.finish()
        write_json(config.out / "summary.json", summarised, sealed=True)
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
    if max(*mean, *std) > 2:
        raise ConfigError(
            "TargetConfig: mean and std must be in units of [0, 1] pixels: divide those of 0 to "
            f"255 by 255; got {list(mean)} and {list(std)}"
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
    load_weights(model, config.weights, prefix=config.weights_prefix)
    return model


def _train(
    run: Trainer, identity: str, verification: Verification, progress: bool
) -> dict[str, float]:
    """Train the steps that are left, with log and checkpoints; return the run's summary."""
    config, out = run.config, run.config.out
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"
    totals = {"seconds": 0.0, "peak_memory_mb": 0.0}
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint, config, FREE_SETTINGS)
        require_same_inputs(checkpoint, saved, {"store": identity})
        run.load_state_dict(saved["state"]["trainer"])
        totals = saved["state"]["totals"]
    cut_metrics(metrics, run.step)
    sinks = Sinks(config.sinks, out, settings=to_dict(config), rows=read_jsonl(metrics))
    log = RunLog(
        metrics,
        step=run.step,
        batch_size=config.batch_size,
        device=run.device,
        totals=totals,
        sinks=sinks,
    )
    interrupts = Interrupts()
    saves = Saves(
        every=config.checkpoint_every,
        minutes=config.checkpoint_minutes,
        last=config.steps,
        interrupts=interrupts,
    )
    bar = progress_bar(progress, total=config.steps, initial=run.step, desc="target", unit="step")
    with sinks, bar, interrupts.noted():
        while run.step < config.steps:
            loss, outputs = run.train_step()
            if due(run.step, config.log_every, config.steps):
                spread, rate = collapse_metrics(outputs), learning_rate(config, run.step - 1)
                row = log.write(run.step, {"loss": loss, **spread, "lr": rate})
                bar.set_postfix(_shown(row), refresh=False)
            if saves.due(run.step):
                log.count_time()
                # What a damaged store led to is not saved.
                verification.finish()
                state = {"trainer": run.state_dict(), "totals": totals}
                save_checkpoint(checkpoint, config, {"store": identity, "state": state})
                saves.done(f"step {run.step} of {config.steps}")
            bar.update()
    return summary(totals, config.steps, config.batch_size)


def _shown(row: dict[str, float]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.4g}",
        "rank": f"{row['effective_rank']:.0f}",
        "img/s": f"{row['images_per_second']:.0f}",
    }


def _meta(config: TargetConfig, identity: str) -> dict[str, str]:
    if config.weights:
        return {"weights": config.weights.name, "store": identity}
    names = ("loss", "steps", "batch_size", "lr", "standardize", "seed")
    return {name: str(getattr(config, name)) for name in names} | {"store": identity}


def _outputs(target: FrozenTarget, store: ImageStore, limit: int) -> Tensor:
    """Compute the target's outputs [N, P] on plain images all over the store, on the CPU."""
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
    """Return the collapse diagnostics of the finished target."""
    outputs = _outputs(target, store, _CHECKED_IMAGES)
    return {"dim": target.dim, **collapse_metrics(outputs)}
