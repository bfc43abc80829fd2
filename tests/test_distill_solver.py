"""A distillation with another Solver: near the default, refused by name, and no silent NaN."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import krrst_fast.distill.step as step
from krrst_fast import ConfigError, NonFiniteError, Solver
from krrst_fast.cli.main import main
from krrst_fast.data import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.models import ModelConfig
from krrst_fast.runs.config import from_dict, to_dict


@pytest.fixture
def config(tiny_store: Path, tiny_target: Path, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=8,
        batch_size=16,
        lr=1e-3,
        views=ViewConfig(padding=2),
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=5,
        log_every=3,
    )


@pytest.mark.parametrize("change", [{"check": "flag"}, {"precision": "fast"}])
def test_it_ends_within_rounding_of_the_default(config: DistillConfig, change: dict) -> None:
    first = distill(config, progress=False)
    solver = replace(config.solver, **change)
    second = distill(replace(config, solver=solver, out=config.out / "other"), progress=False)
    if change == {"check": "flag"}:
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.targets, second.targets)
        return
    # AdamW moves an entry by at most its rate a step, and by the sign of a gradient that rounding
    # may turn. Features of 11 bits turn the sign of few: most entries stay within a step's length.
    for a, b in ((first.images, second.images), (first.targets, second.targets)):
        change = (a - b).abs()
        assert change.max() <= 2 * config.lr * config.steps
        assert change.median() <= config.lr
    assert not torch.equal(first.images, second.images)


def test_a_failure_under_a_flag_ends_the_run(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, losses = step.krr_mse, []

    def failing(*tensors: torch.Tensor, **options: object) -> tuple:
        loss, info = real(*tensors, **options)
        losses.append(loss)
        return loss * (torch.nan if len(losses) == 4 else 1.0), info

    monkeypatch.setattr(step, "krr_mse", failing)
    # Step 4 is not looked at; the networks, which are trained on the images, or the next row are.
    with pytest.raises(NonFiniteError, match=r"distill: step [456], slot"):
        distill(replace(config, solver=Solver(check="flag")), progress=False)


def test_a_solver_is_read_back_and_checked(config: DistillConfig) -> None:
    solver = Solver(precision="fast", form="w", backend="torch", max_retries=2, check="flag")
    changed = replace(config, solver=solver)
    assert from_dict(DistillConfig, to_dict(changed)) == changed
    for wrong, message in (
        ({"precision": "half"}, "solver.precision must be one of .*, got 'half'"),
        ({"max_retries": -1}, "solver.*max_retries must be from 0 to 700, got -1"),
        ({"backend": "reference"}, "solver must be of another backend than reference"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(DistillConfig, {**to_dict(config), "solver": wrong})


@pytest.mark.parametrize("command", ["distill", "evaluate"])
@pytest.mark.parametrize(
    "setting", ["precision half", "check never", "backend cuda9", "form z", "max_retries -1"]
)
def test_a_wrong_value_is_one_line(
    command: str, setting: str, config: DistillConfig, capsys: pytest.CaptureFixture
) -> None:
    name, value = setting.split()
    given = ["--store", str(config.store), f"--solver.{name}", value]
    if command == "distill":
        given += ["--target", str(config.target), "--out", str(config.out), "--num_images", "2"]
    else:
        given = [str(config.out), *given]
    assert main([command, *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert name in line and value in line
