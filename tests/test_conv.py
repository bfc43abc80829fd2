"""The convolutions of networks on a CPU: the operators, and the networks that are run by them."""

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast import operators
from krrst_fast.models import ModelConfig, Network, blocks, build, place, training
from krrst_fast.models.blocks import conv_blocks
from krrst_fast.reference import conv as reference
from tests.helpers import more_than_twice, run_with

OPS = torch.ops.krrst_fast
peak_bytes = import_module("bench.common").peak_bytes
SHAPES = [
    # N, H, W, C, C'
    (2, 8, 8, 3, 16),
    (3, 7, 9, 16, 32),
    (2, 32, 32, 5, 10),
    (5, 16, 16, 48, 70),
    (1, 2, 2, 8, 3),
    (4, 9, 5, 9, 33),
    (1, 16, 16, 128, 256),
    (1, 3, 3, 3, 5),
    (3, 6, 6, 200, 24),
    (1, 2, 3, 1, 129),
    (5, 4, 4, 160, 176),
    (2, 7, 6, 4, 17),
    (3, 4, 10, 7, 64),
]
needs_extension = pytest.mark.skipif(
    not operators.HAS_EXTENSION, reason="the compiled operators are not built"
)
pytestmark = needs_extension


def draw(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> list[Tensor]:
    """x [N, H, W, C] of channels of different size, w, gain, shift, d_out."""
    n, h, w, c, o = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, h, w, c, generator=g) * spread ** torch.rand(c, generator=g)
    return [
        x,
        torch.randn(o, c, 3, 3, generator=g) / (9 * c) ** 0.5,
        1 + 0.1 * torch.randn(o, generator=g),
        0.3 * torch.randn(o, generator=g),
        torch.randn(n, h // 2, w // 2, o, generator=g),
        torch.randn(n, h, w, o, generator=g),
    ]


def results(ops, tensors: list[Tensor], mask: Tensor, kept: list[Tensor]) -> list[Tensor]:
    """All results of all operators; the backward passes from the same masks and statistics."""
    x, w, gain, shift, d_out, shortcut = tensors
    z, mean, scale, means = kept
    out, _ = ops.conv_relu_pool(x, w, shift, True)
    return [
        out,
        ops.conv_relu_pool_backward(d_out, mask, w, *x.shape[1:3]),
        ops.conv3x3(x, w, shift, shortcut, True),
        ops.conv3x3(x, w, None, None, False),
        *ops.channel_moments(z),
        ops.scale_relu_pool(z, gain * scale, shift - mean * gain * scale)[0],
        *ops.norm_relu_pool_sums(d_out, mask, z, mean, scale),
        *ops.conv_norm_backward(d_out, mask, x, w, z, mean, scale, gain, means, True, True),
    ]


def statistics(tensors: list[Tensor], mask: Tensor) -> list[Tensor]:
    """z, its mean and 1 / deviation, and the means of the gradient."""
    x, w, _, _, d_out, _ = tensors
    z = reference.conv3x3(x, w, None, None, False)
    mean, squares = reference.channel_moments(z)
    pixels = z[..., 0].numel()
    scale = torch.rsqrt(squares / pixels + 1e-5)
    sums = reference.norm_relu_pool_sums(d_out, mask, z, mean, scale)
    return [z, mean, scale, sums / pixels]


def errors(got: list[Tensor], exact: list[Tensor]) -> Tensor:
    return torch.stack(
        [(a.double() - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(got, exact)]
    )


class plain:
    """The reference, with the sums that it takes in float64 as plain PyTorch takes them."""

    conv3x3 = staticmethod(reference.conv3x3)
    conv_relu_pool = staticmethod(reference.conv_relu_pool)
    conv_relu_pool_backward = staticmethod(reference.conv_relu_pool_backward)
    scale_relu_pool = staticmethod(reference.scale_relu_pool)
    conv_norm_backward = staticmethod(reference.conv_norm_backward)

    @staticmethod
    def channel_moments(z: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(z, (0, 1, 2), correction=0)
        return mean, variance * z[..., 0].numel()

    @staticmethod
    def norm_relu_pool_sums(
        d_out: Tensor, mask: Tensor, z: Tensor, mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        d_norm = reference._unpooled(d_out, mask, z.shape[1], z.shape[2])
        return d_norm.sum((0, 1, 2)), (d_norm * (z - mean) * scale).sum((0, 1, 2))


def check_accuracy(spreads: tuple[float, ...] = (1e3,)) -> None:
    for spread in spreads:
        # The error of few numbers, which may be near zero, is luck.
        for shape in ((6, *shape[1:]) if shape[1] < 4 else shape for shape in SHAPES):
            ours, theirs = [], []
            for seed in range(64 if shape[1] < 4 else 8):
                tensors = draw(shape, seed, spread)
                doubled = [x.double() for x in tensors]
                _, mask = reference.conv_relu_pool(doubled[0], doubled[1], doubled[3], True)
                kept = [x.float() for x in statistics(doubled, mask)]
                exact = results(reference, doubled, mask, [x.double() for x in kept])
                ours.append(errors(results(OPS, tensors, mask, kept), exact))
                theirs.append(errors(results(plain, tensors, mask, kept), exact))
            wrong = more_than_twice(torch.stack(ours), torch.stack(theirs), 2.0**-24)
            assert not wrong, f"{shape}, {spread}: {wrong}"


def test_at_most_twice_as_wrong_as_pytorch() -> None:
    check_accuracy((1.0, 1e3))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    if isa not in OPS.isas():
        pytest.skip(f"this processor has no {isa}")
    run_with(isa, "test_conv", "check_accuracy")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_is_that_of_the_reference(shape: tuple[int, ...]) -> None:
    x, w, _, shift, d_out, _ = draw(shape, 0)
    x, w, shift = x.round(), (8 * w).round(), shift.round()  # exact in any order of the sums
    out, mask = OPS.conv_relu_pool(x, w, shift, True)
    plain, its_mask = reference.conv_relu_pool(x, w, shift, True)
    assert torch.equal(out, plain) and torch.equal(mask, its_mask)
    d_x = OPS.conv_relu_pool_backward(d_out, mask, w, *x.shape[1:3])
    leaf = x.clone().requires_grad_()
    reference.conv_relu_pool(leaf, w, shift, True)[0].backward(d_out)
    torch.testing.assert_close(d_x, leaf.grad, rtol=1e-4, atol=1e-4)


def test_filters_of_any_layout() -> None:
    x, w, _, shift, _, _ = draw((2, 8, 8, 24, 40), 0)
    out = OPS.conv3x3(x, w, shift, None, False)
    for other in (
        w.contiguous(memory_format=torch.channels_last),
        torch.cat((w, w), 1)[:, :24],
        w.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(OPS.conv3x3(x, other, shift, None, False), out)


def test_not_a_number_goes_on() -> None:
    x, w, _, shift, _, _ = draw((1, 8, 8, 16, 20), 0)
    x[0, 3, 3, 5] = torch.nan
    out, _ = OPS.conv_relu_pool(x, w, shift, False)
    plain, _ = reference.conv_relu_pool(x, w, shift, False)
    assert (out.isnan() | ~plain.isnan()).all() and not out.isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    x, w, gain, shift, d_out, shortcut = draw((2, 8, 8, 4, 6), 0)
    mask = OPS.conv_relu_pool(x, w, shift, True)[1]
    for call in (
        lambda: OPS.conv3x3(x, w[:, :3], shift, None, True),
        lambda: OPS.conv3x3(x.double(), w, shift, None, True),
        lambda: OPS.conv3x3(x, w[..., :2], shift, None, True),
        lambda: OPS.conv3x3(x, w, shift[:5], None, True),
        lambda: OPS.conv3x3(x, w, shift, shortcut[1:], True),
        lambda: OPS.conv3x3(x.permute(0, 3, 1, 2), w, shift, None, True),
        lambda: OPS.conv_relu_pool_backward(d_out, mask[1:], w, 8, 8),
        lambda: OPS.conv_relu_pool_backward(d_out, mask, w, 8, 10),
        lambda: OPS.scale_relu_pool(shortcut, gain[1:], shift),
        lambda: OPS.channel_moments(shortcut[0]),
        lambda: OPS.norm_relu_pool_sums(d_out, mask[1:], shortcut, gain, shift),
        lambda: OPS.conv_norm_backward(
            d_out, mask, x, w, shortcut[1:], gain, gain, gain, torch.ones(2, 6), True, True
        ),
    ):
        with pytest.raises(RuntimeError, match=r"^\w+: \w+ must"):
            call()


def network(config: ModelConfig, *, size: int = 12, seed: int = 0) -> Network:
    net = place(build(config, image_size=size, num_outputs=5, channels=3, seed=seed), "cpu")
    g = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.copy_(0.5 + torch.rand(value.shape, generator=g))
    return net


def images(count: int = 7, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


CONVNETS = [
    ModelConfig(widths=(16, 32)),
    ModelConfig(widths=(5, 7, 9)),
    ModelConfig(widths=(40,), norm="none"),
]


@pytest.mark.parametrize("size", [12, 15])
@pytest.mark.parametrize("config", CONVNETS, ids=str)
def test_features_and_their_gradient_at_rest(config: ModelConfig, size: int) -> None:
    net = network(config, size=size).eval().requires_grad_(False)
    exact = copy.deepcopy(net).double()
    x = images(size=size).requires_grad_()
    assert conv_blocks(net.blocks, x) is not None, "the kernels run it"
    assert conv_blocks(exact.blocks, x.double()) is None
    weight = torch.randn(7, net.feature_dim)
    x64 = x.detach().double().requires_grad_()
    features, wanted = net.embed(x), exact.embed(x64)
    (features * weight).sum().backward()
    (wanted * weight.double()).sum().backward()
    torch.testing.assert_close(features.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (x.grad.double() - x64.grad).norm() <= 1e-5 * x64.grad.norm()
    with torch.no_grad():
        assert torch.equal(net.embed(x), features)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("size", [12, 15])
def test_training(
    size: int, momentum: float | None, chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunks:
        monkeypatch.setattr(training, "_WHOLE", 0)
        monkeypatch.setattr(training, "_CHUNK", 3 * 4 * 15 * 15 * 20)
    net = network(CONVNETS[1], size=size).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    exact = copy.deepcopy(net).double()
    y = torch.randn(7, 5)
    for step in range(3):
        x = images(size=size).add_(step).requires_grad_()
        assert conv_blocks(copy.deepcopy(net).blocks, x) is not None
        x64 = x.detach().double().requires_grad_()
        for one, inputs, targets in ((net, x, y), (exact, x64, y.double())):
            one.zero_grad()
            F.mse_loss(one(inputs), targets).backward()
        for (name, a), b in zip(net.named_parameters(), exact.parameters()):
            assert (a.grad.double() - b.grad).norm() <= 1e-5 * b.grad.norm(), name
            assert a.grad.stride() == a.stride()
        assert (x.grad.double() - x64.grad).norm() <= 1e-5 * x64.grad.norm()
        for (name, a), b in zip(net.named_buffers(), exact.buffers()):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("trains", [True, False])
def test_gradients_can_be_differentiated_again(trains: bool) -> None:
    net = network(CONVNETS[0]).train(trains).requires_grad_(trains)
    exact = copy.deepcopy(net).double()
    found = []
    for one in (net, exact):
        dtype = next(one.parameters()).dtype
        x = images().to(dtype).requires_grad_()
        inputs = [x, *(one.parameters() if trains else ())]
        first = torch.autograd.grad(one(x).pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, allow_unused=True)
        found.append([*first, *(g for g in second if g is not None)])
    for a, b in zip(*found, strict=True):
        assert (a.double() - b).norm() <= 1e-4 * b.norm() + 1e-6


@pytest.mark.parametrize("kind", ["resnet10", "resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnets_at_rest(kind: str, stem: str) -> None:
    size = 16 if stem == "small" else 34
    net = network(ModelConfig(kind=kind, stem=stem), size=size).eval()
    exact = copy.deepcopy(net).double()
    x = images(3, size)
    with torch.no_grad():
        got, wanted = net(x), exact(x.double())
    assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()
    x.requires_grad_()
    assert net(x).requires_grad, "with a graph it runs as it is"


def test_the_graph_to_the_images_holds_half_a_byte_for_a_pooled_pixel() -> None:
    net = network(ModelConfig(widths=(32, 64)), size=32).eval().requires_grad_(False)
    x = images(4, 32).requires_grad_()
    kept: list[int] = []

    def note(saved: Tensor) -> Tensor:
        if saved.dtype == torch.uint8:
            kept.append(saved.numel())
        else:  # folded filters, which do not grow with the images
            assert saved.numel() <= 32 * 64 * 9
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        net.embed(x)
    assert sum(kept) == 4 * (32 * 16 * 16 + 64 * 8 * 8) // 2


def test_many_images_go_through_in_chunks_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network(ModelConfig(widths=(16, 32)), size=15).eval().requires_grad_(False)
    found = []
    for chunk in (2**25, 5 * 4 * 16 * 15 * 15, 1):
        monkeypatch.setattr(blocks, "_CHUNK", chunk)
        x = images(11, 15).requires_grad_()
        features = net.embed(x)
        features.pow(2).sum().backward()
        found.append((features, x.grad))
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("trains", [False, True])
def test_memory_is_that_of_features_and_masks(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond images, features and their gradients, 64 kB an image are allowed."""
    monkeypatch.setattr(training, "_WHOLE", 0)
    monkeypatch.setattr(training, "_CHUNK", 2**25)
    net = network(ModelConfig(widths=(128, 256, 512)), size=32)
    net.train(trains).requires_grad_(trains)

    def peak(count: int) -> int:
        x = images(count, 32).requires_grad_(not trains)

        def call() -> Tensor:
            features = net.embed(x)
            features.backward(torch.ones_like(features))
            return features

        return peak_bytes(call)

    few, many = (60, 180) if trains else (300, 900)
    each = (peak(many) - peak(few)) / (many - few)
    named = 4 * (2 * 3 * 32 * 32 + 2 * net.feature_dim)
    assert each <= named + 64_000


def test_the_same_bits_twice() -> None:
    net = network(ModelConfig(widths=(16, 32)), size=16)
    x, y = images(50, 16), torch.randn(50, 5)
    found = []
    for _ in range(2):
        one = copy.deepcopy(net).train()
        F.mse_loss(one(x), y).backward()
        found.append([*(p.grad for p in one.parameters()), *one.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
