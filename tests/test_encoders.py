"""Encoders as targets: each kind of SPEC, from `krrst target` to a distilled set."""

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from krrst_fast.baselines import random_subset
from krrst_fast.cli.main import main
from krrst_fast.data import open_store
from krrst_fast.data.augment import ViewConfig, plain_views
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.models import ModelConfig
from krrst_fast.targets import TargetConfig, encoder_target, load_target, train_target
from krrst_fast.targets.encoder import pooled
from tests.tiny_onnx import linear_model

SIZE, MEAN, STD = 12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
SOURCE = """
import torch

def make():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 9, 5, 3), torch.nn.ReLU())
    net.input_size, net.mean, net.std = 12, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return net

class box:
    make = staticmethod(make)

def plain():
    return torch.nn.Sequential(*make())

def unseeded():
    return torch.nn.Conv2d(3, 9, 5, 3)

def nothing():
    return 3

def broken():
    raise RuntimeError("my own message")
"""


def _net() -> nn.Module:
    namespace: dict = {}
    exec(SOURCE, namespace)
    return namespace["make"]().eval()


def _trace(net: nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        # TorchScript is deprecated, and its files are there.
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, torch.zeros(2, 3, SIZE, SIZE)), str(path))


@pytest.fixture
def specs(tmp_path, monkeypatch) -> dict[str, str]:
    """Every kind of SPEC that a network has, of the same tiny one but for ONNX."""
    (tmp_path / "my.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "tiny_module_of_a_test.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.zeros(2, 3, SIZE, SIZE)
    _trace(_net(), tmp_path / "net.pt")
    batch = torch.export.Dim("batch")
    program = torch.export.export(_net(), (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    weight = torch.randn(3 * SIZE * SIZE, 9, generator=torch.Generator().manual_seed(0))
    (tmp_path / "net.onnx").write_bytes(linear_model(weight.numpy()))
    return {
        "module": "tiny_module_of_a_test:box.make",
        "file": f"{tmp_path / 'my.py'}:make",
        "torchscript": str(tmp_path / "net.pt"),
        "export": str(tmp_path / "net.pt2"),
        "onnx": str(tmp_path / "net.onnx"),
    }


def _config(store: Path, out: Path, spec: str, **changes) -> TargetConfig:
    file = Path(spec).suffix in (".pt", ".pt2", ".onnx")
    own = {"input_size": SIZE, "mean": MEAN, "std": STD} if file else {}
    given = {"num_outputs": 4, "device": "cpu", **own, **changes}
    return TargetConfig(store=store, out=out, encoder=spec, **given)


def _distilled(store: Path, target: Path, out: Path, **changes) -> DistillConfig:
    given = {"views": ViewConfig(padding=0), "steps": 3, "target_cache": "on", **changes}
    return DistillConfig(
        store=store,
        target=target,
        out=out,
        num_images=6,
        batch_size=8,
        lr=0.01,
        device="cpu",
        pool=PoolConfig(size=2, online_steps=3, model=ModelConfig(widths=(4, 8))),
        **given,
    )


def _needs_onnx(kind: str) -> None:
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")


@pytest.mark.parametrize("kind", ["module", "file", "torchscript", "export", "onnx"])
def test_every_kind_of_spec_makes_a_target_that_distils(kind, specs, tiny_store, tmp_path):
    _needs_onnx(kind)
    made = train_target(_config(tiny_store, tmp_path / "t", specs[kind]), progress=False)
    store = open_store(tiny_store)
    index = torch.arange(40)
    outputs = made.plain(store, index)
    assert outputs.shape == (40, 4) == (40, made.dim)
    variances = outputs.double().var(0, correction=0)
    assert variances.mean().item() == pytest.approx(1, rel=1e-4)
    assert outputs.mean(0).abs().max() < 1e-4
    assert (variances.diff() <= 1e-6).all()
    # Same images, one at a time, in the target that is read again.
    again = load_target(tmp_path / "t")
    assert torch.equal(again.plain(store, index), outputs)
    one = again.plain(store, index[7:8])
    torch.testing.assert_close(one, outputs[7:8], rtol=1e-4, atol=1e-5)
    assert again.identity() == made.identity()
    result = distill(_distilled(tiny_store, tmp_path / "t", tmp_path / "run"), progress=False)
    assert result.targets.shape == (6, 4) and torch.isfinite(result.images).all()
    assert random_subset(store, again, 5, seed=0).targets.shape == (5, 4)
    if kind in ("torchscript", "export", "onnx"):
        # The folder has its own copy.
        Path(specs[kind]).unlink()
        assert load_target(tmp_path / "t").identity() == made.identity()


def test_an_encoder_sees_its_own_size_and_scale(specs, tiny_store, tmp_path):
    store = open_store(tiny_store)
    target = encoder_target(specs["file"], store, num_outputs=4)
    pixels = store.images()[:5].double() / 255
    resized = torch.nn.functional.interpolate(
        pixels, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False
    )
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    features = _net().double()((resized - mean) / std).mean((2, 3))
    images = plain_views(store.images(), torch.arange(5), store.mean, store.std)
    torch.testing.assert_close(target.model.embed(images), features.float(), rtol=1e-4, atol=1e-5)
    expected = features @ target.model.fc.weight.double().T + target.model.fc.bias
    torch.testing.assert_close(target(images), expected.float(), rtol=1e-4, atol=1e-4)
    assert (target.mean, target.std, target.image_size) == (store.mean, store.std, 8)


def test_a_module_is_a_target_in_python_and_cannot_be_saved(tiny_store, tmp_path):
    store = open_store(tiny_store)
    by_module = encoder_target(_net(), store, num_outputs=0)
    assert by_module.dim == 9
    with pytest.raises(ConfigError, match=r"give encoder_target a SPEC such as file.py:callable"):
        by_module.save(tmp_path / "target.safetensors")
    bare = nn.Sequential(*_net())
    with pytest.raises(ConfigError, match="input_size and mean and std must be given"):
        encoder_target(bare, store, num_outputs=4)
    given = {"input_size": SIZE, "mean": MEAN, "std": STD}
    index = torch.arange(40)
    for standardize in (False, True):
        options = {"num_outputs": 4, "standardize": standardize}
        outputs = encoder_target(bare, store, **given, **options).plain(store, index)
        same = encoder_target(_net(), store, **options).plain(store, index)
        assert torch.equal(outputs, same)
        variances = outputs.var(0, correction=0)
        assert torch.allclose(variances, torch.ones(4), atol=1e-3) == standardize


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_matrix_of_features_is_a_target_for_the_views_it_has(mirrored, tiny_store, tmp_path):
    features = np.random.default_rng(1).normal(size=(40, 2, 7)).astype(np.float32)
    features = features if mirrored else features[:, 0]
    np.save(tmp_path / "features.npy", features)
    config = _config(tiny_store, tmp_path / "t", str(tmp_path / "features.npy"))
    made = train_target(config, progress=False)
    assert made.table is not None and made.dim == 4
    (tmp_path / "features.npy").unlink()
    store, plain = open_store(tiny_store), ViewConfig(padding=0, flip=mirrored)
    run = _distilled(tiny_store, tmp_path / "t", tmp_path / "run", views=plain)
    assert distill(run, progress=False).targets.shape == (6, 4)
    flat = torch.from_numpy(features.reshape(-1, 7)).double()
    outputs = made.model.outputs.view(-1, 4).double()
    # Distances are those of the features in their best plane, times one factor.
    _, singular, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    factor = (singular[:4].square().sum() / len(flat) / 4).sqrt()
    best = (flat - flat.mean(0)) @ directions[:4].T / factor
    torch.testing.assert_close(outputs @ outputs.T, best @ best.T, rtol=1e-4, atol=1e-4)
    index = torch.tensor([3, 5])
    rows = made.table.rows(index, torch.tensor([mirrored, False]))
    step = 2 if mirrored else 1
    assert torch.equal(rows.double(), outputs[[3 * step + mirrored, 5 * step]])

    for wrong in (ViewConfig(padding=1, flip=False), ViewConfig(padding=0, flip=True)):
        if wrong != plain:
            refused = dataclasses.replace(run, out=tmp_path / "wrong", views=wrong)
            kept, flag = (
                ("plain and mirrored", "") if mirrored else ("plain", " --views.flip false")
            )
            message = f"features of {kept} images.* pass --views.padding 0{flag}$"
            with pytest.raises(ConfigError, match=message):
                distill(refused, progress=False)
    noise = dataclasses.replace(run, out=tmp_path / "noise", init_images="noise")
    with pytest.raises(ConfigError, match="table of features"):
        distill(noise, progress=False)
    altered = dataclasses.replace(made, meta={"store": "other"})
    with pytest.raises(DataError, match="features of other images"):
        random_subset(store, altered, 3, seed=0)


def test_features_that_do_not_fit_are_refused(tiny_store, tmp_path):
    path = tmp_path / "features.npy"

    def refused(message: str, array=None, **changes) -> None:
        if array is not None:
            np.save(path, array)
        with pytest.raises((ConfigError, DataError), match=message):
            train_target(
                _config(tiny_store, tmp_path / "t", str(path), **changes),
                resume=True,
                progress=False,
            )

    refused("there is no such file")
    refused("has 39 rows, and the train split of the store has 40", np.ones((39, 7)))
    refused(r"must hold floats \[N, D\]", np.ones((40, 3, 7)))
    refused(r"got int64", np.ones((40, 7), np.int64))
    refused("hold NaN", np.full((40, 7), np.nan))
    refused("at most the 3 features", np.random.default_rng(0).normal(size=(40, 3)))
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    refused("not a readable .npy")
    np.save(path, np.random.default_rng(0).normal(size=(40, 7)))
    refused("features have no input_size", input_size=9)
    refused("features of all images are the same", np.ones((40, 7)))


@pytest.mark.parametrize(
    "name, message",
    [
        ("plain", "input_size and mean and std must be given"),
        ("nothing", "must make a torch.nn.Module, got a int"),
        ("broken", "RuntimeError: my own message"),
        ("absent", "there is no 'absent' in it"),
    ],
)
def test_what_is_no_encoder_is_one_line(name, message, specs, tiny_store, tmp_path, capsys):
    spec = specs["file"].replace(":make", f":{name}")
    words = ["target", "--store", str(tiny_store), "--out", str(tmp_path / "t"), "--encoder", spec]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_specs_that_cannot_be_opened_are_refused(specs, tiny_store, tmp_path):
    def refused(kind: type[Exception], message: str, spec: str, **changes) -> None:
        with pytest.raises(kind, match=message):
            config = _config(tiny_store, tmp_path / "t", spec, **changes)
            train_target(config, progress=False)
        assert not (tmp_path / "t").exists()

    refused(ConfigError, "must be one of efficientnet_lite0; module:callable", "resnet18")
    refused(ConfigError, "there is no module 'no_such", "no_such_module_at_all:make")
    refused(CheckpointError, "there is no such file", str(tmp_path / "none.pt"))
    (tmp_path / "bad.pt2").write_bytes(b"bad")
    refused(CheckpointError, "bad.pt2: not a readable export file", str(tmp_path / "bad.pt2"))
    torch.save(_net().state_dict(), tmp_path / "state.pt")
    refused(CheckpointError, "a state dict is for --weights", str(tmp_path / "state.pt"))
    own = {"input_size": SIZE, "mean": MEAN, "std": STD}
    unseeded = specs["file"].replace(":make", ":unseeded")
    refused(ConfigError, "gives other weights at each call", unseeded, **own)
    small = {**own, "input_size": 3}
    refused(ConfigError, r"fails on batches of 3, 2 or 1 images \[3, 3, 3\]", unseeded, **small)


def test_an_encoder_that_has_changed_is_refused(specs, tiny_store, tmp_path):
    source = tmp_path / "my.py"
    train_target(_config(tiny_store, tmp_path / "t", specs["file"]), progress=False)
    run = _distilled(tiny_store, tmp_path / "t", tmp_path / "run")
    source.write_text(SOURCE.replace("manual_seed(3)", "manual_seed(4)"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="my.py:make has changed: its weights were sha256"):
        distill(run, progress=False)
    source.write_text(SOURCE.replace("torch.nn.ReLU()", "torch.nn.Tanh()"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="same weights and gives other outputs"):
        distill(run, progress=False)
    source.unlink()
    with pytest.raises(CheckpointError, match="cannot be made again: .*there is no file"):
        distill(run, progress=False)
    train_target(_config(tiny_store, tmp_path / "f", specs["torchscript"]), progress=False)
    (copy,) = (tmp_path / "f").glob("encoder-*.pt")
    copy.write_bytes(b"not even TorchScript: it is compared before it is opened")
    with pytest.raises(CheckpointError, match="encoder-.*pt has changed"):
        load_target(tmp_path / "f")
    _trace(nn.Flatten(), copy)
    with pytest.raises(CheckpointError, match="encoder-.*pt has changed"):
        load_target(tmp_path / "f")


def test_info_reads_a_target_without_running_its_encoder(specs, tiny_store, tmp_path, capsys):
    train_target(_config(tiny_store, tmp_path / "t", specs["file"]), progress=False)
    (tmp_path / "my.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert main(["info", str(tmp_path / "t")]) == 0
    shown = capsys.readouterr().out
    assert "target encoder" in shown and "my.py:make" in shown and "4 of 9 features" in shown


def test_a_file_of_a_later_format_is_named(specs, tiny_store, tmp_path):
    train_target(_config(tiny_store, tmp_path / "t", specs["file"]), progress=False)
    path = tmp_path / "t" / "target.safetensors"
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["krrst_fast.target"])
    assert info["format_version"] == 2 and info["encoder"]["input_size"] == SIZE
    info["format_version"] = 3
    save_file(load_file(path), path, metadata={"krrst_fast.target": json.dumps(info)})
    with pytest.raises(CheckpointError, match="target format 3, and this version reads 1 and 2"):
        load_target(path)


def test_features_are_found_in_the_outputs_of_the_usual_libraries():
    class Output(dict):
        __getattr__ = dict.get

    maps, tokens, vectors = torch.rand(2, 5, 3, 3), torch.rand(2, 7, 5), torch.rand(2, 5)
    assert torch.equal(pooled(maps), maps.mean((2, 3)))
    assert torch.equal(pooled(tokens), tokens.mean(1))
    assert pooled(vectors) is vectors and pooled([vectors]) is vectors
    assert pooled(Output(pooler_output=vectors, last_hidden_state=tokens)) is vectors
    hidden = pooled(Output(last_hidden_state=tokens, pooler_output=None))
    assert torch.equal(hidden, tokens.mean(1))
    for wrong in (torch.rand(2), [vectors, vectors], {"logits": vectors}, None):
        with pytest.raises(ConfigError, match="encoder: must give one tensor"):
            pooled(wrong)
