"""Several distilled runs, rival sets, ceilings, rows by several processes, and suites of them."""

import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast.baselines import random_subset
from krrst_fast.cli.main import main
from krrst_fast.data import PrepareConfig, prepare
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import (
    ConfigError,
    DataError,
    KrrstError,
    NonFiniteError,
    NotPositiveDefiniteError,
)
from krrst_fast.evaluate import EvaluateConfig, FinetuneConfig, PretrainConfig, ProbeConfig, trial
from krrst_fast.evaluate.networks import Networks
from krrst_fast.evaluate.pretrain import pretrain
from krrst_fast.evaluate.run import evaluate
from krrst_fast.evaluate.suite import SuiteConfig, evaluate_suite, model_of
from krrst_fast.evaluate.workers import rows_by_processes
from krrst_fast.models import ModelConfig, build
from krrst_fast.runs.files import append_jsonl, read_json, read_jsonl, write_json
from krrst_fast.targets import FrozenTarget

NETWORK = ModelConfig(widths=(4, 8))
SETTINGS = {
    "seeds": 3,
    "pretrain": PretrainConfig(steps=5),
    "probe": ProbeConfig(solver="ridge", labels=(1, 3)),
    "finetune": FinetuneConfig(steps=0),
    "device": "cpu",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with digits, a target, three runs of ten images, and a set of labels."""
    folder = tmp_path_factory.mktemp("sets")
    store = prepare(PrepareConfig(source="digits", out=folder / "digits", size=8, limit=300))
    net = build(NETWORK, image_size=8, num_outputs=6, seed=5).eval()
    target = FrozenTarget(
        model=net, config=NETWORK, num_outputs=6, mean=store.mean, std=store.std, image_size=8
    )
    target.save(folder / "target.safetensors")
    for number in range(3):
        run = folder / f"run{number}"
        run.mkdir()
        chosen = random_subset(store, target, 10, seed=100 + number)
        chosen.save(run / "distilled.safetensors")
        paths = {"store": folder / "digits", "target": folder / "target.safetensors"}
        write_json(run / "config.json", {name: str(path) for name, path in paths.items()})
    first = random_subset(store, target, 12, seed=9)
    one_hot = torch.eye(10)[torch.arange(12) % 10]
    labelled = replace(first, targets=one_hot, meta={"method": "dm", "label_kind": "class"})
    (folder / "dm").mkdir()
    labelled.save(folder / "dm" / "distilled.safetensors")
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> EvaluateConfig:
    runs = tuple(base / f"run{number}" for number in range(3))
    methods = ("none", "random_target", "random_5x", "distilled")
    return EvaluateConfig(
        run=runs,
        store=base / "digits",
        name=tmp_path.name,
        methods=methods,
        model=NETWORK,
        **SETTINGS,
    )


def test_seeds_take_the_runs_in_turn(config: EvaluateConfig) -> None:
    result = evaluate(replace(config, seeds=4), progress=False)
    ours = [row for row in result.rows if row.method == "distilled"]
    assert [row.set_index for row in ours] == [0, 1, 2, 0]
    assert {row.set_index for row in result.rows if row.method != "distilled"} == {None}
    for row in ours[:3]:
        assert row.set_index is not None
        alone = replace(
            config,
            run=config.runs[row.set_index],
            seeds=1,
            first_seed=row.seed,
            name=f"alone{row.seed}",
        )
        (other,) = (r for r in evaluate(alone, progress=False).rows if r.method == "distilled")
        assert other.scores == row.scores
    assert "of 3 distilled sets in turn, whose luck they include" in result.table()
    assert (config.runs[0] / "evaluation" / f"{result.name}.json").exists()


def test_rivals_are_named_sets(base: Path, config: EvaluateConfig) -> None:
    rivals = (f"other={base / 'run2'}", f"other={base / 'run1'}", str(base / "dm"))
    result = evaluate(replace(config, rivals=rivals), progress=False)
    assert result.config.names[-2:] == ("other", "dm")
    rows = {(row.method, row.seed): row for row in result.rows}
    assert [rows["other", seed].set_index for seed in range(3)] == [0, 1, 0]
    # The same set, seed and settings: the same row, whatever it is called.
    assert rows["other", 1].scores == rows["distilled", 1].scores
    # A set of labels has no outputs that stand for the target's.
    assert set(rows["dm", 0].scores) == {"probe-1", "probe-3"} and rows["dm", 0].r2 is None
    assert rows["other", 0].r2 is not None
    assert (rows["dm", 0].num_images, rows["random_5x", 0].num_images) == (12, 50)
    header = next(line for line in result.table().splitlines() if line.startswith("method"))
    assert "images" in header
    # Of larger sets no one asks whether they are better.
    best = result.best_rival("probe-3")
    assert best is not None and best[0] in ("none", "random_target", "other")


@pytest.mark.parametrize(
    ("rivals", "words"),
    [
        (("=x",), "PATH or NAME=PATH"),
        (("distilled={base}/run1",), "of other names than those of the methods"),
        (("none={base}/run1",), "of other names"),
        (("x={base}/nothing",), "nothing"),
        (("{base}/run1", "{base}/../sets0/run1"), "NAME=PATH for each run1"),
        (("x={base}/run1", "x={base}/dm"), "the sets of x must be alike"),
        (("{base}/large",), "its images are 3x4x4"),
        (("{base}/wide",), "of another target"),
        (("{base}/foreign",), "of another target"),
    ],
)
def test_rivals_that_do_not_fit(
    base: Path, config: EvaluateConfig, rivals: tuple[str, ...], words: str
) -> None:
    def odd(name: str, change: Callable[[DistilledSet], DistilledSet]) -> None:
        (base / name).mkdir(exist_ok=True)
        one = change(DistilledSet.load(base / "run0"))
        one.save(base / name / "distilled.safetensors")

    odd("large", lambda one: replace(one, images=one.images[:, :, :4, :4]))
    odd("wide", lambda one: replace(one, targets=one.targets[:, :5]))
    odd("foreign", lambda one: replace(one, meta={**one.meta, "target": "b"}))
    odd("ours", lambda one: replace(one, meta={**one.meta, "target": "a"}))
    given = tuple(text.format(base=base) for text in rivals)
    run = base / "ours" if "foreign" in rivals[0] else config.runs[0]
    if run != config.runs[0]:
        write_json(run / "config.json", read_json(config.runs[0] / "config.json"))
    with pytest.raises((ConfigError, DataError), match=words):
        evaluate(replace(config, run=run, rivals=given), progress=False)


def test_runs_that_differ_are_refused(base: Path, config: EvaluateConfig) -> None:
    with pytest.raises(DataError, match=r"the sets of distilled must be alike: it has 12 images"):
        evaluate(replace(config, run=(config.runs[0], base / "dm")), progress=False)


def test_a_ceiling_needs_its_images(config: EvaluateConfig) -> None:
    with pytest.raises(DataError, match=r"needs 1000 images \(random_100x of 10\)"):
        evaluate(replace(config, methods=("random_100x", "distilled")), progress=False)


def test_processes_compute_the_same_rows(config: EvaluateConfig) -> None:
    config = replace(config, seeds=1, methods=("random_target", "distilled"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two processes has
    try:
        here = evaluate(replace(config, name="here"), progress=False)
        there = evaluate(replace(config, name=f"{config.name}-w", workers=2), progress=False)
    finally:
        torch.set_num_threads(threads)
    assert [(r.method, r.seed) for r in there.rows] == [(r.method, r.seed) for r in here.rows]
    for ours, other in zip(here.rows, there.rows):
        assert replace(ours, seconds=0.0) == replace(other, seconds=0.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_that_fail_do_not_keep_the_others(config: EvaluateConfig, workers: int) -> None:
    # The networks of this rival explode: its images are far too large.
    run = config.runs[0]
    one = DistilledSet.load(run)
    huge = run.parent / f"huge{workers}.safetensors"
    replace(one, images=1e30 * one.images).save(huge)
    config = replace(config, run=run, seeds=2, methods=("distilled",), workers=workers)
    config = replace(config, rivals=(f"huge={huge}",))
    failures = (NonFiniteError, NotPositiveDefiniteError)
    with pytest.raises(failures, match=r"huge, seed 0.*huge, seed 1.*2 of 4 trials are finished"):
        evaluate(config, progress=False)
    kept = run / "evaluation" / f"{config.name}.partial.jsonl"
    assert sorted((row["method"], row["seed"]) for row in read_jsonl(kept)) == [
        *(("distilled", 0), ("distilled", 1))
    ]
    assert len(evaluate(replace(config, rivals=()), progress=False).rows) == 2


def test_rows_that_were_not_asked_for_are_kept(config: EvaluateConfig) -> None:
    config = replace(config, run=config.runs[0], methods=("random_target", "distilled"))
    whole = evaluate(replace(config, seeds=3), progress=False)
    output = config.folder / f"{config.name}.json"
    kept = config.folder / f"{config.name}.partial.jsonl"
    output.unlink()  # as if it had been killed before its last row
    for row in whole.rows[:-1]:
        append_jsonl(kept, asdict(row))
    evaluate(replace(config, seeds=1), progress=False)
    assert {(row["method"], row["seed"]) for row in read_jsonl(kept)} == {
        *(("random_target", 1), ("distilled", 1), ("random_target", 2))
    }
    again = evaluate(replace(config, seeds=3), progress=False)
    assert again.rows[:-1] == whole.rows[:-1] and not kept.exists()


def test_a_set_of_another_target_is_refused(base: Path, config: EvaluateConfig) -> None:
    run = base / "changed"
    shutil.copytree(base / "run0", run, dirs_exist_ok=True)
    one = DistilledSet.load(run)
    replace(one, meta={**one.meta, "target": "of another"}).save(run / "distilled.safetensors")
    config = replace(config, run=run)
    with pytest.raises(DataError, match="it is not the target that distilled was made with"):
        evaluate(replace(config, methods=("random_target", "distilled")), progress=False)
    with pytest.warns(UserWarning, match="there is no held-out R2: .* it is not the target"):
        result = evaluate(replace(config, methods=("distilled",), seeds=1), progress=False)
    assert result.rows[0].r2 is None


def test_rows_know_what_their_r2_is_of(base: Path, config: EvaluateConfig) -> None:
    config = replace(config, run=config.runs[0], methods=("distilled",), seeds=1)
    known = evaluate(config, progress=False).rows[0]
    other = base / "other-source"
    if not other.exists():
        prepare(PrepareConfig(source="digits", out=other, size=8, limit=200))
    with pytest.raises(ConfigError, match="made with other settings or data"):
        evaluate(replace(config, source=other), progress=False)
    assert known.r2 is not None


def test_a_process_that_is_killed_is_named(config: EvaluateConfig) -> None:
    config = replace(config, run=config.runs[0], pretrain=PretrainConfig(steps=10**9))

    def kill() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.05)
        for child in children:
            child.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(KrrstError, match=r"distilled, seed 0: its process ended with code -9"):
        list(rows_by_processes(config, [("distilled", 0)], {"distilled": ""}))
    killer.join()
    assert not multiprocessing.active_children()


@pytest.fixture
def suite(base: Path, tmp_path: Path) -> SuiteConfig:
    """Two stores and two students."""
    run = tmp_path / "run"
    shutil.copytree(base / "run0", run)
    second = tmp_path / "second"
    shutil.copytree(base / "digits", second)
    return SuiteConfig(
        suite="recipe",
        run=run,
        stores=(base / "digits", second),
        students=("convnet-4-8", "convnet-4"),
        methods=("random_target", "distilled"),
        **{**SETTINGS, "seeds": 2},
    )


def test_a_suite_has_a_table_for_each_student(suite: SuiteConfig) -> None:
    text = evaluate_suite(suite, progress=False)
    assert text.count("## ") == 2 and "## convnet-4-8" in text
    results = suite.folder
    cells = sorted(path.stem for path in results.glob("recipe-*.json"))
    assert cells == sorted(
        f"recipe-{store}-{student}"
        for store in ("digits", "second")
        for student in ("convnet-4", "convnet-4-8")
    )
    assert (results / "recipe.md").read_text() == text + "\n"
    lines = text.splitlines()
    (header, ours) = (
        next(line for line in lines if line.startswith(f"| {x}")) for x in ("pre", "d")
    )
    assert "digits probe-1" in header and "second outputs-3" in header
    cell = read_json(results / "recipe-digits-convnet-4-8.json", sealed="result")
    found = cell["summary"][1]["scores"]["probe-1"]
    by = found["difference"]
    sign = "+" if by["mean"] >= 0 else "-"
    shown = f"{found['mean']:.1f} ({sign}{abs(by['mean']):.1f} +- {by['standard_error']:.1f})"
    assert shown in ours
    # Finished cells are read, not computed.
    rows = [read_json(path, sealed="result")["rows"] for path in sorted(results.glob("recipe-*"))]
    assert evaluate_suite(suite, progress=False) == text
    again = [read_json(path, sealed="result")["rows"] for path in sorted(results.glob("recipe-*"))]
    assert rows == again


def test_a_suite_goes_on_where_it_was_stopped(suite: SuiteConfig) -> None:
    whole = evaluate_suite(suite, progress=False)
    folder = suite.folder
    kept = read_json(folder / "recipe-digits-convnet-4-8.json", sealed="result")["rows"]
    (folder / "recipe-second-convnet-4.json").unlink()
    (folder / "recipe.md").unlink()
    assert evaluate_suite(suite, progress=False) == whole
    assert read_json(folder / "recipe-digits-convnet-4-8.json", sealed="result")["rows"] == kept


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_of_a_student_share_their_pre_training(
    base: Path, suite: SuiteConfig, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Rows have the bits of rows that were pre-trained for themselves, early stopped ones too."""
    methods = ("random_target", "random_early", "kmeans", "distilled")
    longer = replace(suite, methods=methods, pretrain=PretrainConfig(steps=35), workers=workers)
    steps: list[int] = []

    def counted(*given: Any, **settings: Any) -> float:
        steps.append(given[3].steps)
        return pretrain(*given, **settings)

    monkeypatch.setattr(trial, "pretrain", counted)
    damaged: list[Path] = []
    inner = Networks.take

    def take(self: Networks, key: str) -> Any:
        if self.folder is not None and self.folder.exists() and not damaged:
            damaged.append(next(self.folder.iterdir()))
            damaged[0].write_bytes(b"krrst")
        return inner(self, key)

    monkeypatch.setattr(Networks, "take", take)
    evaluate_suite(longer, progress=False)
    assert not list(suite.folder.glob("*.networks")) and (workers > 1 or damaged)
    if workers == 1:
        # Two students and seeds: three in full and the early one again up to step 30 for each, in
        # the second store the latter alone; once it is in full, where the other was damaged.
        assert sorted(steps) == [30] * 7 + [35] * (4 * 3 + 1)
    for cell in longer.cells():
        shared = read_json(suite.folder / f"{cell.name}.json", sealed="result")["rows"]
        alone = evaluate(replace(cell, name="alone", overwrite=True), progress=False).to_json()
        for row, one in zip(shared, alone["rows"], strict=True):
            assert {**row, "seconds": 0} == {**one, "seconds": 0}


def test_a_bad_cell_is_found_before_the_first_is_computed(
    base: Path, suite: SuiteConfig, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    prepare(PrepareConfig(source="digits", out=other, size=16, limit=100))
    with pytest.raises(DataError, match="16 px"):
        evaluate_suite(replace(suite, stores=(base / "digits", other)), progress=False)
    assert not list(suite.folder.glob("recipe-*.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"students": ("convnet-0",)}, "students"),
        ({"students": ("resnet11",)}, "students: .*convnet-16-32-64 by widths"),
        ({"students": ()}, "one or more"),
        ({"stores": (Path("a/x"), Path("b/x"))}, "folders of different names"),
    ],
)
def test_settings_of_a_suite(suite: SuiteConfig, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(suite, **change)  # type: ignore[arg-type]


def test_students_are_named_by_kind_or_widths() -> None:
    assert model_of("convnet-16-32-64").widths == (16, 32, 64)
    assert model_of("resnet10").kind == "resnet10"
    assert model_of("convnet") == ModelConfig()


def test_the_commands_take_runs_rivals_and_suites(
    base: Path, suite: SuiteConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--pretrain.steps", "2", "--finetune.steps", "0", "--seeds", "2", "--quiet"]
    small += ["--probe.solver", "ridge", "--probe.labels", "1,10%"]
    run, other, store = map(str, (suite.run, base / "run1", base / "digits"))
    words = ["evaluate", run, "--store", store, other, *small, "--model.widths", "4"]
    assert main([*words, "--methods", "none,distilled", "--rivals", f"dm={base / 'dm'}"]) == 0
    out = capsys.readouterr().out
    assert "dm" in out and "probe-10%" in out and "2 distilled sets in turn" not in out
    words = ["evaluate", run, "--suite", "recipe", "--stores", store, *small]
    assert main([*words, "--students", "convnet-4", "--methods", "none,distilled"]) == 0
    out = capsys.readouterr().out
    assert "| distilled " in out and "recipe.md" in out
    assert main(["evaluate", run, "--suite", "papers", "--stores", store]) == 2
    assert "--suite: there is no suite 'papers', only paper, recipe" in capsys.readouterr().err
