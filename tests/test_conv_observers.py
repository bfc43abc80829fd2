"""When the kernels for convolutions run a network, and when PyTorch does: nobody is to notice."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from krrst_fast import operators
from krrst_fast.models import ModelConfig, Network
from krrst_fast.models.blocks import conv_blocks, takes
from tests.test_conv import CONVNETS, images, network

pytestmark = pytest.mark.skipif(
    not operators.HAS_EXTENSION, reason="the compiled operators are not built"
)
RESNET = ModelConfig(kind="resnet10")


def same_as_in_float64(net: Network, x: Tensor | None = None) -> None:
    """What a network gives without gradients is what it gives in float64, where PyTorch runs it."""
    x = images() if x is None else x
    exact = copy.deepcopy(net).double()
    with torch.no_grad():
        got, wanted = net(x), exact(x.double())
    assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()
    for a, b in zip(net.buffers(), exact.buffers()):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def at_rest(config: ModelConfig) -> Network:
    return network(config, size=16).eval().requires_grad_(False)


def replace_of_convnet(name: str, part: nn.Module) -> Callable[[Network], None]:
    return lambda net: net.blocks[1].set_submodule(name, part)


CHANGES: dict[str, Callable[[Network], None]] = {
    "gelu": replace_of_convnet("relu", nn.GELU()),
    "max": replace_of_convnet("pool", nn.MaxPool2d(2)),
    "odd averages": replace_of_convnet("pool", nn.AvgPool2d(2, ceil_mode=True)),
    "averages of another kind": replace_of_convnet("pool", nn.AdaptiveAvgPool2d(4)),
    "circular": replace_of_convnet(
        "conv", nn.Conv2d(16, 32, 3, padding=1, padding_mode="circular")
    ),
    "holes": replace_of_convnet("conv", nn.Conv2d(16, 32, 3, padding=2, dilation=2)),
    "5x5": replace_of_convnet("conv", nn.Conv2d(16, 32, 5, padding=2)),
    "groups": replace_of_convnet("conv", nn.Conv2d(16, 32, 3, padding=1, groups=2)),
    "no block": lambda net: net.blocks.append(nn.Identity()),
    "one more part": lambda net: net.blocks[1].append(nn.Softmax(1)),
    "no norm": replace_of_convnet("norm", nn.Identity()),
    "norm of groups": replace_of_convnet("norm", nn.GroupNorm(4, 32)),
    "norm of batches": lambda net: net.blocks[1].norm.train(),  # type: ignore[func-returns-value]
    "all norms of batches": lambda net: [block.norm.train() for block in net.blocks] and None,
    "norm without numbers": replace_of_convnet("norm", nn.BatchNorm2d(32, affine=False)),
    "norm that does not count": lambda net: setattr(
        net.blocks[1].norm, "num_batches_tracked", None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_convnet_that_was_changed(change: str) -> None:
    net = at_rest(CONVNETS[0])
    CHANGES[change](net)
    same_as_in_float64(net.eval() if change == "5x5" else net, images(7, 16))


RESNET_CHANGES: dict[str, Callable[[Network], None]] = {
    "gelu": lambda net: setattr(net, "relu", nn.GELU()),
    "gelu in a block": lambda net: setattr(net.layer2[0], "relu", nn.GELU()),
    "no layer": lambda net: setattr(net, "layer4", nn.Conv2d(256, 512, 1)),
    "norm of groups": lambda net: setattr(net, "bn1", nn.GroupNorm(8, 64)),
    "norm without numbers": lambda net: setattr(
        net, "bn1", nn.BatchNorm2d(64, affine=False).eval()
    ),
    "synchronised norms": lambda net: (
        [
            setattr(net, name, nn.SyncBatchNorm.convert_sync_batchnorm(part).eval())
            for name, part in list(net.named_children())
        ]
        and None
    ),
    "norm of batches": lambda net: net.layer1[0].bn1.train() and None,
    "holes": lambda net: setattr(
        net.layer1[0], "conv2", nn.Conv2d(64, 64, 3, padding=2, dilation=2, bias=False)
    ),
    "another pool": lambda net: setattr(net, "avgpool", nn.AdaptiveMaxPool2d(1)),
}


@pytest.mark.parametrize("change", RESNET_CHANGES)
def test_a_resnet_that_was_changed(change: str) -> None:
    net = at_rest(RESNET)
    RESNET_CHANGES[change](net)
    same_as_in_float64(net, images(3, 16))


def test_a_block_of_another_class() -> None:
    net = at_rest(RESNET)

    class Shifted(type(net.layer1[0])):  # type: ignore[misc]
        def branch(self, x: Tensor) -> Tensor:
            return super().branch(x) + 1

    net.layer1[0].__class__ = Shifted
    same_as_in_float64(net, images(3, 16))


def test_who_looks_on_sees_pytorch() -> None:
    net = network(CONVNETS[0]).eval().requires_grad_(False)
    x = images()
    assert takes(x, *net.modules())
    assert not takes(x.double(), *net.modules()) and not takes(x.to("meta"), *net.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(x, *net.modules())
    seen = []
    handle = net.blocks[1].relu.register_forward_hook(lambda *given: seen.append(given[2].shape))
    net(x)
    handle.remove()
    assert seen == [(7, 32, 6, 6)]
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() > 2 * 7 * 9 * (3 * 16 * 144 + 16 * 32 * 36) * 0.9
    assert torch.func.vmap(lambda one: net(one[None])[0])(x).shape == (7, 5)
    instance = network(ModelConfig(widths=(8,), norm="instance")).eval()
    assert conv_blocks(instance.blocks, x) is None
    assert conv_blocks(net.blocks, x[:0]) is None


def test_observers_of_modules_and_functions() -> None:
    net = at_rest(CONVNETS[0])
    x = images(2, 16).requires_grad_()
    seen: list[str] = []
    handles = [
        net.blocks[0].conv.register_full_backward_pre_hook(lambda *given: seen.append("hook")),
        nn.modules.module.register_module_forward_hook(lambda *given: seen.append("global")),
    ]
    net(x).sum().backward()
    for handle in handles:
        handle.remove()
    assert seen.count("hook") == 1 and seen.count("global") > 8

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Functions():
        net(x)
    assert seen.count("conv2d") == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [CONVNETS[0], RESNET], ids=str)
def test_forward_mode_and_tracing(config: ModelConfig) -> None:
    net, x = at_rest(config), images(2, 16)
    with torch.no_grad():
        plain = net(x)
    with forward_ad.dual_level():
        dual = net(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    wanted = torch.func.jvp(net, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, wanted, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(net, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    assert "krrst_fast::" not in str(traced.inlined_graph) and "_AtRest" not in str(traced.graph)
    torch.testing.assert_close(traced(x), plain, rtol=1e-4, atol=1e-4)


def test_filters_that_are_plain_tensors_get_their_gradient() -> None:
    net = at_rest(CONVNETS[0])
    conv = net.blocks[0].conv
    w = conv.weight.detach().clone().requires_grad_()
    del conv.weight
    conv.weight = 2 * w
    net(images(2, 12 if net.image_size == 12 else 16)).sum().backward()
    assert w.grad is not None and w.grad.abs().sum() > 0


def test_images_that_depend_on_the_filters() -> None:
    """With create_graph each path counts once, as it does without."""
    net = network(CONVNETS[0], size=16).train()
    w, x = net.blocks[0].conv.weight, images(5, 16)

    def gradient(*, again: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        one = copy.deepcopy(net).to(dtype)
        weight = one.blocks[0].conv.weight
        given = x.to(dtype) + weight.sum() * 0.1
        found = torch.autograd.grad(one(given).pow(2).sum(), weight, create_graph=again)[0]
        return found.detach().double()

    exact = gradient(again=False, dtype=torch.float64)
    for again in (False, True):
        assert (gradient(again=again) - exact).norm() <= 1e-4 * exact.norm()
    assert w.grad is None


@pytest.mark.parametrize("again", [False, True])
def test_filters_that_two_blocks_share(again: bool) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        net = network(ModelConfig(widths=(8, 8, 8)), size=16).to(dtype)
        net.blocks[2].conv.weight = net.blocks[1].conv.weight
        out = net.train()(images(5, 16).to(dtype)).pow(2).sum()
        found += torch.autograd.grad(out, net.blocks[1].conv.weight, create_graph=again)
    assert (found[0].double() - found[1]).norm() <= 1e-4 * found[1].norm()


def test_a_single_value_for_a_batch_norm_is_refused_as_by_pytorch() -> None:
    net = network(ModelConfig(widths=(8, 8)), size=4).train()
    # The last norm sees 2x2 pixels of one image, which is enough; one pixel is not.
    net(images(1, 4))
    one = network(ModelConfig(widths=(8,)), size=2).train()
    assert conv_blocks(one.blocks, torch.zeros(1, 3, 1, 1)) is None
    with pytest.raises(ValueError, match="more than 1 value"):
        one.blocks(torch.zeros(1, 3, 1, 1))
