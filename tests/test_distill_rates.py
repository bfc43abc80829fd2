"""Separate rates of images and targets: the same bits where they are one, and 0 leaves at rest."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.distill.step import LinearDecay, State, StepReport, outer_step
from krrst_fast.models import ModelConfig
from krrst_fast.runs.files import read_jsonl
from tests.test_distill_step import RATE, _run

AT_REST = LinearDecay(start=0.0, final=0.0, steps=10)
OTHER = LinearDecay(start=0.05, final=0.01, steps=4)


def _step(state: State, source, rate=RATE, rate_targets=None) -> StepReport:
    return outer_step(state, source, rate, rate_targets=rate_targets, ridge=1e-6, ridge_of="trace")


def _nodes(tensor: torch.Tensor) -> Iterator[torch.autograd.graph.Node]:
    """All nodes of the graph that a backward pass from a tensor goes through."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [parent for parent, _ in node.next_functions]


def test_two_groups_have_the_bits_of_one():
    state, source = _run(dtype=torch.float32)
    x_syn, y_syn = (t.detach().clone().requires_grad_() for t in (state.x_syn, state.y_syn))
    one = torch.optim.AdamW([x_syn, y_syn], weight_decay=0.0, fused=True)
    for _ in range(6):
        report = _step(state, source)
        one.param_groups[0]["lr"] = report.lr
        x_syn.grad, y_syn.grad = state.x_syn.grad.clone(), state.y_syn.grad.clone()
        one.step()
        assert torch.equal(state.x_syn, x_syn) and torch.equal(state.y_syn, y_syn)
    assert report.lr_targets == report.lr == RATE(5)


def test_each_rate_decays_by_itself():
    state, source = _run()
    reports = [_step(state, source, RATE, OTHER) for _ in range(3)]
    assert [report.lr for report in reports] == [RATE(0), RATE(1), RATE(2)]
    assert [report.lr_targets for report in reports] == [OTHER(0), OTHER(1), OTHER(2)]
    # The first step of AdamW is as long as the rate, in every entry.
    state, source = _run()
    before = state.x_syn.detach().clone(), state.y_syn.detach().clone()
    _step(state, source, RATE, OTHER)
    for now, then, rate in zip((state.x_syn, state.y_syn), before, (0.01, 0.05)):
        torch.testing.assert_close((now - then).abs().median().item(), rate, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rests", ["x_syn", "y_syn"])
def test_a_rate_of_0_leaves_values_and_spends_no_gradient(rests, monkeypatch):
    state, source = _run(dtype=torch.float32)
    moves = {"x_syn": "y_syn", "y_syn": "x_syn"}[rests]
    before = {name: getattr(state, name).detach().clone() for name in (rests, moves)}
    graphs = []
    backward = torch.Tensor.backward

    def noted(self, *args, **options):
        graphs.append({node.name().rstrip("0") for node in _nodes(self)})
        return backward(self, *args, **options)

    rates = (AT_REST, OTHER) if rests == "x_syn" else (OTHER, AT_REST)
    for _ in range(5):
        monkeypatch.setattr(torch.Tensor, "backward", noted)
        report = _step(state, source, *rates)
        monkeypatch.undo()
        assert getattr(state, rests).grad is None and getattr(state, moves).grad is not None
    assert torch.equal(getattr(state, rests), before[rests])
    assert not torch.equal(getattr(state, moves), before[moves])
    assert (report.lr, report.lr_targets) == tuple(rate(4) for rate in rates)
    # The backward pass of the outer loss comes first in a step, that of the pool's network second.
    convolves = any("Convolution" in name or "AtRest" in name for name in graphs[0])
    assert convolves == (rests == "y_syn")
    saved = state.state_dict()["optimizer"]["state"]
    assert list(saved) == [0 if rests == "y_syn" else 1]


def test_a_checkpoint_with_one_group_goes_on_with_the_same_bits():
    """That of a State before the rates were apart: one AdamW group of both tensors."""
    first, source = _run(dtype=torch.float32)
    for _ in range(3):
        _step(first, source)
    old = torch.optim.AdamW([first.x_syn, first.y_syn], lr=RATE(2), weight_decay=0.0, fused=True)
    old.state.update(first.optimizer.state)
    saved = copy.deepcopy({**first.state_dict(), "optimizer": old.state_dict()})
    assert [group["params"] for group in saved["optimizer"]["param_groups"]] == [[0, 1]]

    second, _ = _run(dtype=torch.float32)
    second.load_state_dict(saved)
    assert len(second.optimizer.param_groups) == 2
    for _ in range(5):
        assert torch.equal(_step(first, source).loss, _step(second, source).loss)
    assert torch.equal(first.x_syn, second.x_syn) and torch.equal(first.y_syn, second.y_syn)


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=8,
        batch_size=16,
        lr=0.0,
        lr_targets=0.01,
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=3,
        log_every=2,
        device="cpu",
    )


def test_real_images_with_learnt_targets(config):
    result = distill(config, progress=False)
    initial = load_distilled(config.out / "initial.safetensors")
    assert torch.equal(result.images, initial.images)
    moved = (result.targets - initial.targets).abs()
    assert 0 < moved.max() < 8 * 0.01 and (moved > 0).all()
    rows = read_jsonl(config.out / "metrics.jsonl")
    assert [row["lr"] for row in rows] == [0.0] * 4
    rate = LinearDecay(start=0.01, final=1e-5, steps=8)
    assert [row["lr_targets"] for row in rows] == [rate(step) for step in (1, 3, 5, 7)]


def test_learnt_images_with_the_targets_at_rest(config):
    result = distill(dataclasses.replace(config, lr=0.01, lr_targets=0.0), progress=False)
    initial = load_distilled(config.out / "initial.safetensors")
    assert torch.equal(result.targets, initial.targets)
    assert (result.images != initial.images).all()


def test_equal_rates_are_one_setting_in_bits_and_log(config, tmp_path):
    same = dataclasses.replace(config, lr=0.01, out=tmp_path / "same")
    one = dataclasses.replace(same, lr_targets=None, out=tmp_path / "one")
    results = [distill(run, progress=False) for run in (same, one)]
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].targets, results[1].targets)
    for run in (same, one):
        assert all("lr_targets" not in row for row in read_jsonl(run.out / "metrics.jsonl"))
