"""From a store and a target to a distilled set: the steps, the log, the checkpoints, the files."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from krrst_fast import environment
from krrst_fast.config import to_dict
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.distill.checkpoint import (
    Identity,
    cut_metrics,
    identity,
    load_checkpoint,
    require_same_inputs,
    require_same_run,
    save_checkpoint,
)
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.source import Source
from krrst_fast.distill.start import (
    as_distilled,
    initial_set,
    make_source,
    make_state,
    target_variance,
)
from krrst_fast.distill.step import LinearDecay, State, StepReport, located, outer_step
from krrst_fast.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.files import append_jsonl, new_folder, read_json, refuse_existing, write_json
from krrst_fast.targets import FrozenTarget, load_target


def distill(config: DistillConfig, *, resume: bool = False, progress: bool = True) -> DistilledSet:
    """Condense the train split of a store into `config.num_images` images with their targets.

    The run folder gets config.json, environment.json, metrics.jsonl, summary.json, checkpoint.pt,
    initial.safetensors, and last of all distilled.safetensors.

    Args:
        config: the settings.
        resume: go on from the folder's checkpoint; a finished run gives its result, and a run that
            was killed before its first checkpoint, or never begun, starts. On a CPU with as many
            threads the result has the bits of a run that was not interrupted.
        progress: show a bar, where there is a terminal.

    Raises:
        ConfigError: the output folder holds something else, or the target does not fit the store.
        DataError: the store or the target cannot be read, or the store holds too few images.
        CheckpointError: the run to be resumed has other settings or inputs, or is damaged.
        NonFiniteError, NotPositiveDefiniteError: a step failed; the last checkpoint is left.
    """
    _check_folder(config, resume)
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

    source = make_source(config, store, target, device, progress=progress)
    state = make_state(config, initial, device)
    totals = _take_up(config, inputs, state, progress)
    _run(config, inputs, state, source, totals, progress)

    variance = target_variance(config, store, target)
    write_json(config.out / "summary.json", _summary(config, totals, variance))
    result = as_distilled(config, inputs, state, target)
    result.save(config.out / FILE_NAME)
    return result


def _check_folder(config: DistillConfig, resume: bool) -> None:
    """Refuse a folder in use, or one that holds no run or another run than the one to resume."""
    if not resume:
        refuse_existing(config.out)
        return
    if (config.out / "config.json").exists():
        path = config.out / "config.json"
        require_same_run(path, read_json(path), config)
    elif config.out.is_dir() and any(not p.name.startswith(".") for p in config.out.iterdir()):
        raise ConfigError(
            f"{config.out}: holds files but no config.json: there is no run to resume"
        )


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
    """With paths that mean the same in every directory: later commands read them in the folder."""
    store, target, out = (path.resolve() for path in (config.store, config.target, config.out))
    return replace(config, store=store, target=target, out=out)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _require_alike(path: Path, initial: DistilledSet) -> None:
    """A resumed run must begin with the set that is there already."""
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
        saved = load_checkpoint(path, config, inputs)
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
    save_checkpoint(path, config, inputs, state, totals)
    cut_metrics(metrics, 0)
    return totals


def warm_up(state: State, *, progress: bool = False) -> None:
    """Train each network of the pool a random number of steps in [1, T)."""
    ages = state.pool.starting_ages(state.generator)
    with _bar(progress, total=sum(ages), desc="pool warm-up", unit="step") as bar:
        for slot, age in zip(state.pool.slots, ages):
            while slot.age < age:
                with located(0, slot):
                    slot.fit(state.x_syn.detach(), state.y_syn.detach())
                bar.update()


def _run(
    config: DistillConfig,
    inputs: Identity,
    state: State,
    source: Source,
    totals: dict[str, float],
    progress: bool,
) -> None:
    """The outer steps that are left. Adds to `totals`."""
    rate = LinearDecay(
        start=config.lr, final=config.lr * config.final_lr_fraction, steps=config.steps
    )
    log = _Log(config, state.step, totals)
    with _bar(progress, total=config.steps, initial=state.step, desc="distill") as bar:
        while state.step < config.steps:
            report = outer_step(state, source, rate, ridge=config.ridge, ridge_of=config.ridge_of)
            # The row before the checkpoint: a kill between them leaves a row too many, which is
            # cut, and never one too few.
            if _due(state.step, config.log_every, config.steps):
                bar.set_postfix(log.write(report, state.step), refresh=False)
            if _due(state.step, config.checkpoint_every, config.steps):
                log.count_time()
                save_checkpoint(config.out / "checkpoint.pt", config, inputs, state, totals)
            bar.update()


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


class _Log:
    """Writes the rows of metrics.jsonl and keeps the totals."""

    def __init__(self, config: DistillConfig, step: int, totals: dict[str, float]) -> None:
        self._path = config.out / "metrics.jsonl"
        self._batch_size = config.batch_size
        self._device = environment.pick_device(config.device)
        self._totals = totals
        self._counted = time.perf_counter()
        self._row_step, self._row_seconds = step, totals["seconds"]

    def count_time(self) -> None:
        """Add the time since the last call to the totals."""
        now = time.perf_counter()
        self._totals["seconds"] += now - self._counted
        self._counted = now
        peak = environment.peak_memory_mb(self._device)
        self._totals["peak_memory_mb"] = max(self._totals["peak_memory_mb"], peak)

    def write(self, report: StepReport, step: int) -> dict[str, str]:
        """Append the row of a step; returns what the progress bar shows of it."""
        solve = report.solve
        loss, ridge, condition = map(float, (report.loss, solve.ridge, solve.condition))
        self.count_time()
        seconds = self._totals["seconds"]
        images = (step - self._row_step) * self._batch_size
        row = {
            "step": step,
            "loss": loss,
            "ridge": ridge,
            "condition": condition,
            "retries": int(solve.retries),
            "slot": report.slot,
            "slot_age": report.slot_age,
            "lr": report.lr,
            "images_per_second": images / max(seconds - self._row_seconds, 1e-9),
            "seconds": seconds,
            "peak_memory_mb": self._totals["peak_memory_mb"],
        }
        append_jsonl(self._path, row)
        self._row_step, self._row_seconds = step, seconds
        shown = {"loss": loss, "ridge": ridge, "cond": condition}
        rate = {"images/s": f"{row['images_per_second']:.0f}"}
        return {name: f"{value:.3g}" for name, value in shown.items()} | rate


def _bar(progress: bool, **options: Any) -> Any:
    from tqdm import tqdm

    # None: no bar where standard error is not a terminal.
    return tqdm(disable=None if progress else True, **options)


def _summary(
    config: DistillConfig, totals: dict[str, float], variance: float
) -> dict[str, float | int]:
    per_step = totals["seconds"] / config.steps
    return {
        "steps": config.steps,
        "seconds": totals["seconds"],
        "seconds_per_step": per_step,
        "images_per_second": config.batch_size / per_step,
        "warm_up_seconds": totals["warm_up_seconds"],
        "peak_memory_mb": totals["peak_memory_mb"],
        "target_variance": variance,
    }
