"""`krrst baseline dm`, `dc`, `dsa`: from the command line to a set, resumed, and evaluated."""

import json
from pathlib import Path

import pytest
import torch

from krrst_fast.baselines.dm import DM
from krrst_fast.baselines.gradient_matching import GradientMatching
from krrst_fast.baselines.matching_config import DCConfig, DMConfig, DSAConfig
from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.distill.distilled_set import load_distilled
from krrst_fast.models import ModelConfig

WORDS = "--images_per_class 1 --steps 4 --batch_size 8 --model.widths 4,8 --log_every 1 --quiet"
SETTINGS = {
    "images_per_class": 1,
    "steps": 4,
    "batch_size": 8,
    "model": ModelConfig(widths=(4, 8), norm="instance"),
}
MORE = {"dm": {}, "dc": {"updates": 3, "epochs": 1}, "dsa": {"updates": 3, "epochs": 1}}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare(PrepareConfig(source="digits", out=out, size=8, limit=200))
    return out


def baseline(method: str, store: Path, out: Path, *more: str) -> int:
    flags = [word for name, value in MORE[method].items() for word in (f"--{name}", str(value))]
    paths = ["--store", str(store), "--out", str(out)]
    return main(["baseline", method, *paths, *WORDS.split(), *flags, *more])


@pytest.mark.parametrize("method", MORE)
def test_the_command_makes_the_set_of_the_learner(
    store: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert baseline(method, store, out) == 0
    assert "10 images with 10 targets each" in capsys.readouterr().out
    kind = {"dm": DMConfig, "dc": DCConfig, "dsa": DSAConfig}[method]
    config = kind(store=store, out=out, **SETTINGS, **MORE[method])
    learner = DM(config) if isinstance(config, DMConfig) else GradientMatching(config)
    losses = [learner.advance()["loss"] for _ in range(4)]
    made = load_distilled(out)
    assert torch.equal(made.images, learner.result().images)
    assert (made.meta["method"], made.meta["label_kind"]) == (method, "class")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == losses


def test_a_learnt_set_is_evaluated(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert baseline("dm", store, tmp_path / "run") == 0
    words = "--methods none,distilled --seeds 1 --model.widths 4 --quiet"
    short = "--pretrain.steps 3 --finetune.steps 0 --probe.solver ridge"
    paths = [str(tmp_path / "run"), "--store", str(store)]
    assert main(["evaluate", *paths, *words.split(), *short.split()]) == 0
    assert "distilled" in capsys.readouterr().out


def test_faults_are_one_line_and_write_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    for more, need in (
        (["--augment", "flip,flip"], "augment must be given once each"),
        (["--model.norm", "batch"], "must be without batch norm"),
        (["--images_per_class", "99"], "99 images of each class are needed"),
        (["--init_images", "zeros"], "real, noise"),
    ):
        assert baseline("dm", store, out, *more) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert need in line
        assert not out.exists()
