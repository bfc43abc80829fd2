"""Held-out R2 while distilling: its numbers, its rows, the same bits, and where there is none."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import krrst_fast.distill.loop as loop
from krrst_fast import krr_fit
from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, ViewConfig, open_store, plain_views, prepare
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.heldout import (
    ATTAINABLE,
    MISSING,
    OURS,
    REAL,
    RIDGES,
    HeldOut,
    in_words,
    nothing_to_distil,
)
from krrst_fast.distill.start import initial_set, make_source, make_state
from krrst_fast.models import ModelConfig
from krrst_fast.runs.files import read_json, read_jsonl
from krrst_fast.targets import TargetConfig, load_target, train_target
from krrst_fast.targets.encoder import Encoder

CPU = torch.device("cpu")
FIGURES = {OURS, REAL, ATTAINABLE}
ENCODER = """
import torch

def make():
    torch.manual_seed(3)
    net = torch.nn.Conv2d(3, 9, 5, 3)
    net.input_size, net.mean, net.std = 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    return net
"""


def _images(count: int, seed: int) -> np.ndarray:
    """Smooth images of few degrees of freedom, of which some can be predicted from others."""
    draw = np.random.default_rng(seed)
    slope = np.linspace(-1, 1, 8)[:, None, None]
    colour, gradient = draw.uniform(0.2, 0.8, (2, count, 1, 1, 3))
    noise = draw.normal(scale=0.02, size=(count, 8, 8, 3))
    return np.uint8(255 * np.clip(colour + (gradient - 0.5) * slope + noise, 0, 1))


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Path, Path]:
    """A store of 40 images with a test split of 20, and one of the same 40 without."""
    folder = tmp_path_factory.mktemp("stores")
    parts = {"train": _images(40, 0), "test": _images(20, 1)}
    for name, splits in (("both", ["train", "test"]), ("one", ["train"])):
        (folder / f"{name}-npz").mkdir()
        for split in splits:
            np.savez(folder / f"{name}-npz" / f"{split}.npz", images=parts[split])
        source = str(folder / f"{name}-npz")
        prepare(PrepareConfig(source=source, out=folder / name, size=8), progress=False)
    return folder / "both", folder / "one"


@pytest.fixture
def config(stores, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=stores[0],
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=20,
        batch_size=16,
        lr=0.01,
        views=ViewConfig(padding=1),
        pool=PoolConfig(size=2, online_steps=6, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=7,
        log_every=7,
        device="cpu",
    )


def _parts(config: DistillConfig):
    store, target = open_store(config.store), load_target(config.target)
    initial = initial_set(config, store, target)
    state = make_state(config, initial, CPU)
    loop.warm_up(state)
    source = make_source(config, store, target, CPU)
    return store, target, state, HeldOut(config, store, target, source, initial)


def _r2(predicted: Tensor, wanted: Tensor) -> float:
    share = (predicted - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
    return 1 - share.item()


def test_the_figures_are_those_of_their_formulas(config):
    config = dataclasses.replace(config, dtype="float64", ridge=1e-3)
    store, target, state, held_out = _parts(config)
    state.x_syn.data += 0.1 * torch.randn(state.x_syn.shape, generator=state.generator)
    found = held_out.measure(state)
    network = max(state.pool.slots, key=lambda slot: slot.age).network

    def seen(split: str) -> tuple[Tensor, Tensor]:
        images = store.images(split)
        x = plain_views(images, torch.arange(len(images)), target.mean, target.std)
        return network.embed(x.double()), target(x).double()

    f_held, wanted = seen("test")
    initial = initial_set(config, store, target)
    for name, x, y in (
        (OURS, state.x_syn.detach(), state.y_syn.detach()),
        (REAL, initial.images.double(), initial.targets.double()),
    ):
        f, ones = network.embed(x), torch.ones(6, 1, dtype=torch.float64)
        with_one = torch.cat([f, ones], 1)
        gram = with_one @ with_one.T
        ridged = gram + config.ridge * gram.trace() * torch.eye(6, dtype=torch.float64)
        held = torch.cat([f_held, torch.ones(len(f_held), 1, dtype=torch.float64)], 1)
        predicted = held @ with_one.T @ torch.linalg.solve(ridged, y)
        assert found[name] == pytest.approx(_r2(predicted, wanted), abs=1e-8)
    # By fits with each ridge, of which leave-one-out chooses: all 40 images are fitted on.
    options = {"ridge_of": "mean_diagonal", "intercept": True}
    fits = [krr_fit(*seen("train"), ridge=ridge, **options) for ridge in RIDGES]
    best = min(fits, key=lambda fit: fit.loo_residuals.square().mean().item())
    assert found[ATTAINABLE] == pytest.approx(_r2(best.predict(f_held), wanted), abs=1e-6)
    assert len({round(value, 3) for value in found.values()}) == 3
    assert found[ATTAINABLE] > found[REAL]


def test_a_measurement_changes_nothing(config):
    _, _, state, held_out = _parts(config)
    before = copy.deepcopy(state.state_dict())
    first, again = held_out.measure(state), held_out.measure(state)
    assert first == again and set(first) == FIGURES
    after = state.state_dict()
    assert torch.equal(after["generator"], before["generator"])
    for slot, then in zip(after["pool"], before["pool"], strict=True):
        for name, value in slot["network"].items():
            assert torch.equal(value, then["network"][name])
    assert not state.pool.slots[0].network.training


def test_the_run_has_the_bits_of_one_that_holds_nothing_out(config, stores, tmp_path):
    alone = dataclasses.replace(config, store=stores[1], out=tmp_path / "alone")
    results = [distill(run, progress=False) for run in (config, alone)]
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].targets, results[1].targets)
    summary = read_json(alone.out / "summary.json")
    assert "no test or val split" in summary[MISSING] and not FIGURES & summary.keys()
    assert [row["step"] for row in read_jsonl(alone.out / "metrics.jsonl")] == [7, 14, 20]


def test_rows_and_summary_hold_the_figures(config):
    distill(config, progress=False)
    rows = read_jsonl(config.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted({*range(0, 21, 2), 7})
    for row in rows:
        measured = row["step"] % 2 == 0
        ends = row["step"] in (0, 10, 20)
        expected = (FIGURES if ends else {OURS, REAL}) if measured else set()
        assert FIGURES & row.keys() == expected
        assert ("loss" in row) == ("images_per_second" in row) == (row["step"] > 0)
    assert rows[0][OURS] == rows[0][REAL] and rows[-1][OURS] != rows[-1][REAL]
    summary = read_json(config.out / "summary.json")
    assert {name: summary[name] for name in FIGURES} == {name: rows[-1][name] for name in FIGURES}


@pytest.mark.parametrize("name, calls", [("outer_step", 0), ("outer_step", 9), ("as_distilled", 0)])
def test_a_stopped_run_has_each_row_once_and_the_same_figures(
    config, tmp_path, monkeypatch, name, calls
):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    distill(whole, progress=False)
    real, left = getattr(loop, name), iter(range(calls))

    def stopping(*args, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, name, stopping)
        distill(config, progress=False)
    distill(config, resume=True, progress=False)
    results = [(run.out / "distilled.safetensors").read_bytes() for run in (whole, config)]
    assert results[0] == results[1]
    kept = {"step", "loss", *FIGURES}
    logs = [
        [{k: row[k] for k in row if k in kept} for row in read_jsonl(run.out / "metrics.jsonl")]
        for run in (whole, config)
    ]
    assert logs[0] == logs[1]
    summaries = [read_json(run.out / "summary.json") for run in (whole, config)]
    assert all(summaries[0][figure] == summaries[1][figure] for figure in FIGURES)


def test_other_first_sets_are_compared_with_real_images_all_the_same(config):
    _, _, state, held_out = _parts(config)
    noise = dataclasses.replace(config, init_images="noise", init_targets="random")
    _, _, _, other = _parts(noise)
    assert other.measure(state)[REAL] == held_out.measure(state)[REAL]


def test_a_short_run_holds_fewer_images_out(config):
    store, target = open_store(config.store), load_target(config.target)
    source, initial = make_source(config, store, target, CPU), initial_set(config, store, target)
    # 500 passes of an image, 6 * 6 + 14 a step, for each that is held out; two real ones with it.
    for steps, least, held_out, train in ((70, 2, 7, 14), (70, 10, 10, 20), (1000, 2, 20, 40)):
        short = dataclasses.replace(config, steps=steps, batch_size=14)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("krrst_fast.distill.heldout.LEAST", least)
            measured = HeldOut(short, store, target, source, initial)
        assert (len(measured._images), len(measured._train)) == (held_out, train)


def test_a_target_that_real_images_predict_is_warned_of(config):
    easy = dataclasses.replace(config, num_images=40, ridge=1e-4)
    with pytest.warns(UserWarning, match=r"40 real images predict .* hardly anything to distil"):
        distill(easy, progress=False)
    assert in_words(read_json(easy.out / "summary.json")).endswith("hardly anything to distil")


@pytest.mark.parametrize(
    "real, attainable, nothing",
    [
        (-0.3, 0.17, False),
        (0.725, 0.972, False),
        (0.692, 0.85, True),
        (0.95, 0.99, True),
        (-0.4, -0.1, True),
    ],
)
def test_what_is_nothing_to_distil(real, attainable, nothing):
    assert nothing_to_distil({REAL: real, ATTAINABLE: attainable}) == nothing
    assert not nothing_to_distil({REAL: real})


def test_a_figure_that_cannot_be_computed_is_named_and_the_run_goes_on(config):
    _, _, state, held_out = _parts(config)
    slot = max(state.pool.slots, key=lambda slot: slot.age)
    slot.network.blocks[0].conv.weight.data.fill_(torch.nan)
    message = rf"no held-out R2 at step 0, by pool network {slot.number} of age {slot.age}: .+"
    with pytest.warns(UserWarning, match=message):
        assert held_out.measure(state) == {}


def test_a_target_that_fails_on_held_out_images_does_not_end_the_run(config):
    store, target = open_store(config.store), load_target(config.target)
    source, initial = make_source(config, store, target, CPU), initial_set(config, store, target)
    for value, told in ((torch.nan, "hold NaN or infinity"), (0.0, "all the same")):
        target.model.fc.weight.data.mul_(0.0)
        target.model.fc.bias.data.fill_(value)
        measured = HeldOut(config, store, target, source, initial)
        assert told in measured.why_not and not measured.due(0)
        assert in_words(measured.summary([])) == f"held-out R2: none, {measured.why_not}"


def test_outputs_of_an_encoder_are_computed_once_for_all_runs(config, tmp_path, monkeypatch):
    (tmp_path / "my.py").write_text(ENCODER, encoding="utf-8")
    spec, out = f"{tmp_path / 'my.py'}:make", tmp_path / "target"
    given = {"num_outputs": 4, "device": "cpu", "out": out, "store": config.store}
    train_target(TargetConfig(encoder=spec, **given), progress=False)
    seen: list[int] = []
    real = Encoder._features

    def counted(self, x):
        seen.append(len(x))
        return real(self, x)

    monkeypatch.setattr(Encoder, "_features", counted)
    run = dataclasses.replace(config, target=out, steps=40, batch_size=64)
    counts = []
    for name in ("first", "second"):
        distill(dataclasses.replace(run, out=tmp_path / name), progress=False)
        counts.append(sum(seen))
        seen.clear()
    # The probe and the first images each time; once every view of 40 images, and 20 held out.
    assert counts == [2 + 6 + 40 * 18 + 20, 2 + 6]
    figures = [read_json(tmp_path / name / "summary.json")[OURS] for name in ("first", "second")]
    assert figures[0] == figures[1]


def test_a_table_of_features_has_no_outputs_to_hold_out(config, tmp_path):
    features = np.random.default_rng(1).normal(size=(40, 7)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    given = {"num_outputs": 4, "device": "cpu", "out": tmp_path / "t", "store": config.store}
    train_target(TargetConfig(encoder=str(tmp_path / "features.npy"), **given), progress=False)
    plain = ViewConfig(padding=0, flip=False)
    distill(dataclasses.replace(config, target=tmp_path / "t", views=plain), progress=False)
    assert "only an encoder" in read_json(config.out / "summary.json")[MISSING]


@pytest.mark.parametrize("number, told", [(0, " (attainable "), (1, "none, as the store has no")])
def test_the_command_says_it_in_one_line(config, stores, tmp_path, capsys, number, told):
    settings = dataclasses.replace(config, store=stores[number])
    (tmp_path / "run.yaml").write_text(json.dumps(loop.to_dict(settings)), encoding="utf-8")
    assert main(["distill", "--config", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "held-out R2" in line]
    assert len(lines) == 1 and lines[0].startswith("held-out R2: ") and told in lines[0]
    assert main(["info", str(config.out)]) == 0
    shown = capsys.readouterr().out
    assert lines[0].removeprefix("held-out R2: ") in shown
