"""Outer steps on tensors that stay where they are: what a GPU can replay, with no host in between.

All that differs from step to step, which is the views and the rates, is copied into tensors that
stay, and renewed networks are written over those before them. So the work of a step is captured
once for each slot, and replayed. Nothing is read back: a step whose loss or gradient is not finite
changes no image, a network whose loss is far too large is not trained, and both are noted on the
device until `settle` reads them.
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from krrst_fast.distill.arithmetic import RunTarget
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.pool import Slot, is_well
from krrst_fast.distill.source import Choice, Source
from krrst_fast.distill.step import Rate, State, StepReport, located, regression
from krrst_fast.errors import NonFiniteError
from krrst_fast.models.functional import is_functional
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.runs.capture import Replays


def refusal(config: DistillConfig, state: State, source: Source) -> str:
    """Return why the steps of a run cannot be replayed, or nothing."""
    device, network = state.x_syn.device, state.pool.slots[0].network
    if device.type != "cuda":
        return f"the device is {device}, not a GPU"
    if config.solver.check != "flag":
        return "solver.check is raise, for which each step waits for its loss"
    if not is_functional(network) or network.draws:
        return "the pool's networks are not built in, or have dropout"
    if isinstance(source.represent, RunTarget) and not source.represent.is_known:
        return "the target is not built in, and its outputs are not kept"
    return ""


class StaticSteps:
    """Takes outer steps as `outer_step` does, and with the same bits while nothing fails.

    Args:
        state: Of the run; its optimisers get rates that are tensors, and its pool is renewed in
            place, from now on.
        source: The real images.
        rate: Of the images.
        rate_targets: Of the targets; left out it is that of the images.
        ridge: As of `krr_mse`.
        ridge_of: As of `krr_mse`.
        solver: As of `krr_mse`; nothing is raised whatever its `check`.
    """

    def __init__(
        self,
        state: State,
        source: Source,
        rate: Rate,
        *,
        rate_targets: Rate | None = None,
        ridge: float,
        ridge_of: RidgeOf,
        solver: Solver = DEFAULT,
    ) -> None:
        self.state, self._source = state, source
        self._rates = (rate, rate_targets or rate)
        self._ridge, self._ridge_of = ridge, ridge_of
        self._solver = replace(solver, check="flag")
        device = state.x_syn.device
        self.replays = Replays(device, "distill: the outer step")
        self._choice: Choice | None = None
        size = len(state.pool.slots)
        self._skips = torch.zeros((), device=device)
        """1 where the update that comes next is left out, as fused optimisers read it."""
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        """Of the step, from 1 on."""
        self._failed = torch.zeros(size, dtype=torch.int64, device=device)
        """By slot, the number of the first step with it that failed, 0 for none."""
        self._diverged = torch.zeros(size, dtype=torch.bool, device=device)
        self._keep_in_place()

    def _keep_in_place(self) -> None:
        state = self.state
        for parameter, rate in zip((state.x_syn, state.y_syn), self._rates):
            parameter.requires_grad_(rate(0) > 0)
        _hold_rates(state.optimizer)
        state.optimizer.found_inf = self._skips  # type: ignore[attr-defined]
        state.pool.stays_in_place()
        for slot in state.pool.slots:
            _hold_rates(slot.optimizer)
            slot.optimizer.found_inf = self._skips  # type: ignore[attr-defined]

    def aside(self) -> AbstractContextManager[Any]:
        """Return a context of the stream that all steps must be taken on."""
        return self.replays.aside()

    def __call__(self) -> StepReport:
        """Take a step; its measurements are on the device, and change with the next step."""
        state, pool = self.state, self.state.pool
        drawn = self._source.choose(state.step, state.generator)
        slot = pool.draw(state.generator)
        self._take(drawn.to(state.x_syn.device))
        rates = [rate(state.step) for rate in self._rates]
        for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        self._number.fill_(state.step + 1)
        loss, solve = self.replays.run(("outer", slot.number), lambda: self._outer(slot))
        age = slot.age
        if pool.is_due(slot):
            pool.renew(slot)
        else:
            self.replays.run(("fit", slot.number), lambda: self._fit(slot))
            slot.age += 1
        state.step += 1
        return StepReport(
            loss=loss,
            solve=solve,
            slot=slot.number,
            slot_age=age,
            lr=rates[0],
            lr_targets=rates[1],
        )

    def settle(self, last: StepReport) -> None:
        """Read what failed since the last call, and start the networks again that are to blame.

        Args:
            last: The report of the last step, which is not looked at.

        Raises:
            NonFiniteError: No network is: the images or targets, or the loss of an untrained one,
                are not finite. No step that failed has changed anything.
        """
        failed, diverged = self._failed.tolist(), self._diverged.tolist()
        self._failed.zero_()
        self._diverged.zero_()
        told = zip(self.state.pool.slots, failed, diverged)
        # The first failure first: it is the one that is raised.
        for slot, at, own in sorted(told, key=lambda one: one[1]):
            if not at and not own:
                continue
            words = "the network's own loss is not finite or far too large; lower pool.lr"
            if at:
                words = "the loss, or its gradient, holds NaN or infinity"
            with located(at or self.state.step, slot):
                self.state.pool.start_again(
                    slot, NonFiniteError(words), self.state.x_syn, self.state.y_syn
                )

    def _take(self, drawn: Choice) -> None:
        if self._choice is None:
            self._choice = Choice(*(part.clone() for part in drawn))
            return
        for there, new in zip(self._choice, drawn):
            there.copy_(new)

    def _outer(self, slot: Slot) -> tuple[Tensor, SolveInfo]:
        """Compute the loss and its gradients, and move the images and targets by them."""
        state = self.state
        assert self._choice is not None
        x_real, y_real = self._source.batch(self._choice)
        loss, solve = regression(
            slot,
            *(state.x_syn, state.y_syn, x_real, y_real),
            ridge=self._ridge,
            ridge_of=self._ridge_of,
            solver=self._solver,
        )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [x.grad for x in (state.x_syn, state.y_syn) if x.grad is not None]
        finite = [torch.isfinite(x).all() for x in (loss.detach(), *gradients)]
        fails = ~torch.stack(finite).all()
        self._skips.copy_(fails)
        state.optimizer.step()
        first = self._failed[slot.number]
        first.copy_(torch.where(fails & (first == 0), self._number, first))
        return loss.detach(), solve

    def _fit(self, slot: Slot) -> None:
        """Make an SGD step of the slot's network."""
        x_syn, y_syn = self.state.x_syn.detach(), self.state.y_syn.detach()

        def guard(loss: Tensor) -> None:
            fails = ~is_well(loss, y_syn)
            self._skips.copy_(fails)
            self._diverged[slot.number].logical_or_(fails)

        slot.update(x_syn, y_syn, guard)


def _hold_rates(optimizer: torch.optim.Optimizer) -> None:
    """Make the rates of an optimiser tensors, which its fused kernels read on their device."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        # On a CPU the number that a float would be; GPUs read float32.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        group["lr"] = torch.tensor(float(group["lr"]), dtype=dtype, device=device)
        if "capturable" in group:
            group["capturable"] = device.type == "cuda"
