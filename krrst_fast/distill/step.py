"""One iteration of the algorithm, and the state that it moves on."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.distill.pool import Pool, Slot
from krrst_fast.distill.source import Source
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.krr import krr_mse
from krrst_fast.ops.options import RidgeOf


@dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """A rate that falls in a straight line from `start` at step 0 to `final` at step `steps`."""

    start: float
    final: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.final - self.start) * min(step / self.steps, 1.0)


class State:
    """All that an outer step changes.

    Attributes:
        step: the outer steps done.
        x_syn: the synthetic images [M, C, H, W], a leaf with gradient.
        y_syn: their targets [M, P], a leaf with gradient.
        optimizer: AdamW on these two, without weight decay.
        pool: the networks.
        generator: draws slots and views.
    """

    def __init__(
        self, x_syn: Tensor, y_syn: Tensor, pool: Pool, generator: torch.Generator
    ) -> None:
        self.step = 0
        self.x_syn = x_syn.detach().clone().requires_grad_(True)
        self.y_syn = y_syn.detach().clone().requires_grad_(True)
        self.optimizer = torch.optim.AdamW([self.x_syn, self.y_syn], weight_decay=0.0, fused=True)
        self.pool = pool
        self.generator = generator

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, from which `load_state_dict` goes on with the same bits."""
        return {
            "step": self.step,
            "x_syn": self.x_syn.detach(),
            "y_syn": self.y_syn.detach(),
            "optimizer": self.optimizer.state_dict(),
            "pool": self.pool.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.step = state["step"]
        with torch.no_grad():
            self.x_syn.copy_(state["x_syn"])
            self.y_syn.copy_(state["y_syn"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.pool.load_state_dict(state["pool"])
        self.generator.set_state(state["generator"].cpu())


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What an outer step saw. Its tensors are left on the device."""

    loss: Tensor
    solve: SolveInfo
    """Ridge, retries and an estimate of the condition number."""
    slot: int
    slot_age: int
    """SGD steps the network had had when its features were taken."""
    lr: float


def outer_step(
    state: State, source: Source, rate: LinearDecay, *, ridge: float, ridge_of: RidgeOf
) -> StepReport:
    """The body of Algorithm 1 of KRR-ST. Moves `state` on by one step.

    Raises:
        NonFiniteError: the loss is NaN or infinite, or the network's training diverged.
        NotPositiveDefiniteError: the gram has no factor even with a larger ridge.
    """
    x_syn, y_syn = state.x_syn, state.y_syn  # [M, C, H, W], [M, P]
    x_real, y_real = source.draw(state.step, state.generator)  # [B, C, H, W], [B, P]
    slot = state.pool.draw(state.generator)
    age, lr = slot.age, rate(state.step)

    # A network at rest is in evaluation mode and its parameters ask for no gradient.
    f_syn = slot.network.embed(x_syn)  # [M, D]
    with torch.no_grad():
        f_real = slot.network.embed(x_real)  # [B, D]

    with located(state.step + 1, slot):
        loss, solve = krr_mse(
            f_syn, y_syn, f_real, y_real, ridge=ridge, ridge_of=ridge_of, bias=1.0, return_info=True
        )
        require_finite(loss)

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    set_rate(state.optimizer, lr)
    state.optimizer.step()

    with located(state.step + 1, slot):
        state.pool.advance(slot, x_syn.detach(), y_syn.detach())
    state.step += 1
    return StepReport(
        loss=loss.detach(),
        solve=solve,
        slot=slot.number,
        slot_age=age,
        lr=lr,
    )


@contextmanager
def located(step: int, slot: Slot) -> Iterator[None]:
    """Say in a numerical error which step and which network it was."""
    try:
        yield
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        where = f"distill: step {step}, slot {slot.number} (after {slot.age} SGD steps)"
        raise type(error)(f"{where}: {error}") from error


def require_finite(loss: Tensor) -> None:
    """Raise NonFiniteError if the loss is NaN or infinite."""
    if not torch.isfinite(loss):
        raise NonFiniteError(f"the loss is {loss.item()}")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
