"""Outer steps on tensors that stay where they are: what a GPU can replay, with no host in between.

All that differs from step to step, which is the views and the rates, is copied into tensors that
stay, and renewed networks are written over those before them. So the work of a step is captured
once for each slot, and replayed. Nothing is read back at a step: one whose loss or gradients are
not finite changes no image, a network whose loss is far too large is neither trained on nor learnt
from, and both are noted on the device. The notes are read every `EVERY` steps, wherever a run is
logged or saved, so that a run that was resumed does what one that was not stopped does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from krrst_fast.distill.arithmetic import RunTarget
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.optimizers import hold_rates, release_rates, set_rate
from krrst_fast.distill.pool import Slot, is_well
from krrst_fast.distill.source import Choice, Source
from krrst_fast.distill.step import Rate, State, StepReport, located, regression
from krrst_fast.errors import NonFiniteError
from krrst_fast.models.functional import is_functional
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.runs.capture import Replays

EVERY = 50
"""Steps after which the notes are read."""
_FAILED, _DIVERGED, _AGE = range(3)
"""Rows of the notes: the number of the first outer step that failed, and of the first SGD step that
diverged, 0 for none; and how many SGD steps the network had had then."""


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
    """Takes outer steps as `outer_step` does: on a CPU with the same bits while nothing fails.

    GPUs read rates in float32. Steps are taken within `aside`.

    Args:
        state: Of the run; while steps are taken its optimisers have rates that are tensors, and its
            pool is renewed in place.
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
        self._skips = torch.zeros((), device=device)
        """1 where the update that comes next is left out, as fused optimisers read it."""
        self._now = torch.zeros(2, dtype=torch.int64, device=device)
        """The number of the step, from 1 on, and the SGD steps that its network has had."""
        if state.notes is None:
            state.notes = torch.zeros(3, len(state.pool.slots) + 1, dtype=torch.int64)
        state.notes = state.notes.to(device)
        """[3, slots + 1]; the last column is of the first step with target outputs that fail."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hold everything in place, on the stream that all steps must be taken on; then let go."""
        state = self.state
        optimizers = [state.optimizer, *(slot.optimizer for slot in state.pool.slots)]
        with self.replays.aside(), state.pool.in_place():
            for optimizer in optimizers:
                hold_rates(optimizer)
                optimizer.found_inf = self._skips  # type: ignore[attr-defined]
            try:
                yield
            finally:
                for optimizer in optimizers:
                    del optimizer.found_inf  # type: ignore[attr-defined]
                    release_rates(optimizer)
                for slot in state.pool.slots:
                    for group in slot.optimizer.param_groups:
                        group["lr"] = state.pool.lr

    def __call__(self) -> StepReport:
        """Take a step; its measurements are on the device, and change with the next step."""
        state, pool = self.state, self.state.pool
        drawn = self._source.choose(state.step, state.generator)
        slot = pool.draw(state.generator)
        self._take(drawn.to(state.x_syn.device))
        rates = [rate(state.step) for rate in self._rates]
        pairs = zip((state.x_syn, state.y_syn), state.optimizer.param_groups, rates, strict=True)
        for parameter, group, rate in pairs:
            set_rate(group, rate)
            if parameter.requires_grad != (rate > 0):
                parameter.requires_grad_(rate > 0)
                self.replays.forget()
        self._now[0].fill_(state.step + 1)
        self._now[1].fill_(slot.age)
        loss, solve = self.replays.run(("outer", slot.number), lambda: self._outer(slot))
        age = slot.age
        if not pool.is_due(slot):
            self.replays.run(("fit", slot.number), lambda: self._fit(slot))
            slot.age += 1
        elif not self._settle(slot):
            pool.renew(slot)
        state.step += 1
        if state.step % EVERY == 0:
            self._settle()
        return StepReport(
            loss=loss,
            solve=solve,
            slot=slot.number,
            slot_age=age,
            lr=rates[0],
            lr_targets=rates[1],
        )

    def settle(self, last: StepReport) -> None:
        """Do nothing: when the notes are read does not depend on who asks."""

    def _settle(self, *slots: Slot) -> bool:
        """Read the notes, and start the networks again that are to blame; return if there were any.

        Args:
            slots: Whose notes to read; all of them, if none is given.

        Raises:
            NonFiniteError: No network is: the images, the targets, the target's outputs, or the
                loss of an untrained network are not finite. No step that failed has changed them.
        """
        state, notes = self.state, self.state.notes
        assert notes is not None
        read = notes.tolist()
        if at := read[_FAILED][-1]:
            raise NonFiniteError(f"distill: step {at}: the target's outputs hold NaN or infinity")
        chosen = slots or state.pool.slots
        # The first failure first: it is the one that is raised.
        noted = [one for one in chosen if read[_FAILED][one.number] or read[_DIVERGED][one.number]]
        noted.sort(key=lambda one: read[_FAILED][one.number] or read[_DIVERGED][one.number])
        if not noted:
            return False
        for slot in noted:
            slot.age = read[_AGE][slot.number]
            notes[:, slot.number].zero_()
        first = noted[0].number
        words = "the network's own loss is not finite or far too large; lower pool.lr"
        if read[_FAILED][first]:
            words = "the loss, or its gradient, holds NaN or infinity"
        with located(read[_FAILED][first] or read[_DIVERGED][first], noted[0]):
            state.pool.start_again(
                noted[0], NonFiniteError(words), state.x_syn, state.y_syn, also=noted[1:]
            )
        return True

    def _take(self, drawn: Choice) -> None:
        if self._choice is None:
            self._choice = Choice(*(part.clone() for part in drawn))
            return
        for there, new in zip(self._choice, drawn):
            there.copy_(new)

    def _note(self, row: int, column: int, fails: Tensor, steps: int = 0) -> None:
        """Note the number of the step, where it is the first that fails, and the network's age.

        Args:
            row: Of the notes.
            column: Of the notes.
            fails: Whether it fails, a bool on the device.
            steps: SGD steps that the network has had in this outer step.
        """
        assert self.state.notes is not None
        first = fails & (self.state.notes[:_AGE, column].sum() == 0)
        for where, value in ((row, self._now[0]), (_AGE, self._now[1] + steps)):
            note = self.state.notes[where, column]
            note.copy_(torch.where(first, value, note))

    def _outer(self, slot: Slot) -> tuple[Tensor, SolveInfo]:
        """Compute the loss and its gradients, and move the images and targets by them."""
        state = self.state
        assert self._choice is not None and state.notes is not None
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
        finite = torch.stack([torch.isfinite(x).all() for x in (loss.detach(), *gradients)]).all()
        wrong = ~torch.isfinite(y_real).all()
        diverged = state.notes[_DIVERGED, slot.number] > 0
        self._skips.copy_(~finite | wrong | diverged)
        state.optimizer.step()
        self._note(_FAILED, -1, wrong)
        self._note(_FAILED, slot.number, ~finite & ~wrong)
        return loss.detach(), solve

    def _fit(self, slot: Slot) -> None:
        """Make an SGD step of the slot's network."""
        x_syn, y_syn = self.state.x_syn.detach(), self.state.y_syn.detach()

        def guard(loss: Tensor) -> None:
            assert self.state.notes is not None
            self._note(_DIVERGED, slot.number, ~is_well(loss, y_syn), steps=1)
            self._skips.copy_(self.state.notes[:_AGE, slot.number].sum() > 0)

        slot.update(x_syn, y_syn, guard)
