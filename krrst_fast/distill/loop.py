"""From a store and a target to a distilled set: the steps, the log, the checkpoints, the files."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.data.verify import Verification
from krrst_fast.distill.arithmetic import arithmetic, convolutions, environment_of, storage
from krrst_fast.distill.cache_plan import check_views, plan_cache
from krrst_fast.distill.config import FREE_SETTINGS, DistillConfig
from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.distill.heldout import HeldOut, warn_of_nothing
from krrst_fast.distill.source import Source
from krrst_fast.distill.start import (
    Identity,
    as_distilled,
    identity,
    initial_set,
    make_source,
    make_state,
)
from krrst_fast.distill.static import StaticSteps, refusal
from krrst_fast.distill.step import (
    LinearDecay,
    Rate,
    State,
    StepReport,
    located,
    outer_step,
    require_finite,
)
from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.models import check as check_network
from krrst_fast.runs import environment
from krrst_fast.runs.checkpoint import (
    Saves,
    cut_metrics,
    load_checkpoint,
    require_same_inputs,
    save_checkpoint,
)
from krrst_fast.runs.config import config_hash, to_dict
from krrst_fast.runs.files import new_folder, read_jsonl, write_json
from krrst_fast.runs.folder import check_folder
from krrst_fast.runs.interrupt import Interrupted, Interrupts
from krrst_fast.runs.lock import locked
from krrst_fast.runs.log import RunLog, due, summary
from krrst_fast.runs.progress import progress_bar
from krrst_fast.runs.sinks import Sinks, require_sinks
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
        ConfigError: The output folder holds something else, or another process writes it, or the
            target does not fit the store.
        DataError: The store or the target cannot be read or is damaged, or the store holds too few
            images.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; its step is saved. A second one ends at once.
        CheckpointError: The run to be resumed has other settings or inputs, or is damaged.
        NonFiniteError, NotPositiveDefiniteError: A step failed; the last checkpoint is left.
    """
    # Before the folder is looked at, so that nobody changes it meanwhile; a new one comes later.
    held = resume and config.out.is_dir()
    with locked(config.out) if held else nullcontext(), convolutions(tf32=config.tf32):
        return _distill(config, resume, progress, held)


def _distill(config: DistillConfig, resume: bool, progress: bool, held: bool) -> DistilledSet:
    require_sinks(config.sinks)
    check_folder(config.out, config, resume=resume, free=FREE_SETTINGS)
    store, target = open_store(config.store), load_target(config.target)
    inputs = identity(config, store, target)
    if (config.out / FILE_NAME).exists():
        finished = load_distilled(config.out)
        require_same_inputs(config.out / FILE_NAME, finished.meta, inputs)
        return finished
    device = environment.pick_device(config.device)
    if device.type == "mps" and config.dtype == "float64":
        raise ConfigError("distill: dtype float64 needs another device: MPS has no float64")
    _check_inputs(config, store, target, device)
    verification = Verification(store)
    target.to(device)

    first, initial = config.out / "initial.safetensors", initial_set(config, store, target)
    if first.exists():
        _require_alike(first, initial)
    new_folder(config.out, overwrite=resume)
    with nullcontext() if held else locked(config.out):
        config = _located(config)
        write_json(config.out / "config.json", to_dict(config))
        networks, table = arithmetic(config, device), plan_cache(config, store, target, device)
        environment.record(
            config.out,
            device,
            **environment_of(config, device, None if table is None else table.what),
        )
        if progress and not networks.is_plain:
            print(f"distill: the networks run by {networks}", file=sys.stderr)
        if progress and table is not None:
            print(f"distill: the target's outputs are {table}", file=sys.stderr)
        if not first.exists():
            initial.save(first)

        # What can fail comes before the target's outputs on every view, which take minutes.
        state = make_state(config, initial, device)
        run = _Run(config, inputs, state, verification)
        with run.interrupts.noted():
            run.take_up(progress)
        try:
            source = make_source(config, store, target, device, progress=progress)
            held_out = HeldOut(config, store, target, source, initial, progress=progress)
        except Interrupted as error:  # at once: the outputs of an encoder are saved as they come
            where = f"before step {state.step + 1} of {config.steps}; the checkpoint is kept"
            raise Interrupted(error.signum, where) from None
        with run.interrupts.noted():
            run.go_on(source, held_out, progress)

        written = summary(run.totals, config.steps, config.batch_size)
        figures = held_out.summary(read_jsonl(config.out / "metrics.jsonl"))
        write_json(config.out / "summary.json", {**written, **figures}, sealed=True)
        result = as_distilled(config, inputs, state, target)
        result.save(config.out / FILE_NAME)
        return result


def _check_inputs(
    config: DistillConfig, store: ImageStore, target: FrozenTarget, device: torch.device
) -> None:
    size = target.image_size
    takes, holds = (target.channels, size, size), (store.channels, store.size, store.size)
    if takes != holds:
        raise ConfigError(
            f"distill: the target {config.target} takes {_times(takes)} images, "
            f"the store {config.store} holds {_times(holds)}"
        )
    check_views(config, store, target, device)
    if config.cuda_graph == "on" and (device.type != "cuda" or config.pool.model.is_own):
        what = "the pool's networks are not built in" if config.pool.model.is_own else ""
        raise ConfigError(
            f"distill: cuda_graph is on, but {what or f'the device is {device}, not a GPU'}"
        )
    count = store.count("train")
    if config.num_images > count:
        raise DataError(
            f"distill: fewer images than asked for: num_images is {config.num_images}, "
            f"the store {config.store} has {count}"
        )
    check_network(
        config.pool.model,
        image_size=size,
        num_outputs=target.dim,
        channels=target.channels,
        device=device,
        dtype=storage(config),
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


class _Run:
    """A run that is under way: its state, its totals, and when and how both are saved."""

    def __init__(
        self, config: DistillConfig, inputs: Identity, state: State, verification: Verification
    ) -> None:
        self.config, self.inputs, self.state = config, inputs, state
        self.totals = {"seconds": 0.0, "warm_up_seconds": 0.0, "peak_memory_mb": 0.0}
        self.interrupts = Interrupts()
        self._verification = verification
        self._saves = Saves(
            every=config.checkpoint_every,
            minutes=config.checkpoint_minutes,
            last=config.steps,
            interrupts=self.interrupts,
        )

    @property
    def _path(self) -> Path:
        return self.config.out / "checkpoint.pt"

    def take_up(self, progress: bool) -> None:
        """Bring the state to the checkpoint, and finish the pool's warm-up."""
        state, ages = self.state, None
        if self._path.exists():
            saved = load_checkpoint(self._path, self.config, FREE_SETTINGS)
            require_same_inputs(self._path, saved.get("inputs", {}), self.inputs)
            state.load_state_dict(saved["state"])
            self.totals, ages = saved["totals"], saved.get("warm_up_ages")
            if ages is None:
                self._cut_metrics()
                return
        if ages is None:
            ages = state.pool.starting_ages(state.generator)
        began = time.perf_counter()

        def count_time() -> None:
            nonlocal began
            now = time.perf_counter()
            self.totals["warm_up_seconds"] += now - began
            began = now

        def save_in_time() -> None:
            if self._saves.hurry():
                count_time()
                self._save("a part of the pool's warm-up", warm_up_ages=ages)

        warm_up(state, ages, after_step=save_in_time, progress=progress)
        count_time()
        self.totals["peak_memory_mb"] = environment.peak_memory_mb(state.x_syn.device)
        self._save("the pool's warm-up")
        self._cut_metrics()

    def _cut_metrics(self) -> None:
        # The row of step 0 is not of a step that was saved: it is written anew.
        cut_metrics(self.config.out / "metrics.jsonl", self.state.step or -1)

    def _save(self, what: str, **more: Any) -> None:
        # What a damaged store led to is not saved.
        self._verification.finish()
        contents = {
            "config_hash": config_hash(self.config, ignore=FREE_SETTINGS),
            "inputs": dict(self.inputs),
            "state": self.state.state_dict(),
            "totals": self.totals,
        }
        save_checkpoint(self._path, self.config, {**contents, **more})
        self._saves.done(what)

    def _decay(self, rate: float) -> LinearDecay:
        config = self.config
        return LinearDecay(start=rate, final=rate * config.final_lr_fraction, steps=config.steps)

    def _steps(self, source: Source) -> "PlainSteps | StaticSteps":
        """Return what takes the steps."""
        config = self.config
        why_not = refusal(config, self.state, source)
        if config.cuda_graph == "on" and why_not:
            raise ConfigError(f"distill: cuda_graph is on, but {why_not}")
        static = config.cuda_graph != "off" and not why_not
        return (StaticSteps if static else PlainSteps)(
            self.state,
            source,
            self._decay(config.lr),
            rate_targets=None if config.lr_targets is None else self._decay(config.lr_targets),
            ridge=config.ridge,
            ridge_of=config.ridge_of,
            solver=config.solver,
        )

    def go_on(self, source: Source, held_out: HeldOut, progress: bool) -> None:
        """Take the outer steps that are left, with log and checkpoints."""
        config, state = self.config, self.state
        steps = self._steps(source)
        metrics = config.out / "metrics.jsonl"
        sinks = Sinks(config.sinks, config.out, settings=to_dict(config), rows=read_jsonl(metrics))
        log = RunLog(
            metrics,
            step=state.step,
            batch_size=config.batch_size,
            device=state.x_syn.device,
            totals=self.totals,
            sinks=sinks,
        )
        bar_of_steps = progress_bar(
            progress, total=config.steps, initial=state.step, desc="distill", unit="step"
        )
        with sinks, bar_of_steps as bar, steps.aside():
            if state.step == 0 and held_out.due(0):
                warn_of_nothing(log.write(0, held_out.measure(state)), config.num_images)
            while state.step < config.steps:
                report = steps()
                measures = held_out.due(state.step)
                logs = measures or due(state.step, config.log_every, config.steps)
                saves = self._saves.due(state.step)
                if logs or saves:
                    steps.settle(report)
                # The row before the checkpoint: a kill between them leaves a row too many, which
                # is cut, and never one too few.
                if logs:
                    values = report.values(state.pool.lr)
                    if measures:
                        values |= held_out.measure(state)
                    bar.set_postfix(_shown(log.write(state.step, values)), refresh=False)
                if saves:
                    log.count_time()
                    self._save(f"step {state.step} of {config.steps}")
                bar.update()


class PlainSteps:
    """Takes outer steps one by one, as `StaticSteps` takes them from a graph."""

    def __init__(self, state: State, source: Source, rate: Rate, **options: Any) -> None:
        self._state, self._given, self._options = state, (state, source, rate), options

    def aside(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def __call__(self) -> StepReport:
        """Take a step."""
        return outer_step(*self._given, **self._options)

    def settle(self, last: StepReport) -> None:
        """Read how the last step went, where nothing has looked at it."""
        self._state.settle()
        if self._options["solver"].check == "flag":
            with located(self._state.step, self._state.pool.slots[last.slot]):
                require_finite(last.loss)


def warm_up(
    state: State,
    ages: Sequence[int] | None = None,
    *,
    after_step: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> None:
    """Train each network of the pool a random number of steps in [1, T).

    Args:
        state: Of a run at step 0; its pool may have had some of the steps.
        ages: The numbers of steps; drawn if left out.
        after_step: Called after each.
        progress: Show a bar, where there is a terminal.
    """
    ages = state.pool.starting_ages(state.generator) if ages is None else ages
    done = sum(slot.age for slot in state.pool.slots)
    with progress_bar(
        progress, total=sum(ages), initial=done, desc="pool warm-up", unit="step"
    ) as bar:
        for slot, age in zip(state.pool.slots, ages):
            while slot.age < age:
                with located(0, slot):
                    state.pool.fit(slot, state.x_syn.detach(), state.y_syn.detach())
                    state.pool.settle()  # which may make the slot begin anew
                bar.update()
                after_step()


def _shown(row: dict[str, Any]) -> dict[str, str]:
    names = {"loss": "loss", "ridge": "ridge", "condition": "cond"}
    shown = {short: f"{row[name]:.3g}" for name, short in names.items() if name in row}
    return shown | {"images/s": f"{row['images_per_second']:.0f}"}
