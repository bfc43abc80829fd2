"""Pre-training that is stopped where it helps most, as judged on images held out for that."""

from collections.abc import Callable

import torch
from torch import Tensor

from krrst_fast.models import Network

STEPS = (10, 30, 100, 300, 1000, 3000)
"""Numbers of steps that are tried, beside the last one."""
VALIDATED = 2000
"""Held-out images at most."""


class EarlyStop:
    """The state of a network after the number of steps at which a score was best.

    Args:
        net: The network that is trained.
        score: Returns how good it is, in evaluation mode.
        last: Steps of the training.
    """

    def __init__(self, net: Network, score: Callable[[Network], float], last: int) -> None:
        self._net, self._score, self._step, self._last = net, score, 0, last
        self._tried = {*(step for step in STEPS if step < last), last}
        self._best: tuple[float, int, dict[str, Tensor]] | None = None

    def after_step(self) -> None:
        """Count a step, and score the network if it is one of those that are tried."""
        self._step += 1
        if self._step in self._tried:
            self._try()

    @property
    def before_last(self) -> int:
        """The last step but one that is tried, 0 if there is none."""
        return max((step for step in self._tried if step < self._last), default=0)

    def score_last(self) -> None:
        """Score the network as that of the last step, which it was given."""
        self._step = self._last
        self._try()

    def _try(self) -> None:
        self._net.eval()
        score = self._score(self._net)
        self._net.train()
        if self._best is None or score > self._best[0]:
            state = {name: value.clone() for name, value in self._net.state_dict().items()}
            self._best = score, self._step, state

    def take_best(self) -> int:
        """Give the network its best state, in evaluation mode; return the steps it had had."""
        assert self._best is not None
        _, steps, state = self._best
        self._net.load_state_dict(state)
        self._net.eval()
        return steps


def fitted_and_held_out(
    labelled: Tensor, count: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return images to fit a probe on, and others to score it on, all of them training images.

    Args:
        labelled: Positions of the images whose labels the methods may use [L], of `count`.
        count: All training images. Others than the labelled ones are scored on, at most 2,000,
            where there are any; else a random fifth of the labelled ones is.
        draw: Source of the random choice.
    """
    free = torch.ones(count, dtype=torch.bool)
    free[labelled] = False
    others = free.nonzero().flatten()
    if len(others):
        return labelled, others[torch.randperm(len(others), generator=draw)[:VALIDATED]]
    order = labelled[torch.randperm(len(labelled), generator=draw)]
    held = max(1, len(order) // 5)
    return order[held:], order[:held]
