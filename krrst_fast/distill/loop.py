"""From a store and a target to a distilled set: the steps, the log, the checkpoints, the files."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.distill.config import FREE_SETTINGS, DistillConfig
from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.distill.source import Source
from krrst_fast.distill.start import (
    Identity,
    as_distilled,
    identity,
    initial_set,
    make_source,
    make_state,
    target_variance,
)
from krrst_fast.distill.step import (
    LinearDecay,
    State,
    StepReport,
    located,
    outer_step,
    require_finite,
)
from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.runs import environment
from krrst_fast.runs.checkpoint import (
    check_folder,
    cut_metrics,
    load_checkpoint,
    require_same_inputs,
    save_checkpoint,
)
from krrst_fast.runs.config import config_hash, to_dict
from krrst_fast.runs.files import new_folder, write_json
from krrst_fast.runs.log import RunLog, due, summary
from krrst_fast.runs.progress import progress_bar
from krrst_fast.targets import FrozenTarget, load_target


def distill(config: DistillConfig, *, resume: bool = False, progress: bool = True) -> DistilledSet:
    """Condense the train split of a store into `config.num_images` images with their targets.

    The run folder gets config.json, environment.json, metrics.jsonl, summary.json, checkpoint.pt,
    initial.safetensors, and last of all distilled.safetensors.

    Args:
        config: The settings.
        resume: Go on from the folder's checkpoint; a finished run gives its result, and a run that
            was killed before its first checkpoint, or never begun, starts. On a CPU with as many
            threads the result has the bits of a run that was not interrupted.
        progress: Show a bar, where there is a terminal.

    Raises:
        ConfigError: The output folder holds something else, or the target does not fit the store.
        DataError: The store or the target cannot be read, or the store holds too few images.
        CheckpointError: The run to be resumed has other settings or inputs, or is damaged.
        NonFiniteError, NotPositiveDefiniteError: A step failed; the last checkpoint is left.
    """
    check_folder(config.out, config, resume=resume, free=FREE_SETTINGS)
    store, target = open_store(config.store), load_target(config.target)
    inputs = identity(store, target)
    if (config.out / FILE_NAME).exists():
        finished = load_distilled(config.out / FILE_NAME)
        require_same_inputs(config.out / FILE_NAME, finished.meta, inputs)
        return finished
    _check_inputs(config, store, target)
    device = environment.pick_device(config.device)
    target.to(device)

    first, initial = config.out / "initial.safetensors", initial_set(config, store, target)
    if first.exists():
        _require_alike(first, initial)
    new_folder(config.out, overwrite=resume)
    config = _located(config)
    write_json(config.out / "config.json", to_dict(config))
    write_json(config.out / "environment.json", environment.describe())
    if not first.exists():
        initial.save(first)

    # What can fail comes before the target's outputs on every view, which take minutes.
    state = make_state(config, initial, device)
    totals = _take_up(config, inputs, state, progress)
    source = make_source(config, store, target, device, progress=progress)
    _run(config, inputs, state, source, totals, progress)

    written = summary(totals, config.steps, config.batch_size)
    written["target_variance"] = target_variance(config, store, target)
    write_json(config.out / "summary.json", written)
    result = as_distilled(config, inputs, state, target)
    result.save(config.out / FILE_NAME)
    return result


def _check_inputs(config: DistillConfig, store: ImageStore, target: FrozenTarget) -> None:
    size = target.image_size
    takes, holds = (target.channels, size, size), (store.channels, store.size, store.size)
    if takes != holds:
        raise ConfigError(
            f"distill: the target {config.target} takes {_times(takes)} images, "
            f"the store {config.store} holds {_times(holds)}"
        )
    count = store.count("train")
    if config.num_images > count:
        raise DataError(
            f"distill: fewer images than asked for: num_images is {config.num_images}, "
            f"the store {config.store} has {count}"
        )


def _located(config: DistillConfig) -> DistillConfig:
    """Make the paths absolute: later commands read them from config.json in other directories."""
    store, target, out = (path.resolve() for path in (config.store, config.target, config.out))
    return replace(config, store=store, target=target, out=out)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _require_alike(path: Path, initial: DistilledSet) -> None:
    """Raise CheckpointError unless a resumed run begins with the set in its folder."""
    before = load_distilled(path)
    require_same_inputs(path, before.meta, initial.meta)
    for then, now in ((before.images, initial.images), (before.targets, initial.targets)):
        # Not bit by bit: the run may go on on another device.
        if then.shape != now.shape or not torch.allclose(then, now, rtol=1e-2, atol=1e-2):
            raise CheckpointError(
                f"{path.parent}: the store or the target has changed since this run began"
            )


def _take_up(
    config: DistillConfig, inputs: Identity, state: State, progress: bool
) -> dict[str, float]:
    """Bring the state to the checkpoint, or make the first one. Returns the totals so far."""
    path, metrics = config.out / "checkpoint.pt", config.out / "metrics.jsonl"
    if path.exists():
        saved = load_checkpoint(path, config, FREE_SETTINGS)
        require_same_inputs(path, saved.get("inputs", {}), inputs)
        state.load_state_dict(saved["state"])
        cut_metrics(metrics, state.step)
        return saved["totals"]
    began = time.perf_counter()
    warm_up(state, progress=progress)
    totals = {
        "seconds": 0.0,
        "warm_up_seconds": time.perf_counter() - began,
        "peak_memory_mb": environment.peak_memory_mb(state.x_syn.device),
    }
    save_checkpoint(path, config, _contents(config, inputs, state, totals))
    cut_metrics(metrics, 0)
    return totals


def warm_up(state: State, *, progress: bool = False) -> None:
    """Train each network of the pool a random number of steps in [1, T)."""
    ages = state.pool.starting_ages(state.generator)
    with progress_bar(progress, total=sum(ages), desc="pool warm-up", unit="step") as bar:
        for slot, age in zip(state.pool.slots, ages):
            while slot.age < age:
                with located(0, slot):
                    state.pool.fit(slot, state.x_syn.detach(), state.y_syn.detach())
                bar.update()


def _run(
    config: DistillConfig,
    inputs: Identity,
    state: State,
    source: Source,
    totals: dict[str, float],
    progress: bool,
) -> None:
    """Take the outer steps that are left, with log and checkpoints; add to `totals`."""
    rate = LinearDecay(
        start=config.lr, final=config.lr * config.final_lr_fraction, steps=config.steps
    )
    log = RunLog(
        config.out / "metrics.jsonl",
        step=state.step,
        batch_size=config.batch_size,
        device=state.x_syn.device,
        totals=totals,
    )
    with progress_bar(
        progress, total=config.steps, initial=state.step, desc="distill", unit="step"
    ) as bar:
        while state.step < config.steps:
            report = outer_step(
                state,
                source,
                rate,
                ridge=config.ridge,
                ridge_of=config.ridge_of,
                solver=config.solver,
            )
            logs = due(state.step, config.log_every, config.steps)
            saves = due(state.step, config.checkpoint_every, config.steps)
            if (logs or saves) and config.solver.check == "flag":
                with located(state.step, state.pool.slots[report.slot]):
                    require_finite(report.loss)
            # The row before the checkpoint: a kill between them leaves a row too many, which is
            # cut, and never one too few.
            if logs:
                bar.set_postfix(_shown(log.write(state.step, _values(report))), refresh=False)
            if saves:
                log.count_time()
                contents = _contents(config, inputs, state, totals)
                save_checkpoint(config.out / "checkpoint.pt", config, contents)
            bar.update()


def _contents(
    config: DistillConfig, inputs: Identity, state: State, totals: dict[str, float]
) -> dict[str, Any]:
    """Return what a checkpoint holds beside its format and the settings."""
    return {
        "config_hash": config_hash(config, ignore=FREE_SETTINGS),
        "inputs": dict(inputs),
        "state": state.state_dict(),
        "totals": totals,
    }


def _values(report: StepReport) -> dict[str, float]:
    """Return what the log keeps of a step."""
    solve = report.solve
    return {
        "loss": float(report.loss),
        "ridge": float(solve.ridge),
        "condition": float(solve.condition),
        "retries": int(solve.retries),
        "slot": report.slot,
        "slot_age": report.slot_age,
        "lr": report.lr,
    }


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "loss": f"{row['loss']:.3g}",
        "ridge": f"{row['ridge']:.3g}",
        "cond": f"{row['condition']:.3g}",
        "images/s": f"{row['images_per_second']:.0f}",
    }
