"""How well a run predicts the target on images that it has not seen: held-out R2, while it runs.

R2 = 1 - MSE / variance of the target's outputs on held-out images, as predicted by kernel ridge
regression on the features of the pool's oldest network. Beside it stands that of the real images,
and what is attainable through the same network with many real images and the best ridge.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from krrst_fast.data.augment import View, plain_views, render
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.arithmetic import storage
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.cache_plan import outputs_folder
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.distilled_set import DistilledSet, is_finite
from krrst_fast.distill.pool import Slot
from krrst_fast.distill.source import Source
from krrst_fast.distill.start import initial_set
from krrst_fast.distill.step import State
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.ops.krr import krr_predict
from krrst_fast.ops.path import krr_path
from krrst_fast.runs.environment import solving_device
from krrst_fast.runs.rows import computed_rows
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.encoder import EncoderInfo

MEASURES = 10
"""Parts of a run, at whose ends there is a measurement; the attainable R2 is measured three times.
"""
HELD_OUT, TRAIN = 1000, 2000
"""Images at most: held out, and real ones that the attainable R2 is fitted on."""
LEAST, PASSES = 100, 500
"""A short run takes fewer, so that the measurements cost less than 3 % of it: an image for 500
passes of one through a network, of which a step makes some 6M + B; but at least 100."""
RIDGES = tuple(10.0 ** (power / 2) for power in range(-8, 5))
"""Tried for the attainable R2, in units of the mean diagonal of the Gram."""
SATURATED = 0.8
"""Share of the attainable R2 from which on random real images leave hardly anything to distil.

Gains on a probe (docs/evaluate.md): +0.1 +- 0.5 with 0.96, an untrained ConvNet as the target; +0.3
+- 0.1 with 0.81, a ConvNet after a short training on CIFAR-100; +1.7 +- 0.6 with 0.66 to 0.75, the
digits; +1.9 to +2.7 with an encoder, by which real images are below 0."""
OURS, REAL, ATTAINABLE = "held_out_r2", "held_out_r2_real", "held_out_r2_attainable"
MISSING = "no_held_out_r2"
_CHUNK = 256


class HeldOut:
    """Held-out images with the target's outputs, and the real images that a run is compared with.

    Args:
        config: Settings of the run.
        store: Its images; the test split is held out, else the val split.
        target: Its target, on the device of the run.
        source: Its real batches.
        initial: The first synthetic set of the run.
        progress: Show a bar where outputs of an encoder are computed, on a terminal.

    Attributes:
        why_not: Why nothing is measured; empty where it is.
    """

    def __init__(
        self,
        config: DistillConfig,
        store: ImageStore,
        target: FrozenTarget,
        source: Source,
        initial: DistilledSet,
        *,
        progress: bool = False,
    ) -> None:
        self._config, self._source, self._dtype = config, source, storage(config)
        steps = [config.steps * part // MEASURES for part in range(MEASURES + 1)]
        self._steps, self._fitted_steps = {*steps}, {steps[0], steps[MEASURES // 2], steps[-1]}
        self.why_not = _why_not(store, target)
        if self.why_not:
            return
        passes = config.steps * (6 * config.num_images + config.batch_size)
        few = max(LEAST, passes // PASSES)
        device, split = source.images.device, _held_out_split(store)
        images = store.images(split)
        spread = torch.arange(len(images))[:: -(-len(images) // min(HELD_OUT, few))]
        self._images = images[spread].to(device)  # [T, C, H, W] uint8
        try:
            outputs = _outputs(config, store, target, self._images, split, progress)  # [T, P]
        except NonFiniteError as error:
            self.why_not = f"as the target fails on the {split} split ({error})"
            return
        if not outputs.var(0, correction=0).max() > 0:
            self.why_not = f"as the target's outputs on the {split} split are all the same"
            return
        self._outputs = outputs
        if (config.init_images, config.init_targets) != ("real", "target"):
            real = replace(config, init_images="real", init_targets="target")
            initial = initial_set(real, store, target)
        self._real = initial.images.to(device, self._dtype), initial.targets.to(device, self._dtype)
        draw = generator(config.seed, "held-out")
        train = torch.randperm(len(source.images), generator=draw)[: min(TRAIN, 2 * few)]
        self._train = train.to(device)
        self._train_outputs = self._outputs_of_train(target)  # [N, P]

    def _outputs_of_train(self, target: FrozenTarget) -> Tensor:
        """Return the target's outputs on the real images, those that are kept where they are."""
        source, parts = self._source, []

        def found(view: View) -> Tensor:
            return source.represent.find(view).to(source.images.device)

        for index in self._train.split(_CHUNK):
            padding = index.new_full((len(index), 2), source.view.padding)
            view = View(index, padding, torch.zeros_like(index, dtype=torch.bool))
            batch = render(
                source.images, view, padding=source.view.padding, mean=source.mean, std=source.std
            )
            kept = isinstance(source.represent, TargetCache)
            parts.append(source.represent(found(view), batch) if kept else target(batch))
        return torch.cat(parts).to(self._dtype)

    def due(self, step: int) -> bool:
        """Return whether there is a measurement after this step: at the start, ten in the run."""
        return not self.why_not and step in self._steps

    @torch.no_grad()
    def measure(self, state: State) -> dict[str, float]:
        """Return the held-out R2 of the synthetic set, of the real images and the attainable one.

        They depend on the state alone, which they leave as it is. The attainable one is there at
        the start, in the middle and at the end. A figure that cannot be computed is left out, with
        a warning: the run goes on without it.
        """
        state.settle()
        slot = max(state.pool.slots, key=lambda slot: slot.age)
        found: dict[str, float] = {}
        try:
            features = self._features(slot, self._images)
            for name, (x, y) in ((OURS, (state.x_syn, state.y_syn)), (REAL, self._real)):
                found[name] = self._r2(self._predicted(slot, x, y, features))
            if state.step in self._fitted_steps:
                found[ATTAINABLE] = self._attainable(slot, features)
        except (NonFiniteError, NotPositiveDefiniteError) as error:
            self._warn(state.step, slot, str(error))
        missing = [name for name, value in found.items() if not is_finite(value)]
        if missing:
            self._warn(state.step, slot, f"{', '.join(missing)} is not finite")
        return {name: value for name, value in found.items() if name not in missing}

    def _warn(self, step: int, slot: Slot, reason: str) -> None:
        warnings.warn(
            f"distill: no held-out R2 at step {step}, by pool network {slot.number} of age "
            f"{slot.age}: {reason}",
            stacklevel=3,
        )

    def _features(self, slot: Slot, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Compute features [N, D] of uint8 images [N, C, H, W], or of those of an index [N]."""
        rows = torch.arange(len(images), device=images.device) if index is None else index
        return torch.cat(
            [
                slot.network.embed(
                    plain_views(images, part, self._source.mean, self._source.std).to(self._dtype)
                )
                for part in rows.split(_CHUNK)
            ]
        )

    def _predicted(self, slot: Slot, x: Tensor, y: Tensor, features: Tensor) -> Tensor:
        """Predict outputs [T, P] from a set (x [M, C, H, W], y [M, P]), as the outer loss does."""
        config, solving = self._config, solving_device(x.device)
        f_syn = torch.cat([slot.network.embed(part) for part in x.detach().split(_CHUNK)])
        return krr_predict(
            f_syn.to(solving),
            y.detach().to(solving),
            features.to(solving),
            ridge=config.ridge,
            ridge_of=config.ridge_of,
            bias=1.0,
            solver=config.solver,
        )

    def _attainable(self, slot: Slot, features: Tensor) -> float:
        """Return the R2 of the best of many ridges, by leave-one-out, on the real images."""
        solving = solving_device(features.device)
        train = self._features(slot, self._source.images, self._train)
        path = krr_path(
            train.to(solving),
            self._train_outputs.to(solving),
            RIDGES,
            ridge_of="mean_diagonal",
            intercept=True,
        )
        return self._r2(path.fit_best().predict(features.to(solving)))

    def _r2(self, predicted: Tensor) -> float:
        predicted, wanted = predicted.cpu().double(), self._outputs.cpu().double()
        variance = wanted.var(0, correction=0).mean()
        return 1 - float((predicted - wanted).square().mean() / variance)

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the last figures in the log of the run, or why there are none."""
        return {MISSING: self.why_not} if self.why_not else last_figures(rows)


def last_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last of each held-out figure in the rows of a log; what none has is left out."""
    return {
        name: row[name]
        for name in (OURS, REAL, ATTAINABLE)
        for row in rows
        if is_finite(row.get(name))
    }


def nothing_to_distil(figures: Mapping[str, Any]) -> bool:
    """Return whether nothing is attainable, or real images already predict nearly all that is."""
    if REAL not in figures or ATTAINABLE not in figures:
        return False
    attainable = figures[ATTAINABLE]
    return bool(attainable <= 0 or figures[REAL] >= SATURATED * attainable)


def warn_of_nothing(figures: Mapping[str, Any], num_images: int) -> None:
    """Warn, at the start of a run, where there is nothing to distil."""
    if not nothing_to_distil(figures):
        return
    real, attainable = figures[REAL], figures[ATTAINABLE]
    reason = (
        f"{num_images} real images predict the target nearly as well as all that were tried "
        f"(held-out R2 {real:+.3f} of {attainable:+.3f})"
        if attainable > 0
        else f"no real images predict the target at all (held-out R2 {attainable:+.3f})"
    )
    warnings.warn(
        f"distill: {reason}, so there is hardly anything to distil; a stronger target helps more "
        "than any setting",
        stacklevel=2,
    )


def in_words(figures: Mapping[str, Any]) -> str:
    """Return held-out figures, or why there are none, as one line; empty where neither is there."""
    if MISSING in figures:
        return f"held-out R2: none, {figures[MISSING]}"
    if OURS not in figures or REAL not in figures:
        return ""
    text = f"held-out R2: real images {figures[REAL]:+.3f} -> distilled {figures[OURS]:+.3f}"
    if ATTAINABLE in figures:
        text += f" (attainable {figures[ATTAINABLE]:+.3f})"
    if nothing_to_distil(figures):
        text += "; there was hardly anything to distil"
    return text


def _why_not(store: ImageStore, target: FrozenTarget) -> str:
    if not _held_out_split(store):
        return (
            "as the store has no test or val split: prepare it with --test_fraction to hold some "
            "images out"
        )
    if target.table is not None:
        return "as a table of features has none of held-out images: only an encoder can give them"
    return ""


def _held_out_split(store: ImageStore) -> str:
    """Return the split that is held out; empty where there is none."""
    filled = (name for name in ("test", "val") if name in store.splits and store.count(name) > 0)
    return next(filled, "")


def _outputs(
    config: DistillConfig,
    store: ImageStore,
    target: FrozenTarget,
    images: Tensor,
    split: str,
    progress: bool,
) -> Tensor:
    """Compute the target's outputs [T, P] on held-out images; those of an encoder are kept.

    Raises:
        NonFiniteError: They hold NaN or infinity.
    """
    index = torch.arange(len(images), device=images.device)

    def compute(rows: Tensor) -> Tensor:
        return target(plain_views(images, rows.to(images.device), target.mean, target.std))

    if not isinstance(target.config, EncoderInfo):
        outputs = torch.cat([compute(part) for part in index.split(_CHUNK)])
        if not outputs.isfinite().all():
            raise NonFiniteError("its outputs hold NaN or infinity")
        return outputs
    inputs = {
        "store": store.identity(),
        "target": target.identity(),
        "images": f"{len(images)} of {store.count(split)} of the {split} split",
        "device": target.device.type,
    }
    return computed_rows(
        outputs_folder(config, inputs),
        (len(images), target.dim),
        inputs,
        compute,
        block=_CHUNK,
        what="held-out outputs",
        progress=progress,
    ).to(images.device)
