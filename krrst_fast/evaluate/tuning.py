"""Fine-tuning at the rate that is best on labelled images that it does not learn from."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.evaluate.config import FinetuneConfig
from krrst_fast.evaluate.early import fitted_and_held_out
from krrst_fast.evaluate.finetune import finetune
from krrst_fast.evaluate.materials import Split
from krrst_fast.evaluate.probe import accuracy, in_chunks
from krrst_fast.models import Network
from krrst_fast.runs.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The outcome of fine-tuning."""

    accuracy: float
    """In per cent of the test images, a mean over the draws of labels."""
    rate: float


def finetune_steps(config: FinetuneConfig) -> int:
    """Return the steps of all trainings of a row, as planned."""
    rates = len(config.rates)
    anew = config.labels_per_class is None and rates > 1
    return config.steps * (rates + anew) * config.label_draws


class Tuner:
    """Fine-tuning from one initialisation, at every rate with the same batches and views.

    Args:
        fresh: Returns the network to fine-tune, with the same weights at every call.
        train: Images and labels to learn from, and to judge the rates by.
        config: The rates and the other settings.
        mean: Channel means that normalise the images.
        std: Channel standard deviations that normalise the images.
        seed: Seed of the held-out images, the batch order and the views.
        tick: Function to call after every step.
    """

    def __init__(
        self,
        fresh: Callable[[], Network],
        train: Split,
        config: FinetuneConfig,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        tick: Callable[[], object] | None = None,
    ) -> None:
        self._fresh, self._train, self._config = fresh, train, config
        self._mean, self._std, self._seed, self._tick = mean, std, seed, tick

    def tune(self, draws: Sequence[Tensor], test: Split) -> Tuned:
        """Fine-tune at every rate, and measure the networks of the best one on `test`.

        The best rate has the highest accuracy on images of the train split that the training does
        not use, a mean over the draws; of equals, the first. Where a draw takes the whole split, a
        random fifth of it is held out, and the networks are trained anew on all images at the best
        rate. A rate that diverges is passed over, and a single one is not judged.

        Args:
            draws: Positions in the train split of the images to learn from [L], for each draw.
            test: Images and labels that accuracy is measured on.

        Raises:
            NonFiniteError: Training diverged at every rate.
        """
        rates, tests = self._config.rates, torch.arange(len(test.labels))
        if len(rates) == 1:
            nets = (self._trained(index, rates[0]) for index in draws)
            found = [self._accuracy(net, test, tests) for net in nets]
            return Tuned(accuracy=statistics.fmean(found), rate=rates[0])
        draw, count = generator(self._seed, "finetune validation"), len(self._train.labels)
        parts = [fitted_and_held_out(index, count, draw) for index in draws]
        whole = all(len(fitted) == len(index) for (fitted, _), index in zip(parts, draws))
        scores: dict[float, float] = {}
        best: list[Network] = []
        diverged: dict[float, NonFiniteError] = {}
        for rate in rates:
            try:
                judged = [self._trained(fitted, rate) for fitted, _ in parts]
                found = [
                    self._accuracy(net, self._train, held) for net, (_, held) in zip(judged, parts)
                ]
            except NonFiniteError as error:
                diverged[rate] = error
                continue
            if not scores or statistics.fmean(found) > max(scores.values()):
                best = judged
            scores[rate] = statistics.fmean(found)
        for rate in sorted(scores, key=lambda rate: -scores[rate]):
            try:
                if not whole or not best:
                    best = [self._trained(index, rate) for index in draws]
                found = [self._accuracy(net, test, tests) for net in best]
                return Tuned(accuracy=statistics.fmean(found), rate=rate)
            except NonFiniteError as error:
                # A rate that a part of the images could bear may be too high for all of them.
                diverged[rate], best = error, []
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise NonFiniteError(f"finetune: every rate of {tried} diverges: {diverged[rates[-1]]}")

    def _trained(self, index: Tensor, rate: float) -> Network:
        net, train = self._fresh(), self._train
        finetune(
            net,
            train.images,
            index,
            train.labels[index],
            self._config,
            rate=rate,
            mean=self._mean,
            std=self._std,
            seed=self._seed,
            tick=self._tick,
        )
        return net

    def _accuracy(self, net: Network, split: Split, index: Tensor) -> float:
        scores = in_chunks(net, split.images, index, mean=self._mean, std=self._std)
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError("the fine-tuned network gives NaN or infinity")
        return accuracy(scores.cpu(), split.labels[index])
