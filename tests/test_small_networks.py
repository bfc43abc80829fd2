"""VGG-11, AlexNet and MobileNet against lists of their layers, and in the pool."""

import pytest
import torch
from torch import nn

from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig, build, check, place

KINDS = ("vgg11", "alexnet", "mobilenet")
OUTPUTS = 5


def conv(inputs: int, outputs: int, kernel: int, *, bias: bool = True, groups: int = 1) -> int:
    """Parameters of a convolution and of the batch norm after it."""
    return inputs // groups * outputs * kernel**2 + outputs * bias + 2 * outputs


def inverted(inputs: int, outputs: int, times: int, stride: int) -> int:
    wide = times * inputs
    shortcut = conv(inputs, outputs, 1, bias=False) if stride == 1 and inputs != outputs else 0
    return (
        conv(inputs, wide, 1, bias=False)
        + conv(wide, wide, 3, bias=False, groups=wide)
        + conv(wide, outputs, 1, bias=False)
        + shortcut
    )


BODIES = {
    "vgg11": conv(3, 64, 3)
    + conv(64, 128, 3)
    + conv(128, 256, 3)
    + conv(256, 256, 3)
    + conv(256, 512, 3)
    + 3 * conv(512, 512, 3),
    "alexnet": conv(3, 128, 5)
    + conv(128, 192, 5)
    + conv(192, 256, 3)
    + conv(256, 192, 3)
    + conv(192, 192, 3),
    "mobilenet": conv(3, 32, 3, bias=False)
    + inverted(32, 16, 1, 1)
    + inverted(16, 24, 2, 1)
    + inverted(24, 24, 2, 1)
    + inverted(24, 32, 2, 2)
    + 2 * inverted(32, 32, 2, 1)
    + inverted(32, 64, 2, 2)
    + 3 * inverted(64, 64, 2, 1)
    + inverted(64, 96, 2, 1)
    + 2 * inverted(96, 96, 2, 1)
    + inverted(96, 160, 2, 2)
    + 2 * inverted(160, 160, 2, 1)
    + inverted(160, 320, 2, 1)
    + conv(320, 1280, 1, bias=False),
}


def features_at(kind: str, size: int) -> int:
    """VGG halves the image five times, AlexNet three times; MobileNet takes the mean over it."""
    return {"vgg11": 512 * (size // 32) ** 2, "alexnet": 192 * (size // 8) ** 2}.get(kind, 1280)


def made(kind: str, size: int = 32, *, seed: int = 0, **options: int):
    return build(ModelConfig(kind=kind), image_size=size, num_outputs=OUTPUTS, seed=seed, **options)


def images(count: int, size: int, channels: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, size, size, generator=draw)


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_and_parameter_counts(kind, size):
    network, features = made(kind, size).eval(), features_at(kind, size)
    assert network.feature_dim == features
    count = sum(p.numel() for p in network.parameters())
    assert count == BODIES[kind] + (features + 1) * OUTPUTS
    x = images(1, size)
    with torch.no_grad():
        assert network.embed(x).shape == (1, features)
        assert network(x).shape == (1, OUTPUTS)


def test_the_counts_are_those_of_the_released_networks():
    """Ten classes at 32 pixels; the released networks were counted by torch, these by hand."""
    assert BODIES["vgg11"] + 513 * 10 == 9_231_114
    assert BODIES["alexnet"] + 3073 * 10 == 1_874_122
    assert BODIES["mobilenet"] + 1281 * 10 == 1_092_314


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_are_those_of_the_released_networks(kind):
    state = made(kind).state_dict()
    names = {
        "vgg11": {"features.0.weight": (64, 3, 3, 3), "features.25.bias": (512,)},
        "alexnet": {"features.0.weight": (128, 3, 5, 5), "features.15.running_var": (192,)},
        "mobilenet": {
            "layers.1.shortcut.0.weight": (24, 16, 1, 1),
            "layers.16.conv2.weight": (320, 1, 3, 3),
            "conv2.weight": (1280, 320, 1, 1),
        },
    }[kind]
    assert {name: tuple(state[name].shape) for name in names} == names
    assert state["fc.weight"].shape == (OUTPUTS, features_at(kind, 32))


def test_mobilenet_halves_the_image_twice_and_adds_inputs_in_between():
    network = made("mobilenet", 32).eval()
    x, sizes = images(1, 32), []
    x = network.relu(network.bn1(network.conv1(x)))
    for block in network.layers:
        y = block.bn3(
            block.conv3(block.relu(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))))
        )
        after = block(x)
        same = after.shape[1] == x.shape[1]
        stride = x.shape[-1] // after.shape[-1]
        shortcut = 0 if stride == 2 else x if same else block.shortcut(x)
        torch.testing.assert_close(after, y + shortcut)
        sizes.append(after.shape[-1])
        x = after
    assert len(sizes) == 17 and sizes == [32] * 3 + [16] * 3 + [8] * 7 + [4] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bits(kind):
    before = torch.get_rng_state()
    first, again, other = made(kind, seed=7), made(kind, seed=7), made(kind, seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    states = first.state_dict(), again.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_features_at_rest_do_not_depend_on_the_batch_and_change_nothing(kind):
    network, x = place(made(kind), "cpu").eval(), images(4, 32)
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(network.embed(x)[:2], network.embed(x[:2]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made(kind).eval()(x), network(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pool_trains_it_and_puts_it_back_at_rest(kind):
    config = PoolConfig(size=1, online_steps=2, lr=0.01, model=ModelConfig(kind=kind))
    pool = Pool(config, image_size=32, num_outputs=OUTPUTS, device=torch.device("cpu"))
    slot, x = pool.slots[0], images(4, 32)
    y = torch.randn(4, OUTPUTS, generator=torch.Generator().manual_seed(2))
    start = slot.network.fc.weight.clone()
    pool.advance(slot, x, y)
    assert slot.age == 1 and not slot.network.training
    assert not torch.equal(slot.network.fc.weight, start)
    norms = [m for m in slot.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)
    slot.network.embed(x.requires_grad_()).square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert all(p.grad is None for p in slot.network.parameters())
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)


def test_images_that_are_too_small_are_named_and_others_work():
    with pytest.raises(ConfigError, match="vgg11 halves the image 5 times and needs at least 32"):
        made("vgg11", 31)
    with pytest.raises(
        ConfigError, match="alexnet halves .* 3 times .* 8 pixels, got image_size 7"
    ):
        check(ModelConfig(kind="alexnet"), image_size=7, num_outputs=2, channels=3)
    assert made("alexnet", 8).feature_dim == 192
    assert made("mobilenet", 1, channels=1).eval()(images(2, 1, channels=1)).shape == (2, OUTPUTS)
    with pytest.raises(
        ConfigError, match=r"kind must be one of convnet, .*, mobilenet, or your own"
    ):
        ModelConfig(kind="vgg16")
