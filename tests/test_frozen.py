"""Frozen targets: saved, loaded, and made of weights from elsewhere."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krrst_fast.errors import CheckpointError, ConfigError, NonFiniteError
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.seal import KEY
from krrst_fast.targets import FrozenTarget, load_target
from krrst_fast.targets.weights import load_weights

SMALL = ModelConfig(widths=(4, 8))
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
PREFIXES = (
    *("", "module.", "backbone.", "module.backbone.", "module.encoder_q."),
    "_orig_mod.teacher.encoder.",
)
IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _target(num_outputs: int = 6, config: ModelConfig = SMALL) -> FrozenTarget:
    model = build(config, image_size=8, num_outputs=num_outputs, seed=3)
    model.train()(IMAGES)
    return FrozenTarget(
        model=model,
        config=config,
        num_outputs=num_outputs,
        mean=MEAN,
        std=STD,
        image_size=8,
        meta={"loss": "barlow_twins", "steps": "7"},
    )


@pytest.mark.parametrize("num_outputs, dim", [(6, 6), (0, 32)])
def test_a_target_is_the_network_in_evaluation_mode(num_outputs, dim):
    target = _target(num_outputs)
    x = IMAGES.clone().requires_grad_()
    y = target(x)
    assert not y.requires_grad and y.shape == (5, target.dim) and target.dim == dim
    assert not any(p.requires_grad for p in target.model.parameters())
    by_row = torch.cat([target(row[None]) for row in IMAGES])
    torch.testing.assert_close(y, by_row)


@pytest.mark.parametrize("config", [SMALL, ModelConfig(kind="resnet10")])
def test_saving_and_loading_gives_the_same_outputs(tmp_path, config):
    target = _target(config=config)
    target.save(tmp_path / "target.safetensors")
    expected = target.to("cpu")(IMAGES)
    for path in (tmp_path, tmp_path / "target.safetensors", str(tmp_path)):
        loaded = load_target(path)
        assert torch.equal(loaded(IMAGES), expected)
        assert (loaded.mean, loaded.std, loaded.image_size) == (MEAN, STD, 8)
        assert (loaded.config, loaded.num_outputs) == (config, 6)
        assert loaded.meta == {"loss": "barlow_twins", "steps": "7"}
    assert os.listdir(tmp_path) == ["target.safetensors"]


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"x must be \[B, 3, 8, 8\], got \(5, 3, 16, 16\)"):
        _target()(torch.zeros(5, 3, 16, 16))
    with pytest.raises(ValueError, match=r"x must be \[B, 3, 8, 8\], got \(5, 1, 8, 8\)"):
        _target()(torch.zeros(5, 1, 8, 8))


def test_impossible_targets_are_refused():
    target = _target()
    with pytest.raises(ConfigError, match="mean and std must be 3 numbers each"):
        FrozenTarget(**{**vars(target), "mean": (0.5,)})
    with pytest.raises(ConfigError, match="std positive"):
        FrozenTarget(**{**vars(target), "std": (1.0, 0.0, 1.0)})
    target.model.fc.bias[2] = torch.nan
    with pytest.raises(NonFiniteError, match="fc.bias holds NaN"):
        FrozenTarget(**vars(target))


def test_a_file_with_nan_is_named(tmp_path):
    path = tmp_path / "target.safetensors"
    _target().save(path)
    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != KEY}
    state = load_file(path)
    state["fc.bias"][0] = torch.nan
    save_file(state, path, metadata=metadata)
    with (
        pytest.warns(UserWarning, match="written without a checksum"),
        pytest.raises(NonFiniteError, match="target.safetensors: .*fc.bias holds NaN"),
    ):
        load_target(path)


def test_unreadable_targets_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_target(tmp_path)
    path = tmp_path / "target.safetensors"
    _target().save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_target(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="holds weights and not a target"):
        load_target(path)
    for text, message in [
        ("{", "not JSON"),
        ("[]", "not JSON"),
        (json.dumps({"format_version": 9}), "is of target format 9, and this version reads 1"),
    ]:
        save_file({"a": torch.zeros(1)}, path, metadata={"krrst_fast.target": text})
        with pytest.raises(CheckpointError, match=message):
            load_target(path)
    text = json.dumps({"format_version": 1})
    save_file({"a": torch.zeros(1)}, path, metadata={"krrst_fast.target": text})
    with (
        pytest.warns(UserWarning, match="written without a checksum"),
        pytest.raises(CheckpointError, match="damaged target file"),
    ):
        load_target(path)
    path.unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="unfinished; resume it"):
        load_target(tmp_path)


def _resnet(num_outputs: int = 0, seed: int = 1) -> torch.nn.Module:
    return build(ModelConfig(kind="resnet10"), image_size=8, num_outputs=num_outputs, seed=seed)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nested", [None, "state_dict", "model", "teacher"])
def test_weights_of_other_code_load_under_their_prefixes(tmp_path, prefix, nested):
    source, model = _resnet().eval(), _resnet(seed=2).eval()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    state |= {prefix + "fc.weight": torch.zeros(9, 512), "projector.0.weight": torch.zeros(2, 2)}
    state |= {"module.encoder_k.conv1.weight": torch.zeros(2), "module.queue": torch.zeros(2)}
    state |= {"module.projector.1.bias": torch.zeros(2), "module.bn.running_mean": torch.zeros(2)}
    torch.save({"epoch": 3, nested: state} if nested else state, tmp_path / "weights.pth")
    assert not torch.equal(model(IMAGES), source(IMAGES))
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model(IMAGES), source(IMAGES))


def test_one_of_several_networks_is_chosen_by_its_prefix(tmp_path):
    path, model = tmp_path / "weights.pth", _resnet(seed=3)
    first, second = _resnet(seed=1).state_dict(), _resnet(seed=2).state_dict()
    state = {f"backbone.{key}": value for key, value in first.items()}
    state |= {f"net.momentum.{key}": value for key, value in second.items()}

    def refused(message: str, prefix: str = "") -> None:
        with pytest.raises(CheckpointError, match=message):
            load_weights(model, path, prefix=prefix)

    def loaded(prefix: str, expected: dict) -> None:
        load_weights(model, path, prefix=prefix)
        assert torch.equal(model.conv1.weight, expected["conv1.weight"])

    torch.save(state, path)
    refused("unexpected net.momentum.conv1.weight")
    refused("no weights under 'other.'; the names are backbone.conv1.weight, .* more", "other")
    loaded("net.momentum", second)
    loaded("backbone.", first)
    torch.save({"state_dict": {**state, "teacher.conv1.weight": first["conv1.weight"]}}, path)
    refused("holds two networks, backbone.conv1.weight and teacher.conv1.weight; choose one")
    loaded("net.momentum.", second)
    torch.save({"student": {"module.backbone.fc.bias": torch.zeros(2), **first}, "x": second}, path)
    loaded("student.", first)
    del first["layer1.0.conv1.weight"]
    torch.save({f"encoder_q.{key}": value for key, value in first.items()}, path)
    refused("missing layer1.0.conv1.weight$")


def test_a_head_is_loaded_where_the_network_has_one(tmp_path):
    source, model = _resnet(5), _resnet(5, seed=2)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.fc.weight, source.fc.weight)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    other = _resnet(5, seed=3)
    load_weights(other, tmp_path / "weights.safetensors")
    assert torch.equal(other.fc.weight, source.fc.weight)
    torch.save(_resnet(0).state_dict(), tmp_path / "headless.pt")
    with pytest.raises(CheckpointError, match="missing fc.weight, fc.bias"):
        load_weights(model, tmp_path / "headless.pt")


def test_files_without_batch_counters_load(tmp_path):
    state = {k: v for k, v in _resnet().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "weights.pth")
    model = _resnet(seed=2)
    load_weights(model, tmp_path / "weights.pth")
    assert torch.equal(model.layer4[0].conv2.weight, state["layer4.0.conv2.weight"])


def test_half_precision_weights_are_widened(tmp_path):
    torch.save(_resnet().half().state_dict(), tmp_path / "weights.pth")
    model = _resnet(seed=2)
    load_weights(model, tmp_path / "weights.pth")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, _resnet().conv1.weight.half().float())


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_weights_that_do_not_fit_or_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, path = _resnet(seed=2), tmp_path / "weights.pth"
    before = model.conv1.weight.clone()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_weights(model, path)
        assert "weights.pth" in str(caught.value) and "\n" not in str(caught.value)
        assert torch.equal(model.conv1.weight, before)

    refused("there is no such checkpoint")
    torch.save(build(SMALL, image_size=8, num_outputs=0, seed=0).state_dict(), path)
    refused("not the weights of this ResNet: missing conv1.weight, .* more; unexpected blocks.0")
    big = build(ModelConfig(kind="resnet18"), image_size=8, num_outputs=0, seed=0)
    torch.save(big.state_dict(), path)
    refused("unexpected layer1.1.conv1.weight, .* and 45 more")
    stem = build(ModelConfig(kind="resnet10", stem="imagenet"), image_size=8, num_outputs=0, seed=0)
    torch.save(stem.state_dict(), path)
    refused(r"wrong shape conv1.weight is \[64, 3, 7, 7\], needed \[64, 3, 3, 3\]$")
    whole = path.read_bytes()
    for cut in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:cut])
        refused("not a readable checkpoint")
    torch.save([torch.zeros(1)], path)
    refused("holds a list")
    torch.save({"epoch": 3}, path)
    refused("not a state dict")
    path.write_bytes(pickle.dumps(_Payload()))
    refused("not a readable checkpoint")
    torch.save(_Payload(), path)
    refused("not a readable checkpoint")
    assert not (tmp_path / "ran").exists()


def test_weights_with_nan_are_refused(tmp_path):
    source = _resnet()
    with torch.no_grad():
        source.bn1.weight[3] = torch.inf
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(NonFiniteError, match="weights.pth: bn1.weight holds NaN or infinity"):
        load_weights(_resnet(), tmp_path / "weights.pth")
