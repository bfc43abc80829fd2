"""Networks as functions: batch norm folded, half precision, one compilation for many networks."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from krrst_fast.models import ModelConfig, Network, build
from krrst_fast.models.compiled import Compiled
from krrst_fast.models.functional import BUILT_IN, AtRest, TrainingLoss, is_functional, state_of

CONVNET = ModelConfig(widths=(4, 8))
EVERY = [
    CONVNET,
    ModelConfig(widths=(4, 8), norm="instance"),
    ModelConfig(widths=(4, 8), norm="none"),
    *(ModelConfig(kind=kind) for kind in ("resnet10", "resnet18", "resnet50")),
    ModelConfig(kind="resnet10", stem="imagenet"),
    *(ModelConfig(kind=kind) for kind in ("vgg11", "alexnet", "mobilenet")),
]
MANY = 12


def images(count: int = 3, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def network(config: ModelConfig = CONVNET, seed: int = 0, size: int = 8) -> Network:
    """A network in evaluation mode none of whose numbers is trivial."""
    made = build(config, image_size=size, num_outputs=5, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith("running_var"):
                value.add_(torch.rand(value.shape, generator=draw))
            elif value.is_floating_point() and value.dim() == 1:
                value.add_(torch.randn(value.shape, generator=draw), alpha=0.3)
    return made.eval().requires_grad_(False)


def with_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs, and the gradient by x of a random sum of them."""
    x = x.clone().requires_grad_()
    outputs = call(x)
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5))
    return outputs.detach(), torch.autograd.grad((outputs * weights.to(x.dtype)).sum(), x)[0]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("config", EVERY, ids=lambda c: f"{c.kind}-{c.norm}-{c.stem}")
def test_at_rest_a_network_does_what_it_did(config: ModelConfig) -> None:
    size, head = 32 if config.kind == "vgg11" else 8, config != CONVNET
    net, x = network(config, size=size).double(), images(2, size).double()
    before = {name: value.clone() for name, value in state_of(net).items()}
    fast = AtRest(net, head=head)
    got = with_gradient(lambda x: fast(state_of(net), x), x)
    exact = with_gradient(net if head else net.embed, x)
    assert all(error(a, b) <= 1e-9 for a, b in zip(got, exact))
    assert all(torch.equal(before[name], value) for name, value in state_of(net).items())
    assert all(value.grad is None for value in net.parameters())


class Activated(nn.BatchNorm2d):
    """A norm with an activation, as timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


CONV = nn.Conv2d(3, 4, 3)
NOT_FOLDED = {
    "norm first": [nn.BatchNorm2d(3), CONV],
    "norm first, later": [CONV, nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)],
    "activation between": [CONV, nn.ReLU(inplace=True), nn.BatchNorm2d(4)],
    "of other widths": [nn.Conv2d(3, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4)],
    "norm twice": [CONV, nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)],
    "with an activation": [CONV, Activated(4)],
    "without a gain": [CONV, nn.BatchNorm2d(4, affine=False)],
    "without statistics": [CONV, nn.BatchNorm2d(4, track_running_stats=False)],
}


@pytest.mark.parametrize("layers", NOT_FOLDED.values(), ids=NOT_FOLDED)
@pytest.mark.parametrize("head", [False, True])
def test_a_norm_that_does_not_follow_its_convolution_is_refused(
    layers: list[nn.Module], head: bool
) -> None:
    net = network()
    net.blocks = nn.Sequential(*copy.deepcopy(layers), nn.AdaptiveAvgPool2d(1))
    net.fc = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"AtRest: .*of ConvNet must be a batch norm that direct"):
        AtRest(net.eval(), head=head)


def test_only_the_built_in_classes_themselves_are_functions() -> None:
    class Own(type(network())):  # type: ignore[misc]
        """Inherits everything, and may change any of it."""

    every = [network(config, size=32) for config in EVERY]
    assert {type(net) for net in every} == set(BUILT_IN) and all(map(is_functional, every))
    derived = network()
    derived.__class__ = Own
    assert not is_functional(derived) and not is_functional(nn.Linear(2, 2))


def test_other_weights_are_seen_at_the_next_call() -> None:
    net, other = network(seed=0), network(seed=1)
    fast = AtRest(net, head=True)
    x = images()
    assert error(fast(state_of(other), x), other(x)) <= 1e-5
    with torch.no_grad():
        net.blocks[0].norm.running_mean.add_(1)
    assert error(fast(state_of(net), x), net(x)) <= 1e-5


@pytest.mark.parametrize("unit", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_half_precision_is_near_whatever_the_size_of_the_gradients(norm: str, unit: float) -> None:
    """Those of the outer loss are small numbers, which float16 alone would round to zero."""
    net = network(ModelConfig(widths=(8, 16), norm=norm))
    fast = AtRest(net, head=False, half=True)
    x = images(16)
    outputs, gradient = with_gradient(lambda x: unit * fast(state_of(net), x), x)
    exact, exact_gradient = with_gradient(lambda x: unit * net.embed(x), x)
    assert outputs.dtype == gradient.dtype == torch.float32
    # An activation near zero may be cut off by one of the two and not by the other.
    assert error(outputs, exact) <= 2e-3 and error(gradient, exact_gradient) <= 0.1


def test_a_gradient_of_zeros_stays_one() -> None:
    net, x = network(), images().requires_grad_()
    (AtRest(net, head=False, half=True)(state_of(net), x) * 0).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def trained(net: Network, seed: int = 0) -> Network:
    return copy.deepcopy(net).train().requires_grad_(True)


def loss_and_gradients(net: Network, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = torch.nn.functional.mse_loss(net(x), y)
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.parametrize("half, allowed", [(False, 1e-6), (True, 0.05)])
def test_a_training_step_is_that_of_the_network(half: bool, allowed: float) -> None:
    x, y = images(32), torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
    plain, fast = trained(network()), trained(network())
    loss = TrainingLoss(network(), half=half).backward(state_of(fast), x, y)
    got = [loss, *(p.grad for p in fast.parameters()), *fast.buffers()]
    for a, b in zip(got, loss_and_gradients(plain, x, y), strict=True):
        assert a.dtype == b.dtype and error(a, b) <= allowed


def test_what_is_frozen_gets_no_gradient() -> None:
    net = trained(network())
    net.blocks[0].conv.weight.requires_grad_(False)
    TrainingLoss(net).backward(state_of(net), images(), torch.zeros(3, 5))
    assert net.blocks[0].conv.weight.grad is None and net.fc.weight.grad is not None


@pytest.mark.parametrize("half", [False, True])
def test_many_networks_are_compiled_once_in_one_graph(traced: list[int], half: bool) -> None:
    """One graph for features, one for features with a gradient, one for training: no breaks."""
    rest = AtRest(network(), head=False, half=half, compiles=True)
    training = TrainingLoss(network(), half=half, compiles=True)
    plain = AtRest(network(), head=False, half=half), TrainingLoss(network(), half=half)
    x, more, y = images(3), images(5), torch.randn(3, 5)
    for seed in range(MANY):
        net, other = trained(network(seed=seed)), trained(network(seed=seed))
        with torch.no_grad():
            assert torch.equal(rest(state_of(net), more), plain[0](state_of(net), more))
        net.eval().requires_grad_(False)
        other.eval().requires_grad_(False)
        got = with_gradient(partial(rest, state_of(net)), x)
        for a, b in zip(got, with_gradient(partial(plain[0], state_of(other)), x)):
            assert error(a, b) <= 1e-6
        for one in (net, other):
            one.train().requires_grad_(True)
        losses = (
            training.backward(state_of(net), x, y),
            plain[1].backward(state_of(other), x, y),
        )
        assert error(*losses) <= 1e-6
        for a, b in zip(net.state_dict().values(), other.state_dict().values()):
            assert error(a, b) <= 1e-6, "the trial of the compiler has changed nothing"
        for a, b in zip(net.parameters(), other.parameters()):
            assert error(a.grad, b.grad) <= 1e-5
        assert len(traced) == 3


def test_what_does_not_compile_runs_plainly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, *, options, **asked: compiler(f, backend=broken, **asked)
    )
    torch._dynamo.reset()
    net, x = network(), images()
    rest = AtRest(net, head=True, compiles=True)
    with pytest.warns(UserWarning, match="ConvNet at rest: torch.compile failed") as seen:
        got = [rest(state_of(net), x) for _ in range(3)]
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    assert all(error(one, net(x)) <= 1e-5 for one in got)


def test_a_function_is_compiled_by_the_shapes_of_its_arguments(traced: list[int]) -> None:
    double = Compiled(lambda state, x: state["a"] * x, "double")
    state = {"a": torch.tensor(2.0)}
    for count in (3, 3, 4, 3):
        assert torch.equal(double(state, torch.ones(count)), torch.full((count,), 2.0))
    assert len(traced) == 2
