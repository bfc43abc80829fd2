"""RidgeHead: episodes and probes, against the formula written out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from krrst_fast import RidgeHead, Solver
from tests.helpers import assert_equal, problem


def episodes(*lead: int, m: int, d: int, b: int, p: int) -> list[Tensor]:
    """F_s, Y_s, F_q [*lead, ...] in float64 of as many different problems."""
    count = int(torch.tensor(lead).prod()) if lead else 1
    parts = zip(*(problem(m, d, b, p, seed=seed)[:3] for seed in range(count)))
    return [torch.stack(part).unflatten(0, lead) if lead else part[0] for part in parts]


def formula(f: Tensor, y: Tensor, q: Tensor, ridge: Any, scale: float, bias: float) -> Tensor:
    """Q X^T (X X^T + ridge I)^-1 Y, of the kernel scale <x, y> + bias."""
    k = scale * f @ f.mT + bias + ridge * torch.eye(f.shape[-2], dtype=f.dtype)
    return (scale * q @ f.mT + bias) @ torch.linalg.inv(k) @ y


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("scale, bias", [(1.0, 0.0), (0.5, 2.0)])
def test_an_episode_is_the_formula(lead: tuple[int, ...], scale: float, bias: float) -> None:
    tensors = [x.requires_grad_() for x in episodes(*lead, m=6, d=11, b=4, p=3)]
    head = RidgeHead(ridge=0.3, learn_ridge=True, calibrate=True, scale=scale, bias=bias).double()
    with torch.no_grad():
        head.output_scale.fill_(1.7)
        head.output_shift.fill_(-0.2)
    leaves = [*tensors, *head.parameters()]
    log_ridge, output_scale, output_shift = leaves[3:]
    exact = output_scale * formula(*tensors, log_ridge.exp(), scale, bias) + output_shift
    logits = head(*tensors)
    assert_equal(logits, exact, 1e-10)
    target = torch.randn(exact.shape, dtype=exact.dtype)
    got, wanted = (
        torch.autograd.grad((x - target).square().sum(), leaves) for x in (logits, exact)
    )
    for name, ours, theirs in zip(("f", "y", "q", "ridge", "scale", "shift"), got, wanted):
        assert_equal(ours, theirs, 1e-9, name)


@pytest.mark.parametrize("detach", [True, False])
def test_a_ridge_of_the_trace(detach: bool) -> None:
    f, y, q = episodes(m=6, d=11, b=4, p=3)
    f.requires_grad_()
    trace = f.square().sum()
    exact = formula(f, y, q, 0.1 * (trace.detach() if detach else trace) / 6, 1.0, 0.0)
    head = RidgeHead(ridge=0.1, ridge_of="mean_diagonal", detach_ridge=detach)
    logits = head(f, y, q)
    assert_equal(logits, exact, 1e-10)
    got, wanted = (torch.autograd.grad(x.square().sum(), f)[0] for x in (logits, exact))
    assert_equal(got, wanted, 1e-9)


def test_labels_become_rows_of_zero_and_one() -> None:
    f, _, q = episodes(4, m=6, d=11, b=5, p=1)
    labels = torch.randint(0, 3, (4, 6))
    head = RidgeHead(num_classes=3)
    assert torch.equal(head(f, labels, q), head(f, functional.one_hot(labels, 3).double(), q))
    assert torch.equal(head(f, labels.int(), q), head(f, labels, q))
    head.fit(f, labels)
    assert_equal(head(q), head(f, labels, q), 1e-12)


def test_a_learnt_ridge_and_calibration_lower_the_loss_of_queries() -> None:
    # Noisy targets of few rows: a ridge of 1e-3 fits the noise.
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 3, generator=generator)
    f, q = (torch.randn(16, n, 20, generator=generator) for n in (10, 30))
    y = f @ truth + 3 * torch.randn(16, 10, 3, generator=generator)
    head = RidgeHead(ridge=1e-3, learn_ridge=True, calibrate=True)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = functional.mse_loss(head(f, y, q), q @ truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert head.ridge > 1e-3
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.isfinite(x.grad).all() for x in head.parameters())


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_probe_is_kept_saved_and_loaded(lead: tuple[int, ...], tmp_path: Path) -> None:
    f, y, q = episodes(*lead, m=20, d=5, b=4, p=3)
    settings = {"ridge": 0.3, "bias": 1.0, "calibrate": True, "learn_ridge": True}
    head = RidgeHead(**settings).double().fit(f, y)
    with torch.no_grad():
        head.output_scale.fill_(3.0)
    exact = 3 * formula(f, y, q, head.ridge, 1.0, 1.0)
    assert_equal(head(q), exact, 1e-10)
    assert_equal(head.weights.shape and head.predict(q), exact, 1e-10)
    torch.save(nn.Sequential(nn.Identity(), head).state_dict(), tmp_path / "head.pt")
    state = torch.load(tmp_path / "head.pt", weights_only=True)
    assert {"1.weights", "1.intercept", "1.log_ridge"} < set(state)
    fresh = nn.Sequential(nn.Identity(), RidgeHead(**settings))
    fresh.load_state_dict(state)
    assert fresh[1].weights.dtype == torch.float64
    assert_equal(fresh(q), exact, 1e-6)  # its calibration is float32
    smaller = RidgeHead(**settings).double().fit(f[..., :2], y[..., :1])
    smaller.load_state_dict(head.state_dict())
    assert torch.equal(smaller(q), head(q))
    assert smaller.weights.dtype == torch.float64
    single = RidgeHead(**settings).fit(f[..., :2].float(), y.float())
    single.load_state_dict(head.state_dict())  # keeps its dtype, as every module does
    assert_equal(single(q.float()).double(), exact, 1e-5)
    assigned = RidgeHead(**settings)
    assigned.load_state_dict(head.state_dict(), assign=True)
    assert torch.equal(assigned(q), head(q))
    with pytest.raises(RuntimeError, match="Missing key.*weights"):
        head.load_state_dict(RidgeHead(**settings).state_dict())
    assert torch.equal(copy.deepcopy(head)(q), head(q))


def test_a_fit_records_no_gradient_and_a_prediction_does() -> None:
    f, y, q = episodes(m=20, d=5, b=4, p=3)
    head = RidgeHead(learn_ridge=True).double().fit(f.requires_grad_(), y)
    assert not head.weights.requires_grad
    assert torch.autograd.gradcheck(head, q.requires_grad_())
    assert RidgeHead().state_dict() == {}
    assert list(RidgeHead().parameters()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    torch._dynamo.reset()
    f, _, q = episodes(4, m=6, d=11, b=5, p=1)
    labels = torch.randint(0, 3, (4, 6))
    head = RidgeHead(num_classes=3, learn_ridge=True, calibrate=True).double()
    compiled = torch.compile(head, backend=backend, fullgraph=True)
    results = []
    for call in (head, compiled):
        leaf = f.clone().requires_grad_()
        logits = call(leaf, labels, q)
        leaves = [leaf, *head.parameters()]
        results.append([logits, *torch.autograd.grad(logits.square().sum(), leaves)])
    for got, exact in zip(*results):
        assert_equal(got, exact, 1e-12)
    head.fit(f, labels)
    assert_equal(torch.compile(head, backend=backend, fullgraph=True)(q), head(q), 1e-12)


def test_autocast_and_half_features_reach_neither_solve_nor_probe() -> None:
    f, y, q = (x.bfloat16() for x in episodes(4, m=6, d=11, b=5, p=3))
    head = RidgeHead(ridge=0.1, bias=1.0)
    exact = formula(f.double(), y.double(), q.double(), 0.1, 1.0, 1.0)
    f.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(f, y.float(), q)
        probe = head.fit(f, y.float())(q)
        outside = head(f.float(), y.float(), q.float())
    assert logits.dtype == probe.dtype == torch.float32
    assert_equal(logits.double(), exact, 1e-4)
    assert_equal(probe.double(), exact, 1e-4)
    assert_equal(outside.double(), exact, 1e-4)
    (gradient,) = torch.autograd.grad(logits.square().sum(), f)
    assert gradient.dtype == torch.bfloat16
    leaf = f.detach().double().requires_grad_()
    wanted = torch.autograd.grad(
        formula(leaf, y.double(), q.double(), 0.1, 1.0, 1.0).square().sum(), leaf
    )[0]
    assert_equal(gradient.double(), wanted, 2**-7)  # rounded once to 8 bits


def test_vmap_is_the_batch() -> None:
    f, _, q = episodes(4, m=6, d=11, b=5, p=1)
    labels = torch.randint(0, 3, (4, 6))
    head = RidgeHead(num_classes=3, calibrate=True, learn_ridge=True)
    assert_equal(torch.func.vmap(head)(f, labels, q), head(f, labels, q), 1e-12)
    head.fit(f[0], labels[0])
    assert_equal(torch.func.vmap(head)(q), head(q), 1e-12)


@pytest.mark.parametrize("precision", ["float64", "float32", "fast"])
def test_precision_is_that_of_the_computation(precision: str) -> None:
    f, y, q = (x.float() for x in episodes(2, m=6, d=11, b=5, p=3))
    head = RidgeHead(solver=Solver(precision=precision), ridge=0.1)
    logits = head(f, y, q)
    assert logits.dtype == head.fit(f, y).weights.dtype == torch.float32
    assert_equal(head(q), logits, 1e-5)
    exact = formula(f.double(), y.double(), q.double(), 0.1, 1.0, 0.0)
    assert_equal(logits.double(), exact, 1e-2 if precision == "fast" else 1e-5)


def test_flagged_failures_are_nan_where_they_happened() -> None:
    f, y, q = episodes(3, m=6, d=11, b=5, p=3)
    f[1, 2, 3] = torch.nan
    logits = RidgeHead(solver=Solver(check="flag"))(f, y, q)
    assert logits.isnan().all(-1).all(-1).tolist() == [False, True, False]
    assert_equal(logits[::2], formula(f, y, q, 1.0, 1.0, 0.0)[::2], 1e-10)


def test_its_text_says_what_it_is() -> None:
    head = RidgeHead(ridge=0.5, learn_ridge=True, calibrate=True, num_classes=3)
    text = "ridge=0.5, ridge_of='absolute', scale=1.0, bias=0.0, learn_ridge=True, calibrate=True"
    assert repr(head) == f"RidgeHead({text}, num_classes=3)"
    head.fit(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert repr(head) == f"RidgeHead({text}, num_classes=3, probe=[4, 3])"


def test_bad_input_is_named() -> None:
    f, labels = torch.eye(3), torch.tensor([0, 1, 2])
    head = RidgeHead(num_classes=3)
    with pytest.raises(ValueError, match="RidgeHead: ridge must be positive"):
        RidgeHead(ridge=0.0)
    with pytest.raises(TypeError, match="RidgeHead: ridge must be a number; learn_ridge=True"):
        RidgeHead(ridge=torch.tensor(1.0))
    with pytest.raises(ValueError, match="RidgeHead: scale must be positive"):
        RidgeHead(scale=-1.0)
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"num_classes must be a whole .* got {count}"):
            RidgeHead(num_classes=count)
    with pytest.raises(RuntimeError, match="RidgeHead: there is no probe; call fit"):
        head(f)
    with pytest.raises(ValueError, match="RidgeHead: y_support and f_query come together"):
        head(f, labels)
    with pytest.raises(ValueError, match=r"RidgeHead: labels \(torch.int64\) need num_classes"):
        RidgeHead()(f, labels, f)
    with pytest.raises(ValueError, match="RidgeHead: labels must be 0 to 2, got 1 to 3"):
        head(f, labels + 1, f)
    with pytest.raises(
        ValueError, match=r"RidgeHead: labels must be \[..., M\] .* \(2,\) and \(3,"
    ):
        head(f, labels[:2], f)
    with pytest.raises(TypeError, match="RidgeHead: targets must be a tensor, got list"):
        head(f, [0, 1, 2], f)
    head.fit(f, labels)
    with pytest.raises(ValueError, match=r"RidgeHead: f must be \[..., B, 3\], got shape \(2, 4\)"):
        head(torch.ones(2, 4))
    with pytest.raises(
        TypeError,
        match="RidgeHead: f must be torch.float32 like the probe, got torch.float64",
    ):
        head(f.double())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype(dtype: torch.dtype) -> None:
    head, f = RidgeHead(num_classes=3), torch.eye(3)
    expected = head(f, torch.eye(3), f)
    assert torch.equal(head(f, torch.arange(3).to(dtype), f), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_rows_of_0_and_1_are_no_labels(dtype: torch.dtype) -> None:
    head, f = RidgeHead(num_classes=3), torch.eye(3)
    with pytest.raises(TypeError, match=r"rows of 0 and 1 floating, got .* \[3, 3\]"):
        head(f, torch.eye(3).to(dtype), f)


def test_a_probe_of_inference_mode_can_be_trained_through_and_loaded() -> None:
    f, y = torch.eye(3), torch.eye(3)[:, :2].contiguous()
    with torch.inference_mode():
        head = RidgeHead().fit(f, y)
    query = f.clone().requires_grad_()
    head(query).sum().backward()
    assert torch.equal(query.grad, head.weights.sum(-1).expand(3, 3))
    head.load_state_dict(RidgeHead().fit(2 * f, y).state_dict())
    assert torch.equal(head.weights, RidgeHead().fit(2 * f, y).weights)
