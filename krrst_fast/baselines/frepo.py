"""FRePo: neural feature regression with pooling (Zhou et al. 2022, arXiv 2206.00719)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast.baselines.label_regression import LabelTask
from krrst_fast.baselines.regression_config import FRePoConfig
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.step import State, outer_step
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.models import check
from krrst_fast.runs.seeding import generator

FINAL_FRACTION = 0.1
"""What is left of the rates at the end."""


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """A rate that falls from `start` to a tenth of it, along half a cosine of `steps` steps."""

    start: float
    steps: int

    def __call__(self, step: int) -> float:
        share = (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2
        return self.start * (FINAL_FRACTION + (1 - FINAL_FRACTION) * share)


class AdamPool(Pool):
    """A pool whose networks are trained by Adam, and begin untrained at staggered ages."""

    def stagger(self) -> None:
        """Give the untrained networks different ages, so that they are not renewed all at once."""
        for slot in self.slots:
            slot.age = self.config.online_steps // self.config.size * slot.number

    def make_optimizer(self, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Adam without weight decay."""
        return torch.optim.Adam(trained, lr=self.lr, fused=True)


class FRePo:
    """Images from whose features in networks of a pool ridge regression predicts real labels.

    A step is that of KRR-ST with centred labels in place of a target's outputs, a ridge of the mean
    diagonal, and a pool whose networks get few steps.

    Args:
        config: The settings.

    Attributes:
        state: Images, labels, pool and optimiser.

    Raises:
        DataError: The store cannot be read, is not labelled, or a class has too few images.
        ConfigError: There is no such device, or the network does not take the images.
    """

    method = "frepo"

    def __init__(self, config: FRePoConfig) -> None:
        self.config = config
        self._task = LabelTask(config, method=self.method)
        images, labels = self._task.first_images, self._task.first_targets
        count = labels.shape[1]
        # As published: the more classes, the smaller the labels of the set than those of real ones.
        targets = labels / math.sqrt(count / 10)
        size, channels, device = images.shape[-1], images.shape[1], self._task.device
        check(config.model, image_size=size, channels=channels, num_outputs=count, device=device)
        pool = AdamPool(
            PoolConfig(
                size=config.pool_size,
                online_steps=config.online_steps,
                lr=config.network_lr,
                model=config.model,
            ),
            image_size=size,
            channels=channels,
            num_outputs=count,
            seed=config.seed,
            device=device,
        )
        pool.stagger()
        self.state = State(images, targets, pool, generator(config.seed, "steps"))
        rate_of_labels = config.lr * float(targets.square().mean().sqrt())
        self._rate = CosineDecay(start=config.lr, steps=config.steps)
        self._rate_targets = CosineDecay(
            start=rate_of_labels if config.learn_labels else 0.0, steps=config.steps
        )

    @property
    def step(self) -> int:
        """The steps done."""
        return self.state.step

    def advance(self) -> dict[str, float]:
        """Take a step, and one of a network of the pool.

        Returns:
            `loss`, the mean squared error of the labels of a batch, and what network it is of.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite.
            NotPositiveDefiniteError: The kernel matrix cannot be factored.
        """
        with _named(self.method):
            report = outer_step(
                self.state,
                self._task.source,
                self._rate,
                rate_targets=self._rate_targets,
                ridge=self.config.ridge,
                ridge_of="mean_diagonal",
                mirrored=self.config.mirrored,
                penalty=margin_penalty if self.config.learn_labels else None,
            )
        return {
            "loss": float(report.loss),
            "slot": report.slot,
            "slot_age": report.slot_age,
            "lr": report.lr,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; `load_state_dict` goes on with the same bits.

        Raises:
            NonFiniteError: The set holds NaN or infinity.
        """
        with _named(self.method):
            return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.state.load_state_dict(state)

    def result(self) -> DistilledSet:
        """Return the images as they are, with one-hot or with learnt soft labels."""
        return self._task.as_set(self.state.x_syn, self.state.y_syn)


def margin_penalty(targets: Tensor) -> Tensor:
    """Return what keeps learnt labels [M, classes] apart, a scalar.

    It is minus the mean of the distance between the two largest values of a row, of 1 / classes at
    most. The released code adds it to half the sum of the squared errors over classes; as the loss
    is their mean, it is doubled and divided by the number of classes.
    """
    count = targets.shape[1]
    if count < 2:
        return targets.new_zeros(())
    largest = targets.topk(2, dim=1).values
    margin = (largest[:, 0] - largest[:, 1]).clamp(max=1 / count)
    return -margin.mean() * 2 / count


@contextmanager
def _named(method: str) -> Iterator[None]:
    """Give a numerical error of the step that it shares with KRR-ST the name of this method."""
    try:
        yield
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        text = str(error).removeprefix("distill: ").replace("pool.lr", "network_lr")
        raise type(error)(f"{method}: {text}") from error
