"""Run folders: what is there is read, what is not is named, what is no run is refused."""

from pathlib import Path

import pytest
import torch

from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError
from krrst_fast.evaluate import EvaluateConfig, Evaluation
from krrst_fast.report.run_folder import read_run
from krrst_fast.runs.files import append_jsonl, write_json


def make_run(folder: Path) -> Path:
    run, target = folder / "run", folder / "target"
    for path in (run / "evaluation", target):
        path.mkdir(parents=True)
    write_json(run / "config.json", {"num_images": 2, "target": str(target)})
    for path in (run / "environment.json", run / "summary.json"):
        write_json(path, {"threads": 2})
    for step in range(1, 61):
        append_jsonl(run / "metrics.jsonl", {"step": step, "loss": 1 / step})
    append_jsonl(target / "metrics.jsonl", {"step": 1, "loss": 2.0})
    made = DistilledSet(
        images=torch.zeros(2, 3, 4, 4), targets=torch.ones(2, 5), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    made.save(run / "initial.safetensors")
    made.save(run / "distilled.safetensors")
    config = EvaluateConfig(run=run, store=folder / "store")
    found = Evaluation(
        name="digits", config=config, rows=(), num_images=2, environment={}, seconds=0.0
    )
    write_json(run / "evaluation" / "digits.json", found.to_json())
    return run


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    assert run.missing == []
    assert run.name == "run" and run.steps_done == 60
    assert run.summary == {"threads": 2}
    assert run.environments == {"environment.json": {"threads": 2}}
    assert run.distilled is not None and run.distilled.targets.sum() == 10
    assert [x.evaluation.name for x in run.evaluations] == ["digits"]
    assert run.target_rows == [{"step": 1, "loss": 2.0}]


def test_each_part_may_be_missing_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert read_run(run).missing == []
    for path in sorted(path for path in run.rglob("*.*") if path.is_file()):
        held = path.read_bytes()
        path.unlink()
        (told,) = read_run(run).missing
        name = "evaluation/*.json" if path.parent != run else path.name
        assert name in told.what and told.command.startswith("krrst ")
        path.write_bytes(held)


def test_a_stopped_evaluation_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "evaluation" / "cifar10.partial.jsonl").write_text("{}\n")
    (told,) = read_run(run).missing
    assert "cifar10" in told.what and "--name cifar10" in told.command


def test_of_a_step_done_twice_the_later_row_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    once, held = read_run(run).rows, (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").unlink()
    for step in range(30, 50):
        append_jsonl(run / "metrics.jsonl", {"step": step, "loss": 99.0})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(held)
    assert read_run(run).rows == once and len(once) == 60


def test_without_settings_the_set_makes_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "config.json").unlink()
    assert [told.what for told in read_run(run).missing] == ["The settings (config.json)."]
    (run / "distilled.safetensors").unlink()
    with pytest.raises(DataError, match="neither config.json nor distilled.safetensors"):
        read_run(run)


def test_the_curves_of_the_target_are_found_from_every_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = make_run(tmp_path / "home"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = tmp_path / "home" / "target"
    write_json(run / "config.json", {"num_images": 2, "target": str(target), "out": str(run)})
    places = ((run.parent, Path("run")), (elsewhere, Path("../home/run")), (run, Path()))
    for directory, folder in places:
        monkeypatch.chdir(directory)
        assert read_run(folder).missing == []
        assert read_run(folder).target_rows == [{"step": 1, "loss": 2.0}]

    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert read_run(Path("moved")).missing == []
