"""One iteration of the algorithm, and the state that it moves on."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.distill.optimizers import plain_state
from krrst_fast.distill.pool import Pool, Slot
from krrst_fast.distill.source import Source
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.krr import krr_mse
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.runs.environment import solving_device

Rate = Callable[[int], float]
"""The learning rate of an outer step, by its number from 0 on."""


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
        step: The outer steps done.
        x_syn: The synthetic images [M, C, H, W], a leaf with gradient unless its rate is 0.
        y_syn: Targets of x_syn [M, P], likewise.
        optimizer: AdamW without weight decay, a group for each of these two.
        pool: The networks.
        generator: Draws slots and views.
        notes: What failed on the device and was not read yet, where steps are `static`.
    """

    def __init__(
        self, x_syn: Tensor, y_syn: Tensor, pool: Pool, generator: torch.Generator
    ) -> None:
        self.step = 0
        self.x_syn = x_syn.detach().clone().requires_grad_(True)
        self.y_syn = y_syn.detach().clone().requires_grad_(True)
        groups = [{"params": [self.x_syn]}, {"params": [self.y_syn]}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.pool = pool
        self.generator = generator
        self.notes: Tensor | None = None

    def settle(self) -> None:
        """Read how the last SGD step of the pool went, as `Pool.settle` does."""
        if self.pool.unsettled is not None:
            with located(self.step, self.pool.unsettled.slot):
                self.pool.settle()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors: `load_state_dict` goes on from them with the same bits.

        Raises:
            NonFiniteError: The synthetic set holds NaN or infinity.
        """
        for name, tensor in (("images", self.x_syn), ("targets", self.y_syn)):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"distill: the {name} hold NaN or infinity at step {self.step}"
                )
        noted = {} if self.notes is None else {"notes": self.notes.cpu()}
        return noted | {
            "step": self.step,
            "x_syn": self.x_syn.detach(),
            "y_syn": self.y_syn.detach(),
            "optimizer": plain_state(self.optimizer),
            "pool": self.pool.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        with torch.no_grad():
            self.x_syn.copy_(state["x_syn"])
            self.y_syn.copy_(state["y_syn"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self.optimizer.load_state_dict(copy.deepcopy(_two_groups(state["optimizer"])))
        self.pool.load_state_dict(state["pool"])
        self.generator.set_state(state["generator"].cpu())
        self.notes = state.get("notes")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Measurements of an outer step; tensors stay on the device."""

    loss: Tensor
    solve: SolveInfo
    """Ridge, retries and an estimate of the condition number."""
    slot: int
    slot_age: int
    """SGD steps the network had had when its features were taken."""
    lr: float
    """The rate of the images."""
    lr_targets: float
    """The rate of the targets."""

    def values(self, pool_lr: float) -> dict[str, float]:
        """Return what the log keeps of the step, and of the rate of the pool."""
        measured = {
            "loss": float(self.loss),
            "ridge": float(self.solve.ridge),
            "condition": float(self.solve.condition),
        }
        apart = {} if self.lr_targets == self.lr else {"lr_targets": self.lr_targets}
        return {
            # Of a step that failed, and changed nothing, there are none.
            **{name: value for name, value in measured.items() if math.isfinite(value)},
            "retries": int(self.solve.retries),
            "slot": self.slot,
            "slot_age": self.slot_age,
            "lr": self.lr,
            **apart,
            "pool_lr": pool_lr,
        }


def outer_step(
    state: State,
    source: Source,
    rate: Rate,
    *,
    rate_targets: Rate | None = None,
    ridge: float,
    ridge_of: RidgeOf,
    solver: Solver = DEFAULT,
    mirrored: bool = False,
    penalty: Callable[[Tensor], Tensor] | None = None,
) -> StepReport:
    """Take one step of Algorithm 1 of KRR-ST, in place on `state`.

    `rate` is that of the images, and of the targets too unless `rate_targets` is given. What has a
    rate of 0 stays as it is, and no gradient to it is computed.

    With solver.check="flag" the loss is not read: after a failure it is NaN, in this step and, as
    the images are then NaN too, in every later one.

    With `mirrored` the regression is from the images and their mirror images, of the same targets.
    `penalty`, a scalar that is computed from the targets, is added to what the step makes smaller,
    and not to the loss that is reported.

    A network whose features, or gradients through it, are not finite or too large starts again, and
    the step is taken with it as new.

    Raises:
        NonFiniteError: The loss or a gradient is NaN or infinite, or networks diverge at any rate.
        NotPositiveDefiniteError: The Cholesky factorisation fails with the largest ridge.
    """
    x_syn, y_syn = state.x_syn, state.y_syn  # [M, C, H, W], [M, P]
    x_real, y_real = source.draw(state.step, state.generator)  # [B, C, H, W], [B, P]
    slot = state.pool.draw(state.generator)
    lr = rate(state.step)
    lr_targets = lr if rate_targets is None else rate_targets(state.step)
    x_syn.requires_grad_(lr > 0)
    y_syn.requires_grad_(lr_targets > 0)
    if state.pool.unsettled is not None and state.pool.unsettled.slot is slot:
        state.settle()

    def loss_and_gradients() -> tuple[Tensor, SolveInfo]:
        x, y = x_syn, y_syn
        if mirrored:
            x, y = torch.cat((x, x.flip(-1))), torch.cat((y, y))
        loss, solve = regression(
            *(slot, x, y, x_real, y_real), ridge=ridge, ridge_of=ridge_of, solver=solver
        )
        state.optimizer.zero_grad(set_to_none=True)
        (loss if penalty is None else loss + penalty(y_syn)).backward()
        if solver.check == "raise":
            # Float16 overflows in a backward pass too, and AdamW would ruin the images by it.
            require_finite(loss, x_syn.grad, y_syn.grad)
        return loss.detach(), solve

    with located(state.step + 1, slot):
        try:
            loss, solve = loss_and_gradients()
        except NonFiniteError as error:
            # The network's last SGD step was too long; its own loss would tell at the next one.
            state.settle()
            state.pool.start_again(slot, error, x_syn, y_syn, y_real)
            loss, solve = loss_and_gradients()
    age = slot.age

    set_rates(state.optimizer, lr, lr_targets)
    state.optimizer.step()

    state.settle()
    with located(state.step + 1, slot):
        state.pool.advance(slot, x_syn.detach(), y_syn.detach())
    state.step += 1
    return StepReport(
        loss=loss,
        solve=solve,
        slot=slot.number,
        slot_age=age,
        lr=lr,
        lr_targets=lr_targets,
    )


def regression(
    slot: Slot,
    x_syn: Tensor,
    y_syn: Tensor,
    x_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float,
    ridge_of: RidgeOf,
    solver: Solver,
) -> tuple[Tensor, SolveInfo]:
    """Return the outer loss: of the regression from synthetic features to targets, on real images.

    Args:
        slot: Its network gives the features.
        x_syn: Synthetic images [M, C, H, W].
        y_syn: Their targets [M, P].
        x_real: Real images [B, C, H, W].
        y_real: The target's outputs on them [B, P].
        ridge: As of `krr_mse`.
        ridge_of: As of `krr_mse`.
        solver: As of `krr_mse`.
    """
    # A network at rest is in evaluation mode and its parameters ask for no gradient.
    f_syn = slot.embed(x_syn)  # [M, D]
    with torch.no_grad():
        f_real = slot.embed(x_real)  # [B, D]
    solving = solving_device(x_syn.device)
    f_syn, y_syn, f_real, y_real = (x.to(solving) for x in (f_syn, y_syn, f_real, y_real))
    return krr_mse(
        *(f_syn, y_syn, f_real, y_real),
        ridge=ridge,
        ridge_of=ridge_of,
        bias=1.0,
        solver=solver,
        return_info=True,
    )


@contextmanager
def located(step: int, slot: Slot) -> Iterator[None]:
    """Name the step and the network in a numerical error."""
    try:
        yield
    except (NonFiniteError, NotPositiveDefiniteError) as error:
        where = f"distill: step {step}, slot {slot.number} (after {slot.age} SGD steps)"
        raise type(error)(f"{where}: {error}") from error


def require_finite(loss: Tensor, *gradients: Tensor | None) -> None:
    """Raise NonFiniteError if the loss, or a gradient of it, holds NaN or infinity."""
    tensors = [loss, *(one for one in gradients if one is not None)]
    # One bool, so that the device is waited for once.
    if not torch.stack([torch.isfinite(one).all() for one in tensors]).all():
        text = f"the loss is {loss.item()}"
        more = ", and its gradient holds NaN or infinity" if torch.isfinite(loss) else ""
        raise NonFiniteError(text + more)


def set_rates(optimizer: torch.optim.Optimizer, *rates: float) -> None:
    """Give each parameter group its learning rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _two_groups(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with the single group of earlier versions split in two."""
    groups = saved["param_groups"]
    if len(groups) == 1:
        groups = [{**groups[0], "params": [number]} for number in groups[0]["params"]]
    return {**saved, "param_groups": groups}
