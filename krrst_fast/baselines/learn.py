"""The run of a learnt baseline: its folder, log, checkpoints and result, whatever the method."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from krrst_fast.baselines.registry import FREE_SETTINGS
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.data.verify import Verification
from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.errors import DataError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs import environment
from krrst_fast.runs.checkpoint import (
    Saves,
    cut_metrics,
    load_checkpoint,
    require_same_inputs,
    save_checkpoint,
)
from krrst_fast.runs.config import config_hash, to_dict
from krrst_fast.runs.files import new_folder, write_json
from krrst_fast.runs.folder import check_folder
from krrst_fast.runs.interrupt import Interrupts
from krrst_fast.runs.lock import locked
from krrst_fast.runs.log import RunLog, due, summary
from krrst_fast.runs.progress import progress_bar
from krrst_fast.targets import load_target

CHECKPOINT_MINUTES = 10.0
"""Minutes after which there is a checkpoint whatever the step."""


class Learner(Protocol):
    """A set that is being learnt. Making one writes nothing in the run folder."""

    @property
    def method(self) -> str:
        """Name of the method, as the set's metadata has it."""

    @property
    def step(self) -> int:
        """The outer steps done."""

    def advance(self) -> dict[str, float]:
        """Take one outer step; return what the log keeps of it, at least "loss".

        Raises:
            NonFiniteError: It failed; the message says what may help.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; `load_state_dict` goes on with the same bits."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""

    def result(self) -> DistilledSet:
        """Return the set as it is now; "method" in its metadata is `method`."""


class LearnConfig(Protocol):
    """The settings that every learnt baseline has, in a frozen dataclass."""

    @property
    def store(self) -> Path:
        """A folder made by `krrst prepare`; its train split is condensed."""

    @property
    def out(self) -> Path:
        """The run folder."""

    @property
    def steps(self) -> int:
        """Outer steps."""

    @property
    def device(self) -> str:
        """Device, or "auto"."""

    @property
    def checkpoint_every(self) -> int:
        """Outer steps between checkpoints."""

    @property
    def log_every(self) -> int:
        """Outer steps between rows of the log."""


C = TypeVar("C", bound=LearnConfig)


def learn(
    config: C,
    make_learner: Callable[[C], Learner],
    *,
    resume: bool = False,
    progress: bool = True,
) -> DistilledSet:
    """Learn a set of images in `config.steps` outer steps of a method.

    The run folder gets config.json, environment.json, metrics.jsonl, checkpoint.pt, summary.json,
    and last of all distilled.safetensors.

    Args:
        config: The settings.
        make_learner: The method: makes what learns. May train networks first that are kept
            elsewhere, as the experts of trajectory matching are.
        resume: Go on from the folder's checkpoint; a finished run gives its result, and a run that
            was killed before its first checkpoint, or never begun, starts. On a CPU with as many
            threads the result has the bits of a run that was not interrupted.
        progress: Show a bar, where there is a terminal.

    Raises:
        ConfigError: The output folder holds something else, or another process writes it, or the
            settings do not fit the store.
        DataError: The store cannot be read or is damaged, or lacks images or labels.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; its step is saved. A second one ends at once.
        CheckpointError: The run to be resumed has another method, other settings or inputs, or is
            damaged.
        NonFiniteError, NotPositiveDefiniteError: A step failed; the last checkpoint is left.
    """
    # Before the folder is looked at, so that nobody changes it meanwhile; a new one comes later.
    held = resume and config.out.is_dir()
    with locked(config.out) if held else nullcontext():
        return _learn(config, make_learner, resume, progress, held)


def _learn(
    config: C, make_learner: Callable[[C], Learner], resume: bool, progress: bool, held: bool
) -> DistilledSet:
    # "method" is in the file and not among the settings: the inputs are compared with it.
    check_folder(config.out, config, resume=resume, free=(*FREE_SETTINGS, "method"))
    store = open_store(config.store)
    inputs = _inputs(config, store)
    if (config.out / FILE_NAME).exists():
        finished = load_distilled(config.out)
        require_same_inputs(config.out / FILE_NAME, finished.meta, inputs)
        return finished
    verification = Verification(store)
    learner = make_learner(config)

    new_folder(config.out, overwrite=resume)
    with nullcontext() if held else locked(config.out):
        run = _Run(_located(config), inputs, learner, verification)
        run.begin()
        with run.interrupts.noted():
            run.take_up()
            run.go_on(progress)
        return run.finish()


def _inputs(config: Any, store: ImageStore) -> dict[str, str]:
    """Return what tells the inputs of a run from others, wherever they lie."""
    inputs = {"store": store.identity()}
    target = getattr(config, "target", None)
    if target is not None:
        inputs["target"] = load_target(target).identity()
    for network in _networks(config):
        inputs |= network.identity()
    return inputs


def _networks(config: Any) -> Iterator[ModelConfig]:
    """Yield the networks that settings name, in sections too."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, ModelConfig):
            yield value
        elif is_dataclass(value):
            yield from _networks(value)


def _located(config: Any) -> Any:
    """Make the paths absolute: later commands read them from config.json in other directories."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    paths = {name: value.resolve() for name, value in found.items() if isinstance(value, Path)}
    return replace(config, **paths)


class _Run:
    """A run that is under way: its learner, its totals, and when and how both are saved."""

    def __init__(
        self,
        config: Any,
        inputs: Mapping[str, str],
        learner: Learner,
        verification: Verification,
    ) -> None:
        self.config, self.learner, self.method = config, learner, learner.method
        self.inputs = {"method": self.method, **inputs}
        self.device = environment.pick_device(config.device)
        self.totals = {"seconds": 0.0, "peak_memory_mb": 0.0}
        self.interrupts = Interrupts()
        self._verification = verification
        self._saves = Saves(
            every=config.checkpoint_every,
            minutes=CHECKPOINT_MINUTES,
            last=config.steps,
            interrupts=self.interrupts,
        )

    @property
    def _checkpoint(self) -> Path:
        return self.config.out / "checkpoint.pt"

    @property
    def _metrics(self) -> Path:
        return self.config.out / "metrics.jsonl"

    def begin(self) -> None:
        """Write what the run is and where it runs."""
        about = {"method": self.method, **to_dict(self.config)}
        write_json(self.config.out / "config.json", about)
        environment.record(self.config.out, self.device)

    def take_up(self) -> None:
        """Bring the learner to the checkpoint, if there is one."""
        if self._checkpoint.exists():
            saved = load_checkpoint(self._checkpoint, self.config, FREE_SETTINGS)
            require_same_inputs(self._checkpoint, saved.get("inputs", {}), self.inputs)
            self.learner.load_state_dict(saved["state"])
            self.totals = saved["totals"]
        cut_metrics(self._metrics, self.learner.step)

    def go_on(self, progress: bool) -> None:
        """Take the outer steps that are left, with log and checkpoints."""
        config, learner = self.config, self.learner
        log = RunLog(
            self._metrics,
            step=learner.step,
            batch_size=None,
            device=self.device,
            totals=self.totals,
        )
        bar = progress_bar(
            progress, total=config.steps, initial=learner.step, desc=self.method, unit="step"
        )
        with bar:
            while learner.step < config.steps:
                values = learner.advance()
                step = learner.step
                self._require_finite(values)
                # The row before the checkpoint: a kill between them leaves a row too many, which
                # is cut, and never one too few.
                if due(step, config.log_every, config.steps):
                    row = log.write(step, values)
                    bar.set_postfix({"loss": f"{row['loss']:.4g}"}, refresh=False)
                if self._saves.due(step):
                    log.count_time()
                    self._save(f"step {step} of {config.steps}")
                bar.update()

    def _require_finite(self, values: Mapping[str, float]) -> None:
        if not math.isfinite(values["loss"]):
            raise NonFiniteError(
                f"{self.method}: the loss is {values['loss']} at step {self.learner.step}; a lower "
                "rate may help"
            )

    def _save(self, what: str) -> None:
        # What a damaged store led to is not saved, nor what nothing can come of.
        self._verification.finish()
        self._result()
        contents = {
            "inputs": self.inputs,
            "state": self.learner.state_dict(),
            "totals": self.totals,
        }
        save_checkpoint(self._checkpoint, self.config, contents)
        self._saves.done(what)

    def _result(self) -> DistilledSet:
        try:
            return self.learner.result()
        except DataError as error:  # a DistilledSet refuses NaN and infinity
            raise NonFiniteError(f"{self.method}: step {self.learner.step}: {error}") from error

    def finish(self) -> DistilledSet:
        """Write the totals and the result, with the settings and the inputs it was made by."""
        config, made = self.config, self._result()
        totals = summary(self.totals, config.steps, None)
        write_json(config.out / "summary.json", totals, sealed=True)
        settings = {k: v for k, v in to_dict(config).items() if k not in FREE_SETTINGS}
        meta = {
            **made.meta,
            "step": str(self.learner.step),
            "config": json.dumps(settings, sort_keys=True),
            "config_hash": config_hash(config, ignore=FREE_SETTINGS),
            **self.inputs,
        }
        made = replace(made, meta=meta)
        made.save(config.out / FILE_NAME)
        return made
