"""Outer steps that a GPU replays: the bits of the same work uncaptured, and nothing waits."""

import pytest
import torch

from krrst_fast.distill import static
from krrst_fast.distill.static import StaticSteps
from tests.on_device import no_waits
from tests.test_distill_static import OPTIONS, RATE, made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]


def test_replays_have_the_bits_of_uncaptured_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "EVERY", 20)
    both = []
    for captures in (True, False):
        state, source = made(device="cuda", size=2, online_steps=9)
        steps = StaticSteps(state, source, RATE, **OPTIONS)
        steps.replays._captures = captures
        with steps.aside():
            losses = [steps().loss.clone() for _ in range(60)]
        assert steps.replays.failure == "" and len(steps.replays._graphs) == 4 * captures
        both.append((torch.stack(losses), state.x_syn.detach(), state.y_syn.detach()))
    assert sum(slot.generation for slot in state.pool.slots) > 3
    for one, other in zip(*both):
        assert torch.equal(one, other)


def test_a_replayed_step_waits_for_nothing() -> None:
    state, source = made(device="cuda", size=1, online_steps=1000)
    steps = StaticSteps(state, source, RATE, **OPTIONS)
    with steps.aside():
        for _ in range(3):
            steps()
        with no_waits():
            for _ in range(20):
                steps()
    assert state.x_syn.isfinite().all()
