"""Networks: shapes and features against plain layers, key names, seeds, refusals."""

import pytest
import torch
import torch.nn.functional as F

from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig, build, place

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _plain_convnet(x: torch.Tensor, state: dict[str, torch.Tensor], norm: str) -> torch.Tensor:
    """The documented blocks, written out with torch.nn.functional."""
    for i in range(2):
        block = f"blocks.{i}."
        x = F.conv2d(x, state[block + "conv.weight"], state.get(block + "conv.bias"), padding=1)
        if norm != "none":
            axes = (0, 2, 3) if norm == "batch" else (2, 3)
            mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, correction=0)
            weight, bias = state[block + "norm.weight"], state[block + "norm.bias"]
            x = (x - mean) / torch.sqrt(var + 1e-5) * weight[:, None, None] + bias[:, None, None]
        x = x.clamp(min=0)
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    return x.flatten(1)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_convnet_is_conv_norm_relu_pool(norm):
    config = ModelConfig(widths=(5, 7), norm=norm)
    model = build(config, image_size=16, num_outputs=3, seed=1).double()
    state = model.state_dict()
    features = _plain_convnet(IMAGES.double(), state, norm)
    assert model.feature_dim == features.shape[1] == 7 * 4 * 4
    torch.testing.assert_close(model.embed(IMAGES.double()), features, rtol=1e-10, atol=1e-10)
    expected = features @ state["fc.weight"].T + state["fc.bias"]
    torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "widths, size, dim",
    [
        ((128, 256, 512), 32, 8192),
        ((64, 128, 256, 512), 64, 8192),
        ((32, 64, 128, 256, 512), 224, 25088),
    ],
)
def test_feature_dimensions_are_those_of_the_paper(widths, size, dim):
    model = build(ModelConfig(widths=widths), image_size=size, num_outputs=0, seed=0).eval()
    assert model.embed(torch.zeros(1, 3, size, size)).shape == (1, dim)
    assert model.feature_dim == dim


def test_odd_images_lose_the_last_row_in_each_pooling():
    model = build(ModelConfig(widths=(2, 3)), image_size=7, num_outputs=0, seed=0).eval()
    x = torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(3))
    assert model.embed(x).shape == (2, 3 * 1 * 1) and model.feature_dim == 3


@pytest.mark.parametrize(
    "kind, parameters, keys, dim",
    [
        ("resnet10", 4_910_922, 74, 512),
        ("resnet18", 11_181_642, 122, 512),
        ("resnet50", 23_528_522, 320, 2048),
    ],
)
def test_resnets_have_the_sizes_and_names_of_torchvision(kind, parameters, keys, dim):
    config = ModelConfig(kind=kind, stem="imagenet")
    model = build(config, image_size=64, num_outputs=10, seed=0)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(state) == keys and model.feature_dim == dim
    names = ["conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer1.0.bn2.weight"]
    names += ["layer2.0.downsample.0.weight", "layer4.0.downsample.1.bias", "fc.weight", "fc.bias"]
    assert not set(names) - set(state)
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_small_stem_is_that_of_the_released_targets():
    model = build(ModelConfig(kind="resnet18"), image_size=32, num_outputs=0, seed=0).eval()
    assert model.conv1.weight.shape == (64, 3, 3, 3) and model.conv1.bias is None
    assert model.conv1.padding == (2, 2) and model.conv1.stride == (1, 1)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stem = F.relu(F.batch_norm(F.conv2d(x, model.conv1.weight, padding=2), *_running(model.bn1)))
    assert stem.shape == (1, 64, 34, 34)
    maps = model.layer4(model.layer3(model.layer2(model.layer1(stem))))
    assert maps.shape == (1, 512, 5, 5)
    torch.testing.assert_close(model.embed(x), maps.mean((2, 3)))
    assert torch.equal(model(x), model.embed(x))


def _running(norm: torch.nn.BatchNorm2d) -> tuple[torch.Tensor, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def test_residual_blocks_start_as_the_identity():
    model = build(ModelConfig(kind="resnet10"), image_size=8, num_outputs=0, seed=0).eval()
    x = torch.rand(2, 64, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.layer1(x), x)
    with torch.no_grad():
        model.layer1[0].bn2.weight.fill_(1.0)
    assert not torch.equal(model.layer1(x), x)


@pytest.mark.parametrize("kind", ["convnet", "resnet10"])
def test_a_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(kind):
    config = ModelConfig(kind=kind, widths=(4, 8))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    a, b, other = (build(config, image_size=16, num_outputs=2, seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.fc.weight, other.fc.weight)
    torch.manual_seed(124)
    again = build(config, image_size=16, num_outputs=2, seed=7)
    assert torch.equal(again.fc.weight, a.fc.weight)


def test_other_channel_counts():
    model = build(ModelConfig(widths=(4,)), image_size=4, num_outputs=0, seed=0, channels=1)
    assert model.embed(torch.zeros(2, 1, 4, 4)).shape == (2, 16)
    with pytest.raises(ValueError, match=r"ConvNet: x must be \[B, 1, 4, 4\], got \(2, 3, 4, 4\)"):
        model(torch.zeros(2, 3, 4, 4))
    resnet = build(ModelConfig(kind="resnet10"), image_size=8, num_outputs=0, seed=0)
    with pytest.raises(ValueError, match=r"ResNet: x must be \[B, 3, H, W\], got \(3, 8, 8\)"):
        resnet(torch.zeros(3, 8, 8))


def test_impossible_settings_are_named():
    with pytest.raises(ConfigError, match="halves the image 3 times and needs at least 8 pixels"):
        build(ModelConfig(), image_size=7, num_outputs=0, seed=0)
    with pytest.raises(ConfigError, match="num_outputs must be >= 0"):
        build(ModelConfig(), image_size=32, num_outputs=-1, seed=0)
    with pytest.raises(ConfigError, match="ModelConfig: widths must be positive"):
        ModelConfig(widths=(8, 0))
    with pytest.raises(ConfigError, match="ModelConfig: widths must be at least one"):
        ModelConfig(widths=())
    with pytest.raises(ConfigError, match="kind must be one of"):
        ModelConfig(kind="vgg")
    with pytest.raises(ConfigError, match="norm must be one of"):
        ModelConfig(norm="group")
    with pytest.raises(ConfigError, match="stem must be one of small, imagenet"):
        ModelConfig(stem="large")


@pytest.mark.parametrize("kind", ["convnet", "resnet10"])
def test_the_fast_layout_changes_neither_parameters_nor_results(kind):
    config = ModelConfig(kind=kind, widths=(4, 8))
    plain = build(config, image_size=16, num_outputs=2, seed=7)
    placed = place(build(config, image_size=16, num_outputs=2, seed=7), "cpu")
    first = next(p for p in placed.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), placed.parameters()))
    torch.testing.assert_close(placed.embed(IMAGES), plain.embed(IMAGES), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(placed(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-4)
