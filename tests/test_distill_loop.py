"""A whole distillation: its files, its log, exact resume, and what it refuses."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch

import krrst_fast.distill.loop as loop
from krrst_fast.data import open_store, plain_views
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.files import read_jsonl
from krrst_fast.runs.tensors import load_state
from krrst_fast.targets import load_target
from tests.test_distill_source import Live


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=12,
        batch_size=16,
        lr=0.01,
        views=ViewConfig(padding=2),
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=5,
        log_every=3,
    )


class Stop(BaseException):
    """Ends a run at a chosen place, as a signal would."""


def _stop_at(monkeypatch, step: int, name: str = "outer_step") -> None:
    real, calls = getattr(loop, name), iter(range(step))

    def counted(*args, **options):
        if next(calls, None) is None:
            raise Stop
        return real(*args, **options)

    monkeypatch.setattr(loop, name, counted)


def test_a_run_leaves_its_files_and_returns_its_result(config):
    result = distill(config, progress=False)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "distilled.safetensors",
        "environment.json",
        "initial.safetensors",
        "metrics.jsonl",
        "summary.json",
    ]
    saved = load_distilled(config.out)
    assert torch.equal(saved.images, result.images) and torch.equal(saved.targets, result.targets)
    assert saved.meta == result.meta and saved.meta["step"] == "12"
    settings = json.loads(saved.meta["config"])
    assert settings["num_images"] == 6 and "out" not in settings
    assert from_dict(DistillConfig, json.loads((config.out / "config.json").read_text())) == config
    initial = load_distilled(config.out / "initial.safetensors")
    moved = (result.images - initial.images).abs()
    # Twelve steps of AdamW move a pixel by no more than the sum of the rates, give or take.
    assert 0 < moved.max() < 12 * 0.01 and (moved > 0).all()


def test_the_log_has_a_row_every_few_steps_and_the_summary_the_totals(config):
    distill(config, progress=False)
    rows = read_jsonl(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:
        assert set(row) == {
            *("step", "loss", "ridge", "condition", "retries", "slot", "slot_age", "lr"),
            "pool_lr",
            *("images_per_second", "seconds", "peak_memory_mb"),
        }
        assert row["slot"] in (0, 1) and 0 <= row["slot_age"] <= 4
        assert row["lr"] == pytest.approx(0.01 * (1 - 0.999 * (row["step"] - 1) / 12))
        assert 0 < row["loss"] < math.inf and row["condition"] >= 1 and row["ridge"] > 0
    seconds = [0.0] + [row["seconds"] for row in rows]
    for row, before, now in zip(rows, seconds, seconds[1:]):
        assert row["images_per_second"] == pytest.approx(3 * 16 / (now - before))

    summary = json.loads((config.out / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["seconds_per_step"] == pytest.approx(summary["seconds"] / 12)
    assert summary["images_per_second"] == pytest.approx(16 * 12 / summary["seconds"])
    assert summary["seconds"] >= rows[-1]["seconds"] and summary["peak_memory_mb"] > 1


def test_the_run_starts_from_real_images_and_the_targets_outputs(config):
    store, target = open_store(config.store), load_target(config.target)
    initial = loop.initial_set(config, store, target)
    real = plain_views(store.images(), torch.arange(40), target.mean, target.std)
    matches = [(real == image).flatten(1).all(1).nonzero().item() for image in initial.images]
    assert len(set(matches)) == 6
    torch.testing.assert_close(initial.targets, target(initial.images))

    raw = loop.initial_set(dataclasses.replace(config, image_space="raw"), store, target)
    torch.testing.assert_close(raw.images, store.images()[matches] / 255, rtol=0, atol=1e-6)
    assert torch.equal(raw.targets, initial.targets)
    assert torch.equal(raw.pixels(), initial.pixels())
    assert torch.equal(raw.pixels(), store.images()[matches].permute(0, 2, 3, 1))

    other = dataclasses.replace(config, init_images="noise", init_targets="random", num_images=40)
    noise = loop.initial_set(other, store, target)
    assert abs(noise.images.mean()) < 0.05 and abs(noise.images.std() - 1) < 0.05
    torch.testing.assert_close(noise.targets.mean(0), target(real).mean(0), rtol=0.6, atol=0.05)


@pytest.mark.parametrize("space", ["normalized", "raw"])
@pytest.mark.parametrize("images", ["real", "noise"])
def test_the_first_targets_are_the_outputs_on_the_first_images(config, images, space):
    store, target = open_store(config.store), load_target(config.target)
    config = dataclasses.replace(config, init_images=images, image_space=space)
    initial = loop.initial_set(config, store, target)
    seen = initial.images if space == "normalized" else (initial.images - 0.5) / 0.3
    torch.testing.assert_close(initial.targets, target(seen), rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_give_the_same_bits_and_another_seed_does_not(config, tmp_path):
    results = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = dataclasses.replace(config, out=tmp_path / name, seed=seed)
        distill(run, progress=False)
        results.append((run.out / "distilled.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


def test_the_global_generator_is_neither_read_nor_moved(config, tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = distill(config, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = distill(dataclasses.replace(config, out=tmp_path / "other"), progress=False)
    assert torch.equal(first.images, second.images)


@pytest.mark.parametrize(
    "name, calls",
    [
        ("fit", 2),
        ("outer_step", 0),
        ("outer_step", 4),
        ("outer_step", 7),
        ("save_checkpoint", 1),
        ("write_json", 1),
        ("as_distilled", 0),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(config, tmp_path, monkeypatch, name, calls):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    distill(whole, progress=False)
    with monkeypatch.context() as patch:
        if name == "fit":
            slot = "krrst_fast.distill.pool.Slot.fit"
            patch.setattr(slot, lambda self, x, y: (_ for _ in ()).throw(Stop()))
        else:
            _stop_at(patch, calls, name)
        with pytest.raises(Stop):
            distill(config, progress=False)
    distill(config, resume=True, progress=False)
    for file in ("distilled.safetensors", "initial.safetensors"):
        assert (config.out / file).read_bytes() == (whole.out / file).read_bytes()
    expected = [_content(row) for row in read_jsonl(whole.out / "metrics.jsonl")]
    assert [_content(row) for row in read_jsonl(config.out / "metrics.jsonl")] == expected
    seconds = [row["seconds"] for row in read_jsonl(config.out / "metrics.jsonl")]
    assert seconds == sorted(seconds)


def _content(row: dict) -> dict:
    """A row without what the clock and the machine say."""
    measured = ("seconds", "images_per_second", "peak_memory_mb")
    return {key: value for key, value in row.items() if key not in measured}


def test_resuming_a_finished_run_gives_its_result_and_computes_nothing(config, monkeypatch):
    result = distill(config, progress=False)
    monkeypatch.setattr(loop, "initial_set", None)
    again = distill(dataclasses.replace(config, log_every=1), resume=True, progress=False)
    assert torch.equal(result.images, again.images) and torch.equal(result.targets, again.targets)


def test_resuming_what_never_began_begins(config):
    assert distill(config, resume=True, progress=False).images.shape == (6, 3, 8, 8)


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_cannot_be_resumed(config, monkeypatch, finished):
    if finished:
        distill(config, progress=False)
    else:
        with monkeypatch.context() as patch, pytest.raises(Stop):
            _stop_at(patch, 7)
            distill(config, progress=False)
    before = (config.out / "checkpoint.pt").read_bytes()
    pool = dataclasses.replace(config.pool, lr=0.2)
    other = dataclasses.replace(config, lr=3.0, pool=pool, checkpoint_every=1)
    message = r"other settings: lr was 0.01 and is 3.0; pool.lr was 0.1 and is 0.2$"
    with pytest.raises(CheckpointError, match=message):
        distill(other, resume=True, progress=False)
    (config.out / "config.json").write_text(json.dumps(loop.to_dict(other)))
    if not finished:
        with pytest.raises(CheckpointError, match="checkpoint.pt: of a run with " + message):
            distill(other, resume=True, progress=False)
    assert (config.out / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_named(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        _stop_at(patch, 7)
        distill(config, progress=False)
    path = config.out / "checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:5000], whole[:-100], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checkpoint.pt: not a readable checkpoint"):
            distill(config, resume=True, progress=False)


def test_a_run_that_fails_leaves_its_last_checkpoint(config, monkeypatch):
    real = loop.outer_step

    def poisoned(state, source, *args, **options):
        if state.step == 7:
            poison = Live(lambda batch: batch.new_full((16, 5), math.nan))
            object.__setattr__(source, "represent", poison)
        return real(state, source, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "outer_step", poisoned)
        with pytest.raises(NonFiniteError, match=r"distill: step 8, slot \d"):
            distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 5
    assert torch.isfinite(distill(config, resume=True, progress=False).images).all()


def test_a_set_that_went_bad_does_not_replace_the_checkpoint(config, monkeypatch):
    real = loop.outer_step

    def poisoned(state, *args, **options):
        report = real(state, *args, **options)
        if state.step == 10:
            state.y_syn.data[0, 0] = math.nan
        return report

    monkeypatch.setattr(loop, "outer_step", poisoned)
    with pytest.raises(NonFiniteError, match="the targets hold NaN or infinity at step 10"):
        distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 5


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"num_images": 41},
            DataError,
            "fewer images than asked for: num_images is 41, the store .* has 40",
        ),
        ({"store": Path("nowhere")}, DataError, "nowhere: not an image store"),
        ({"target": Path("nowhere")}, CheckpointError, "nowhere"),
        ({"device": "tpu"}, ConfigError, "device: must be auto, cpu, cuda"),
    ],
)
def test_bad_input_is_one_line_and_makes_no_folder(config, change, error, message):
    with pytest.raises(error, match=message) as raised:
        distill(dataclasses.replace(config, **change), progress=False)
    assert "\n" not in str(raised.value) and not config.out.exists()


def test_an_output_folder_in_use_is_refused_and_left_alone(config):
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="run: the output folder exists and is not empty"):
        distill(config, progress=False)
    with pytest.raises(ConfigError, match="holds files but no config.json"):
        distill(config, resume=True, progress=False)
    assert [path.name for path in config.out.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("batch_size", [40, 100])
def test_a_batch_may_be_as_large_as_the_store_or_larger(config, batch_size):
    result = distill(dataclasses.replace(config, batch_size=batch_size, steps=2), progress=False)
    assert torch.isfinite(result.images).all()


@pytest.mark.parametrize(
    "change",
    [
        {"image_space": "raw"},
        {"init_images": "noise", "init_targets": "random"},
        {"dtype": "float64"},
        {"ridge_of": "mean_diagonal", "ridge": 1e-3},
        {"pool": PoolConfig(size=1, online_steps=2, reset="released")},
        {"num_images": 1, "steps": 1, "batch_size": 1},
        {"num_images": 40},
    ],
)
def test_every_option_runs_and_moves_the_images(config, change):
    if "pool" in change:
        pool = dataclasses.replace(change["pool"], model=config.pool.model)
        change = change | {"pool": pool}
    run = dataclasses.replace(config, **change)
    result = distill(run, progress=False)
    initial = load_distilled(run.out / "initial.safetensors")
    assert result.images.dtype == torch.float32 and len(result) == run.num_images
    assert (result.images != initial.images).float().mean() > 0.9


class Terminal(io.StringIO):
    """A standard error that people look at."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_is_shown_on_a_terminal_when_asked_for(config, monkeypatch, shown):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    distill(config, progress=shown)
    text = terminal.getvalue()
    for part in ("pool warm-up: 100%", "distill: 100%", "12/12", "loss=", "ridge=", "cond="):
        assert (part in text) == shown
    assert ("images/s=" in text) == shown


def test_no_bar_is_written_into_a_file(config, capfd):
    distill(config, progress=True)
    assert capfd.readouterr() == ("", "")


def test_the_loss_falls(config):
    """Forty steps on twenty images: the loss of the last ten is well below that of the first."""
    pool = dataclasses.replace(config.pool, size=3, online_steps=100, lr=0.01)
    run = dataclasses.replace(
        config, num_images=20, steps=40, batch_size=40, lr=0.05, log_every=1, pool=pool
    )
    distill(run, progress=False)
    losses = [row["loss"] for row in read_jsonl(run.out / "metrics.jsonl")]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_images": 0}, "DistillConfig: num_images must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive, or lr_targets given, got 0.0"),
        ({"lr": 0.0, "lr_targets": 0.0}, "lr_targets must be positive where lr is 0, got 0.0"),
        ({"lr_targets": -1.0}, "lr_targets must be at least 0, got -1.0"),
        ({"final_lr_fraction": 2.0}, "final_lr_fraction must be in"),
        ({"ridge": 0.0}, "ridge must be positive"),
        (
            {"ridge_of": "mean"},
            "ridge_of must be one of trace, mean_diagonal, absolute, got 'mean'",
        ),
        ({"image_space": "lab"}, "image_space must be one of normalized, raw"),
        ({"log_every": 0}, "log_every must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **change)
