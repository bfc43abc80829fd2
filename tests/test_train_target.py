"""Runs of `train_target`: files, bits, kills, resuming, refusals."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import checksum
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.config import from_dict, to_dict
from krrst_fast.runs.files import read_json, read_jsonl, write_json
from krrst_fast.runs.tensors import load_state
from krrst_fast.targets import SSLAugmentConfig, TargetConfig, load_target, train_target
from krrst_fast.targets import train as train_module
from krrst_fast.targets.diagnose import collapse_metrics

MODEL = ModelConfig(widths=(4, 8))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("store") / "digits"
    return prepare(PrepareConfig(source="digits", out=out, size=8, limit=40))


@pytest.fixture
def config(store, tmp_path):
    return TargetConfig(
        store=store.path,
        out=tmp_path / "run",
        model=MODEL,
        num_outputs=6,
        steps=12,
        batch_size=16,
        projector=(12,),
        device="cpu",
        checkpoint_every=5,
        log_every=2,
        augment=SSLAugmentConfig(scale=(0.5, 1), saturation=0, hue=0, greyscale=0, noise=0.02),
    )


def _train(config: TargetConfig, resume: bool = False):
    return train_target(config, resume=resume, progress=False)


def _losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(out / "metrics.jsonl")]


def _bits(out: Path) -> bytes:
    return (out / "target.safetensors").read_bytes()


def test_a_run_leaves_its_files_and_a_target(config, store):
    target = _train(config)
    names = ["config.json", "environment.json", "metrics.jsonl", "summary.json"]
    assert sorted(p.name for p in config.out.iterdir()) == [*names, "target.safetensors"]
    assert from_dict(TargetConfig, read_json(config.out / "config.json")) == config
    images = plain_views(store.images(), torch.arange(40), store.mean, store.std)
    assert torch.equal(target(images), load_target(config.out)(images))
    assert (target.mean, target.std, target.image_size) == (store.mean, store.std, 8)
    assert target.meta["loss"] == "barlow_twins" and target.meta["steps"] == "12"
    summary = read_json(config.out / "summary.json")
    assert summary["steps"] == 12 and summary["dim"] == 6
    assert summary["seconds_per_step"] == pytest.approx(summary["seconds"] / 12)
    for key, value in collapse_metrics(target(images)).items():
        assert summary[key] == pytest.approx(value, rel=1e-4)


def test_the_log_has_the_loss_and_the_spread_of_the_representations(config):
    _train(config)
    rows = read_jsonl(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    for row in rows:
        assert 0 < row["effective_rank"] <= 6 and row["output_variance"] > 0
        assert row["embedding_std"] > 0 and row["images_per_second"] > 0
        assert row["peak_memory_mb"] > 0 and row["lr"] <= config.lr
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


@pytest.mark.parametrize("loss", ["barlow_twins", "simclr", "vicreg"])
def test_training_lowers_the_loss(config, loss):
    config = dataclasses.replace(config, loss=loss, steps=80, lr=5e-3, log_every=1)
    _train(config)
    losses = [loss for _, loss in _losses(config.out)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_one_seed_gives_the_same_bits_and_another_does_not(config, tmp_path):
    torch.manual_seed(1)
    _train(config)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = dataclasses.replace(config, out=tmp_path / "again", log_every=3, checkpoint_every=100)
    _train(again)
    assert torch.equal(torch.get_rng_state(), before)
    assert _bits(config.out) == _bits(again.out)
    other = dataclasses.replace(config, out=tmp_path / "other", seed=1)
    _train(other)
    assert _bits(config.out) != _bits(other.out)


# Each child kills itself right before its n-th operation on a file of the run's folder, n growing,
# and the next one resumes: between them they die in the first files, in checkpoints, in the log,
# in the summary, in the target, and after it. The parent must not start threads before it forks.
KILLS = """
import os, signal, sys, warnings
from pathlib import Path
import torch, torch._dynamo, safetensors.torch
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.files import read_json
from krrst_fast.runs.tensors import load_state
from krrst_fast.targets import TargetConfig, train_target

config = from_dict(TargetConfig, read_json(Path(sys.argv[1])))
folder = os.path.abspath(config.out)

def child(allowed):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate"):
            path = args[0]
            if isinstance(path, int):
                return
            if os.path.abspath(os.fsdecode(path)).startswith(folder):
                seen += 1
                if seen > allowed:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    torch.use_deterministic_algorithms(True)
    train_target(config, resume=True, progress=False)

kills, allowed = 0, 0
while True:
    pid = os.fork()
    if pid == 0:
        try:
            child(allowed)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != -signal.SIGKILL:
        print(kills)
        sys.exit(code)
    if (config.out / "checkpoint.pt").exists():
        load_state(config.out / "checkpoint.pt")
    kills, allowed = kills + 1, allowed + 1
"""


def test_a_run_killed_again_and_again_ends_in_the_same_bits(config, tmp_path):
    _train(config)
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(killed)))
    command = [sys.executable, "-c", KILLS, str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
    assert _bits(killed.out) == _bits(config.out)
    assert _losses(killed.out) == _losses(config.out)
    assert sorted(p.name for p in killed.out.iterdir()) == sorted(
        p.name for p in config.out.iterdir()
    )


class _Stopped(Exception):
    pass


def _stop_at(monkeypatch, step: int) -> None:
    """Make training break off after `step` steps, as by an interrupt."""
    train_step = train_module.Trainer.train_step

    def stopping(self):
        if self.step == step:
            raise _Stopped
        return train_step(self)

    monkeypatch.setattr(train_module.Trainer, "train_step", stopping)


def _interrupted(config: TargetConfig, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, step)
        with pytest.raises(_Stopped):
            _train(config)


def test_resuming_goes_on_from_the_checkpoint(config, tmp_path, monkeypatch):
    _train(config)
    stopped = dataclasses.replace(config, out=tmp_path / "stopped")
    _interrupted(stopped, 8)
    assert load_state(stopped.out / "checkpoint.pt")["state"]["trainer"]["step"] == 5
    assert [step for step, _ in _losses(stopped.out)] == [2, 4, 6, 8]
    with pytest.raises(CheckpointError, match="unfinished; resume it"):
        load_target(stopped.out)
    moved = dataclasses.replace(stopped, out=tmp_path / "moved", checkpoint_every=3)
    stopped.out.rename(moved.out)
    _train(moved, resume=True)
    assert _bits(moved.out) == _bits(config.out) and _losses(moved.out) == _losses(config.out)


def test_resuming_a_finished_run_returns_its_target_at_once(config, store, monkeypatch):
    expected = _train(config)
    before = _bits(config.out)
    monkeypatch.delattr(train_module, "Trainer")
    target = _train(config, resume=True)
    images = plain_views(store.images(), torch.arange(8), store.mean, store.std)
    assert torch.equal(target(images), expected(images)) and _bits(config.out) == before
    with pytest.raises(CheckpointError, match="config.json: .* steps was 12 and is 13$"):
        _train(dataclasses.replace(config, steps=13), resume=True)


def test_resuming_what_never_began_starts(config, tmp_path):
    _train(config, resume=True)
    fresh = dataclasses.replace(config, out=tmp_path / "fresh")
    _train(fresh)
    assert _bits(config.out) == _bits(fresh.out)


def test_a_run_with_other_settings_is_not_resumed(config):
    _interrupted(config, 6)
    augment = dataclasses.replace(config.augment, noise=0.03)
    changed = dataclasses.replace(config, lr=0.5, augment=augment)
    for removed in (False, True):
        message = "lr was 0.001 and is 0.5; augment.noise was 0.02 and is 0.03$"
        with pytest.raises(CheckpointError, match=message):
            _train(changed, resume=True)
        if not removed:
            # The checkpoint knows its settings by itself.
            (config.out / "config.json").write_text(json.dumps(to_dict(changed)))
    assert load_state(config.out / "checkpoint.pt")["state"]["trainer"]["step"] == 5


def test_a_run_on_other_images_is_not_resumed(config, tmp_path):
    _interrupted(config, 6)
    other = PrepareConfig(source="digits", out=tmp_path / "other", size=8, limit=39)
    changed = dataclasses.replace(config, store=prepare(other).path)
    message = r"the store has changed .*: it was 40x3x8x8, crc32 \w+ and is 39x3x8x8"
    with pytest.raises(CheckpointError, match=message):
        _train(changed, resume=True)
    _train(config, resume=True)
    with pytest.raises(CheckpointError, match=message):
        _train(changed, resume=True)
    copy = tmp_path / "copy"
    shutil.copytree(config.store, copy)
    _train(dataclasses.replace(config, store=copy), resume=True)


def test_a_damaged_checkpoint_is_named(config):
    _interrupted(config, 6)
    path = config.out / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="checkpoint.pt: not a readable checkpoint"):
        _train(config, resume=True)


def test_folders_in_use_are_refused(config):
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        _train(config)
    with pytest.raises(ConfigError, match="holds files but no config.json: no run to resume"):
        _train(config, resume=True)
    (config.out / "thesis.tex").unlink()
    _train(config)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        _train(config)


def test_a_diverging_run_names_the_step_and_keeps_the_last_good_checkpoint(config):
    config = dataclasses.replace(config, lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match=r"train_target: .* step \d+"):
        _train(config)
    path = config.out / "checkpoint.pt"
    if path.exists():
        state = load_state(path)["state"]["trainer"]["model"]
        assert all(value.isfinite().all() for value in state.values())


def test_images_that_do_not_suit_are_refused_before_anything_is_written(config, tmp_path):
    with pytest.raises(DataError, match="batch_size 41 needs as many images, and .* has 40"):
        _train(dataclasses.replace(config, batch_size=41))
    with pytest.raises(DataError, match="not an image store"):
        _train(dataclasses.replace(config, store=tmp_path))
    with pytest.raises(ConfigError, match="needs at least 16 pixels, got image_size 8"):
        _train(dataclasses.replace(config, model=ModelConfig(widths=(2, 2, 2, 2))))
    with pytest.raises(ConfigError, match="mean and std must have a number for each of the 3"):
        _train(dataclasses.replace(config, mean=(0.5,)))
    with pytest.raises(ConfigError, match=r"mean and std must be in units of \[0, 1\] pixels"):
        _train(dataclasses.replace(config, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)))
    grey = tmp_path / "grey"
    shutil.copytree(config.store, grey)
    index = read_json(grey / "index.json")
    index |= {"channels": 1, "count": 3 * index["count"], "mean": [0.3], "std": [0.3]}
    index["splits"] = {name: [3 * a, 3 * b] for name, (a, b) in index["splits"].items()}
    (grey / "labels.i64").write_bytes(3 * (grey / "labels.i64").read_bytes())
    index["crc32"] = {name: checksum(grey / name) for name in index["crc32"]}
    write_json(grey / "index.json", index, sealed=True)
    assert open_store(grey).channels == 1
    with pytest.raises(ConfigError, match="hue needs images of 3 channels, got 1"):
        augment = dataclasses.replace(config.augment, hue=0.1)
        _train(dataclasses.replace(config, store=grey, augment=augment))
    assert not config.out.exists()
    weights = tmp_path / "weights.pth"
    model = build(MODEL, image_size=8, num_outputs=6, seed=0)
    torch.save(model.state_dict(), weights)
    message = r"conv.weight is \[4, 3, 3, 3\], needed \[4, 1, 3, 3\]"
    with pytest.raises(CheckpointError, match=message):
        _train(dataclasses.replace(config, store=grey, weights=weights))
    assert not config.out.exists()
    assert _train(dataclasses.replace(config, store=grey)).channels == 1


def test_weights_become_a_target_without_training(config, store, tmp_path):
    model = build(MODEL, image_size=8, num_outputs=6, seed=9).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
               tmp_path / "weights.pth")  # fmt: skip
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    config = dataclasses.replace(
        config, weights=tmp_path / "weights.pth", batch_size=1000, mean=mean, std=std
    )
    target = _train(config)
    images = plain_views(store.images(), torch.arange(40), mean, std)
    torch.testing.assert_close(target(images), model(images))
    assert (target.mean, target.std) == (mean, std)
    assert target.meta["weights"] == "weights.pth"
    assert read_json(config.out / "summary.json")["effective_rank"] > 0
    assert not (config.out / "metrics.jsonl").exists()
    (tmp_path / "weights.pth").unlink()
    assert torch.equal(_train(config, resume=True)(images), target(images))


def test_progress_is_optional(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    train_target(config, progress=True)
    assert len(read_jsonl(config.out / "metrics.jsonl")) == 6
