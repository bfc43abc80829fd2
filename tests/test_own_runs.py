"""Whole runs with networks of the user's own code, and with the built-in ones of small images."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.distill import DistillConfig, PoolConfig, distill, loop
from krrst_fast.distill.pool import Pool
from krrst_fast.errors import CheckpointError, ConfigError
from krrst_fast.evaluate import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    ProbeConfig,
    evaluate,
    tuning,
)
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.evaluate.trial import Trials
from krrst_fast.models import ModelConfig, build, source
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.files import read_json
from krrst_fast.runs.tensors import load_state
from krrst_fast.targets import FrozenTarget, TargetConfig, load_target

NETS = """
import torch
from torch import nn

SCALE = torch.rand(())  # drawn when the file is loaded, in every process


class Net(nn.Module):
    def __init__(self, image_size, num_outputs, channels=3):
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, num_outputs))
        self.conv = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout2d(0.2)
        self.log = []

    def embed(self, x):
        return SCALE * self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.embed(x))


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
"""
NET = ModelConfig(kind="nets.py:Net")
SLOW = pytest.mark.slow


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nets.py in it."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "nets.py"


@pytest.fixture
def config(tiny_store: Path, tiny_target: Path, nets: Path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=nets.parent / "run",
        num_images=6,
        steps=8,
        batch_size=16,
        lr=0.01,
        pool=PoolConfig(size=2, online_steps=4, lr=0.01, model=NET),
        checkpoint_every=3,
        log_every=1,
        device="cpu",
    )


def dies_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the run end in place of its checkpoint of that number."""
    real, calls = loop.save_checkpoint, iter(range(number))

    def save(*args: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "save_checkpoint", save)


def test_a_run_resumed_by_another_process_has_the_same_bits(config, nets, monkeypatch):
    """With dropout in the pool, and networks renewed after the kill."""
    distill(replace(config, out=nets.parent / "whole"), progress=False)
    dies_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 3
    program = (
        "import os, sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from pathlib import Path; from krrst_fast.distill import DistillConfig, distill\n"
        "from krrst_fast.runs.config import from_dict\n"
        "from krrst_fast.runs.files import read_json\n"
        "os.chdir(sys.argv[2])\n"
        "config = from_dict(DistillConfig, read_json(Path('config.json')))\n"
        "distill(config, resume=True, progress=False)\n"
    )
    (nets.parent / "config.json").write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-c", program, str(torch.get_num_threads()), str(nets.parent)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    for name in ("initial.safetensors", "distilled.safetensors"):
        whole, resumed = (nets.parent / run / name for run in ("whole", "run"))
        assert resumed.read_bytes() == whole.read_bytes(), name


def test_a_run_records_the_code_and_refuses_to_go_on_with_another(config, nets, monkeypatch):
    dies_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        distill(config, progress=False)
    monkeypatch.undo()
    monkeypatch.chdir(nets.parent)
    digest = NET.identity()["network"]
    assert load_state(config.out / "checkpoint.pt")["inputs"]["network"] == digest
    assert read_json(config.out / "config.json")["pool"]["model"]["kind"] == "nets.py:Net"

    nets.write_text(NETS.replace("0.2", "0.3"))
    with pytest.raises(ConfigError, match="nets.py has changed since this process loaded it"):
        distill(config, resume=True, progress=False)
    source._find.cache_clear()  # as in another process
    with pytest.raises(CheckpointError, match="the network has changed since this run began"):
        distill(config, resume=True, progress=False)
    nets.write_text(NETS)
    source._find.cache_clear()
    made = distill(config, resume=True, progress=False)
    assert made.meta["network"] == digest
    assert json.loads(made.meta["config"])["pool"]["model"]["kind"] == "nets.py:Net"
    nets.write_text(NETS + "\n")
    source._find.cache_clear()
    with pytest.raises(CheckpointError, match="the network has changed"):
        distill(config, resume=True, progress=False)


def test_dropout_draws_anew_in_each_step_and_leaves_the_global_generator_alone(nets):
    def pool(**options):
        config = PoolConfig(
            size=1, online_steps=9, lr=1e-9, momentum=0.0, weight_decay=0, model=NET
        )
        return Pool(config, image_size=8, num_outputs=5, device=torch.device("cpu"), **options)

    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    first, again, other = pool(), pool(), pool(seed=1)
    losses = [[float(p.slots[0].fit(x, y)) for _ in range(3)] for p in (first, again, other)]
    assert torch.equal(torch.get_rng_state(), before)
    # The rate moves nothing, so losses differ by what dropout left out.
    assert len(set(losses[0])) == 3
    assert losses[0] == losses[1] and losses[0] != losses[2]
    network = first.slots[0].network
    assert not any(m.training for m in network.modules())
    torch.testing.assert_close(network.embed(x)[:2], network.embed(x[:2]))


def test_what_its_code_has_frozen_is_not_trained(nets):
    nets.write_text(
        NETS + "\n\nclass Frozen(Net):\n    def __init__(self, **sizes):\n"
        "        super().__init__(8, 5)\n        self.conv.requires_grad_(False)\n"
    )
    config = PoolConfig(size=1, lr=0.1, model=ModelConfig(kind="nets.py:Frozen"))
    slot = Pool(config, image_size=8, num_outputs=5, device=torch.device("cpu")).slots[0]
    before = {name: value.clone() for name, value in slot.network.state_dict().items()}
    slot.fit(torch.randn(6, 3, 8, 8), torch.randn(6, 5))
    after = slot.network.state_dict()
    assert torch.equal(after["net.conv.weight"], before["net.conv.weight"])
    assert not torch.equal(after["net.norm.weight"], before["net.norm.weight"])
    assert not any(p.requires_grad for p in slot.network.parameters())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a labelled store and a target of it at 8 pixels, and both at 32."""
    folder = tmp_path_factory.mktemp("digits")
    for size, limit in ((8, 120), (32, 40)):
        prepare(PrepareConfig(source="digits", out=folder / f"store{size}", size=size, limit=limit))
        network = ModelConfig(widths=(4,))
        FrozenTarget(
            model=build(network, image_size=size, num_outputs=5, seed=0),
            config=network,
            num_outputs=5,
            mean=open_store(folder / f"store{size}").mean,
            std=open_store(folder / f"store{size}").std,
            image_size=size,
        ).save(folder / f"target{size}.safetensors")
    return folder


def distilled(folder: Path, out: Path, model: ModelConfig, size: int, **options) -> DistillConfig:
    pool = PoolConfig(size=1, online_steps=2, lr=0.001, model=model)
    config = DistillConfig(
        store=folder / f"store{size}",
        target=folder / f"target{size}.safetensors",
        out=out,
        pool=pool,
        device="cpu",
        **{"num_images": 4, "steps": 2, "batch_size": 8, **options},
    )
    distill(config, progress=False)
    return config


def evaluation(config: DistillConfig, **options) -> EvaluateConfig:
    return EvaluateConfig(
        run=config.out,
        store=config.store,
        seeds=1,
        model=config.pool.model,
        pretrain=PretrainConfig(steps=3, lr=0.01),
        probe=ProbeConfig(solver="ridge", labels=(1,)),
        finetune=FinetuneConfig(steps=2, batch_size=8),
        device="cpu",
        **options,
    )


@pytest.mark.parametrize("model", [NET, ModelConfig(kind="nets.py:plain", features="3")])
def test_an_evaluation_with_an_own_network_is_the_same_twice(digits, nets, model):
    config = evaluation(distilled(digits, nets.parent / "run", model, 8))
    first = evaluate(config, progress=False)
    assert [row.method for row in first.rows] == list(config.methods)
    assert all("finetune" in row.scores for row in first.rows if row.method != "target")
    again = evaluate(replace(config, overwrite=True), progress=False)
    for one, other in zip(first.rows, again.rows):
        assert one.scores == other.scores, one.method
        assert one.pretrain_loss == other.pretrain_loss, one.method
    nets.write_text(NETS + "\n")
    source._find.cache_clear()
    with pytest.raises(ConfigError, match="made with other settings or data"):
        evaluate(config, progress=False)


def test_methods_share_the_body_and_fine_tuning_takes_it_with_a_new_head(digits, nets, monkeypatch):
    run = distilled(digits, nets.parent / "run", NET, 8)
    trials = Trials(open_materials(evaluation(run)))
    few, many = trials._fresh(0, 3), trials._fresh(10, 3)
    assert many.net.head[2].weight.shape == (10, 8)
    for name, value in few.body_state().items():
        assert torch.equal(value, many.state_dict()[name]), name

    taken: list[dict] = []

    def keep(net, *_: object, **__: object) -> None:
        taken.append({name: value.clone() for name, value in net.state_dict().items()})
        net.eval()

    monkeypatch.setattr(tuning, "finetune", keep)
    net = trials._fresh(10, 3)  # as many outputs as classes: only its name tells the head
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.add_(1)
    trials._finetune(net.eval(), "distilled", 3, lambda: None)
    for name, value in taken[0].items():
        is_body = not name.startswith("net.head")
        assert torch.equal(value, net.state_dict()[name]) == is_body, name


@pytest.mark.parametrize(
    "kind", ["alexnet", *(pytest.param(kind, marks=SLOW) for kind in ("vgg11", "mobilenet"))]
)
def test_the_networks_of_small_images_distil_and_evaluate(digits, tmp_path, kind):
    run = distilled(digits, tmp_path / "run", ModelConfig(kind=kind), 32)
    config = replace(
        evaluation(run, methods=("distilled",)),
        pretrain=PretrainConfig(steps=1, lr=0.001),
        finetune=FinetuneConfig(steps=1, batch_size=4),
    )
    (row,) = evaluate(config, progress=False).rows
    assert row.pretrain_loss > 0 and set(row.scores) == {"probe-1", "outputs-1", "finetune"}


def krrst(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must fail, and return its one line."""
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("krrst: error: ")
    return printed


def test_mistakes_get_one_line_before_anything_is_written(digits, nets, capsys):
    paths = ("--store", digits / "store8", "--target", digits / "target8.safetensors")
    command = ("distill", *paths, "--out", "run", "--num_images", 4, "--device", "cpu")
    own = (*command, "--pool.model.kind")
    assert "nets.py:Ned: there is no 'Ned' in it" in krrst(capsys, *own, "nets.py:Ned")
    assert "there is no layer '7' to take" in krrst(
        capsys, *own, "nets.py:plain", "--pool.model.features", 7
    )
    assert "needs a method embed(x)" in krrst(capsys, *own, "nets.py:plain")
    assert "there is no module 'nats'" in krrst(capsys, *own, "nats:Net")
    assert "kind must be one of convnet" in krrst(capsys, *own, "convnot")
    small = (*command, "--pool.model.kind", "vgg11")
    assert "vgg11 halves the image 5 times" in krrst(capsys, *small)
    assert not (nets.parent / "run").exists()
    target = ("target", *paths[:2], "--out", "run", "--model.kind", "nets.py:Net")
    assert "TargetConfig: model.kind must be built in" in krrst(capsys, *target)


def test_the_file_of_a_target_names_no_code_that_would_be_run(digits, nets, tmp_path):
    model = build(ModelConfig(widths=(4,)), image_size=8, num_outputs=5, seed=0)
    nets.write_text("open('executed', 'w').close()")
    target = load_target(digits / "target8.safetensors")
    made = FrozenTarget(
        model=model, config=NET, num_outputs=5, mean=target.mean, std=target.std, image_size=8
    )
    made.save(tmp_path / "target.safetensors")
    with pytest.raises(CheckpointError, match="names nets.py:Net, code that loading the target"):
        load_target(tmp_path / "target.safetensors")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError, match="must be built in"):
        TargetConfig(store=tmp_path, out=tmp_path, model=NET)
