"""One row of an evaluation: a method with a seed, from initial weights to accuracies."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from krrst_fast.baselines import herding, k_centre, kmeans, random_subset, random_subset_labels
from krrst_fast.baselines.coresets import all_outputs
from krrst_fast.baselines.random_images import random_index
from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import KrrstError
from krrst_fast.evaluate.config import Labels
from krrst_fast.evaluate.distillation import distil_knowledge, measured, train_teacher
from krrst_fast.evaluate.early import EarlyStop, fitted_and_held_out
from krrst_fast.evaluate.labelled import draw_labelled
from krrst_fast.evaluate.materials import CHUNK, TIMES, Materials, Split
from krrst_fast.evaluate.networks import NONE_KEPT, Networks, pretraining_key
from krrst_fast.evaluate.pretrain import (
    pretrain,
    pretrain_labels,
    pretraining_rate,
    settle_norms,
)
from krrst_fast.evaluate.probe import (
    accuracy,
    embed,
    embed_both,
    knn_scores,
    probe_accuracy,
)
from krrst_fast.evaluate.table import Row
from krrst_fast.evaluate.tuning import Tuned, Tuner
from krrst_fast.models import Network, build, place
from krrst_fast.runs.seeding import derive, generator

Tick = Callable[[], object]

CORESETS = ("kmeans", "herding", "k_centre")
"""Choices among the target's outputs on all images, which are computed once."""
CHOICES: dict[str, Callable[..., DistilledSet]] = {
    "random_target": random_subset,
    "random_early": random_subset,
    **dict.fromkeys(TIMES, random_subset),
    "kmeans": kmeans,
    "herding": herding,
    "k_centre": k_centre,
}
"""How real images are chosen."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a network was pre-trained, where it was."""

    images: int | None = None
    """How many there were."""
    seen: Tensor | None = None
    """The images [M, C, H, W] themselves, normalised."""
    loss: float | None = None
    steps: int | None = None
    """Where their number was chosen."""
    rate: float | None = None
    """On the target's outputs."""


class Trials:
    """A runner of methods and seeds on the same materials.

    Args:
        materials: All inputs.
        networks: Those that other rows have pre-trained, or will begin with.

    Raises:
        DataError: A class has fewer labelled images than asked, or a test image has no label.
    """

    def __init__(self, materials: Materials, networks: Networks = NONE_KEPT) -> None:
        self.materials = materials
        self._networks = networks
        self._target_features: dict[str, tuple[Tensor, ...]] = {}
        self._taught_by: tuple[Network, float] | None = None
        self._all_tests = torch.arange(len(materials.test.labels))
        config = materials.config
        self.label_counts = {
            str(labels): len(self._labelled(labels, config.first_seed))
            for labels in config.probe.labels
        }
        if config.finetune.steps:
            self._labelled(config.finetune.labels_per_class or "all", config.first_seed)

    def run(self, method: str, seed: int, fingerprint: str, tick: Tick) -> Row:
        """Pre-train, probe and fine-tune."""
        started = time.perf_counter()
        try:
            if method == "target":
                assert self.materials.target is not None
                assert isinstance(self.materials.target.model, Network)
                net, start = self.materials.target.model, Start()
            else:
                net, start = self._start(method, seed, tick)
            scores = self._probe(net, method, seed, tick)
            tuned = taught_by = None
            if method != "target" and self.materials.config.finetune.steps:
                tuned = self._finetune(net, method, seed, tick)
                scores["finetune"] = tuned.accuracy
            if method != "target" and self.materials.config.kd.steps:
                scores["kd"], taught_by = self._learn(net, start, method, seed, tick)
        except KrrstError as error:
            raise type(error)(f"evaluate: {method}, seed {seed}: {error}") from None
        return Row(
            method=method,
            seed=seed,
            scores=scores,
            pretrain_loss=start.loss,
            seconds=time.perf_counter() - started,
            fingerprint=fingerprint,
            num_images=start.images,
            set_index=self.materials.set_index(method, seed),
            r2=self._explained(net) if self.materials.is_represented(method) else None,
            pretrain_steps=start.steps,
            pretrain_lr=start.rate,
            finetune_lr=None if tuned is None else tuned.rate,
            teacher_accuracy=taught_by,
        )

    def _start(self, method: str, seed: int, tick: Tick) -> tuple[Network, Start]:
        """Return the network of `method`, pre-trained, in eval mode, and how that went."""
        given = self.materials
        config, device, count = given.config.pretrain, given.device, given.count(method)
        if method == "none":
            net = self._fresh(0, seed)
            settle_norms(net, self._random_images(seed))
            return net, Start()
        if method == "random_labels":
            labels = random_subset_labels(self._source, count, seed=seed).to(device)
            net = self._fresh(len(self._source.classes), seed)
            images = self._random_images(seed)
            loss = pretrain_labels(net, images, labels, config, seed=seed, tick=tick)
            return net, Start(images=count, seen=images, loss=loss)
        if (number := given.set_index(method, seed)) is not None:
            chosen = given.sets[method][number]
        else:
            assert given.target is not None
            known = {"outputs": self._outputs} if method in CORESETS else {}
            chosen = CHOICES[method](self._source, given.target, count, seed=seed, **known)
        net = self._fresh(chosen.targets.shape[1], seed)
        images, targets = chosen.images.to(device), chosen.targets.to(device)
        rate = pretraining_rate(net, images, targets, config)
        stopping = None
        if method == "random_early":
            stopping = EarlyStop(net, partial(self._validation, seed=seed), config.steps)

        def train(steps: int) -> float:
            def after_step() -> None:
                tick()
                if stopping is not None:
                    stopping.after_step()

            some = replace(config, steps=steps)
            return pretrain(net, images, targets, some, seed=seed, rate=rate, tick=after_step)

        key = pretraining_key(given, method, seed)
        if (ready := self._networks.take(key)) is None:
            loss = train(config.steps)
            self._networks.keep(key, net, loss)
        else:
            if stopping is not None and stopping.before_last:
                train(stopping.before_last)
            for _ in range(config.steps - (stopping.before_last if stopping else 0)):
                tick()
            net.load_state_dict(ready.state)
            net.eval()
            loss = ready.loss
        start = Start(images=len(images), seen=images, loss=loss, rate=rate)
        if stopping is None:
            return net, start
        if ready is not None:
            stopping.score_last()
        return net, replace(start, loss=None, steps=stopping.take_best())

    def _validation(self, net: Network, *, seed: int) -> float:
        """Return the accuracy of a ridge probe on training images that it did not learn from.

        It is the mean over the numbers of labels, as one network is measured with all of them.
        """
        given, config = self.materials, self.materials.config.probe
        mean, std = given.mean_std("random_early")
        found = []
        for labels in config.labels:
            draw = generator(seed, "validation")
            parts = fitted_and_held_out(self._labelled(labels, seed), len(given.train.labels), draw)
            fitted, held_out = (
                embed(net, given.train.images, index, mean=mean, std=std) for index in parts
            )
            fitted_labels, wanted = (given.train.labels[index].to(given.device) for index in parts)
            value = probe_accuracy(
                *(fitted, fitted_labels, held_out, wanted, given.classes),
                replace(config, solver="ridge"),
                seed=seed,
                solver=given.config.solver,
            )
            found.append(value)
        return statistics.fmean(found)

    def _explained(self, net: Network) -> float | None:
        """Return the R2 of the network's outputs on held-out images of the source."""
        if self.materials.held_out is None:
            return None
        images, wanted = self.materials.held_out
        with torch.no_grad():
            outputs = torch.cat([net(chunk) for chunk in images.split(CHUNK)])
        outputs, wanted = outputs.cpu().double(), wanted.cpu().double()  # MPS has no float64
        variance = wanted.var(0, correction=0).mean()
        return 1 - float((outputs - wanted).square().mean() / variance)

    @cached_property
    def _outputs(self) -> Tensor:
        """The target's outputs [N, P] on all images of the source."""
        assert self.materials.target is not None
        return all_outputs(self._source, self.materials.target)

    @property
    def _source(self) -> ImageStore:
        assert self.materials.source is not None
        return self.materials.source

    def _random_images(self, seed: int) -> Tensor:
        """Return the random real images of a seed [M, 3, H, W], normalised."""
        given, images = self.materials, self._source.images("train")
        index = random_index(self._source, len(given.distilled), seed=seed)
        return plain_views(images, index, given.mean, given.std).to(given.device)

    def _fresh(self, num_outputs: int, seed: int) -> Network:
        """Return the initial network of a seed; its body is the same for every `num_outputs`."""
        config = self.materials.config.model
        net = self._built(num_outputs, seed)
        if config.is_own:
            # Its code may draw the head first, and then other values for the body.
            net.load_state_dict(net.state_dict() | self._built(1, seed).body_state())
        return place(net, self.materials.device)

    def _built(self, num_outputs: int, seed: int) -> Network:
        return build(
            self.materials.config.model,
            image_size=self.materials.store.size,
            num_outputs=num_outputs,
            channels=self.materials.store.channels,
            seed=derive(seed, "network"),
        )

    def _probe(self, net: Network, method: str, seed: int, tick: Tick) -> dict[str, float]:
        """Return the accuracies of a frozen network by task, means over the draws of labels."""
        config, all_tests = self.materials.config.probe, self._all_tests
        tests = self._features(net, method, self.materials.test, all_tests, "test")
        scores: dict[str, float] = {}
        for labels in config.labels:
            found: dict[str, list[float]] = {}
            for draw in range(config.draws(labels)):
                index = self._labelled(labels, seed, draw)
                trains = self._features(net, method, self.materials.train, index, "train")
                for measure, value in self._measured(trains, index, tests, seed, tick).items():
                    found.setdefault(f"{measure}-{labels}", []).append(value)
            scores |= {task: statistics.fmean(values) for task, values in found.items()}
        return scores

    def _measured(
        self,
        trains: tuple[Tensor, ...],
        index: Tensor,
        tests: tuple[Tensor, ...],
        seed: int,
        tick: Tick,
    ) -> dict[str, float]:
        """Return accuracies by measure, fitted on images `index` and measured on all test images.

        `trains` and `tests` are their features, and their outputs where these are measured.
        """
        given, config = self.materials, self.materials.config.probe
        train_labels = given.train.labels[index].to(given.device)
        test_labels = given.test.labels.to(given.device)
        found: dict[str, float] = {}
        pairs: dict[str, tuple[Tensor, Tensor]] = dict(
            zip(("probe", "outputs"), zip(trains, tests))
        )
        for measure in config.measures:
            if measure == "knn":
                votes = knn_scores(trains[0], train_labels, tests[0], given.classes)
                found[measure] = accuracy(votes, test_labels)
                tick()
            elif measure in pairs:
                train, test = pairs[measure]
                found[measure] = probe_accuracy(
                    *(train, train_labels, test, test_labels, given.classes, config),
                    seed=seed,
                    solver=given.config.solver,
                    tick=tick,
                )
        return found

    def _features(
        self, net: Network, method: str, split: Split, index: Tensor, name: str
    ) -> tuple[Tensor, ...]:
        """Compute features, and outputs that stand for the target's; of it once for all seeds."""
        fixed = method == "target" and len(index) == len(split.labels)
        if fixed and name in self._target_features:
            return self._target_features[name]
        mean, std = self.materials.mean_std(method)
        found: tuple[Tensor, ...]
        if "outputs" in self.materials.config.probe.measures and self.materials.has_outputs(method):
            found = embed_both(net, split.images, index, mean=mean, std=std)
        else:
            found = (embed(net, split.images, index, mean=mean, std=std),)
        if fixed:
            self._target_features[name] = found
        return found

    def _finetune(self, net: Network, method: str, seed: int, tick: Tick) -> Tuned:
        given, config = self.materials, self.materials.config.finetune
        fresh = partial(self._with_body, net.body_state(), seed)
        mean, std = given.mean_std(method)
        tuner = Tuner(fresh, given.train, config, mean=mean, std=std, seed=seed, tick=tick)
        labels = config.labels_per_class or "all"
        draws = [self._labelled(labels, seed, draw) for draw in range(config.label_draws)]
        return tuner.tune(draws, given.test)

    def _with_body(self, body: dict[str, Tensor], seed: int) -> Network:
        """Return a network for the classes of the store, of the initial head and that body."""
        net = self._fresh(self.materials.classes, seed)
        net.load_state_dict(net.state_dict() | body)
        return net

    def _learn(
        self, net: Network, start: Start, method: str, seed: int, tick: Tick
    ) -> tuple[float, float]:
        """Return the accuracy of a student of the labelled images' teacher, and the teacher's."""
        given = self.materials
        teacher, reached = self._teacher(tick)
        noise = start.seen is None
        student = self._with_body(net.body_state(), seed)
        images = given.distilled.images.to(given.device) if start.seen is None else start.seen
        config, scale = given.config.kd, self._to_labelled(method, seed)
        distil_knowledge(
            student, teacher, images, config, noise=noise, scale=scale, seed=seed, tick=tick
        )
        mean, std = given.mean_std(method)
        return measured(student, given.test, mean=mean, std=std), reached

    def _to_labelled(self, method: str, seed: int) -> tuple[Tensor, Tensor]:
        """Return what brings images of a method to the scale of the labelled images [C, 1, 1]."""
        given, number = self.materials, self.materials.set_index(method, seed)
        one = given if number is None else given.sets[method][number]
        mean, std, to_mean, to_std = (
            torch.tensor(values, device=given.device).view(-1, 1, 1)
            for values in (one.mean, one.std, given.store.mean, given.store.std)
        )
        return std / to_std, (mean - to_mean) / to_std

    def _teacher(self, tick: Tick) -> tuple[Network, float]:
        """Train the teacher and measure it, once for all methods and seeds; both are kept."""
        if self._taught_by is None:
            given, config = self.materials, self.materials.config.kd
            net = build(
                config.teacher,
                image_size=given.store.size,
                num_outputs=given.classes,
                channels=given.store.channels,
                seed=derive(0, "kd teacher"),
            )
            net = place(net, given.device)
            scale = {"mean": given.store.mean, "std": given.store.std}
            training = given.config.finetune
            train_teacher(net, given.train, config, training, **scale, seed=0, tick=tick)
            self._taught_by = net, measured(net, given.test, **scale)
        return self._taught_by

    def _labelled(self, labels: Labels, seed: int, draw: int = 0) -> Tensor:
        given = self.materials
        where, stream = str(given.store.path), derive(seed, "draw", draw)
        return draw_labelled(given.train.labels, given.classes, labels, seed=stream, where=where)
