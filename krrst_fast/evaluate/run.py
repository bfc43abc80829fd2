"""The evaluation itself: every method with every seed, resumable, into one JSON file."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from krrst_fast.data.verify import Verification
from krrst_fast.errors import ConfigError
from krrst_fast.evaluate.config import EvaluateConfig
from krrst_fast.evaluate.materials import Materials, open_materials
from krrst_fast.evaluate.notes import data_notes
from krrst_fast.evaluate.table import Evaluation, Row
from krrst_fast.evaluate.trial import Trials
from krrst_fast.evaluate.tuning import finetune_steps
from krrst_fast.evaluate.workers import Job, rows_by_processes
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.environment import describe
from krrst_fast.runs.files import append_jsonl, read_json, read_jsonl, write_json
from krrst_fast.runs.interrupt import Interrupted, Interrupts, raised_signals
from krrst_fast.runs.lock import locked
from krrst_fast.runs.progress import progress_bar


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> Evaluation:
    """Measure how well networks pre-trained in several ways transfer to labelled images.

    Within a seed all methods share the initial weights, the draw of labels and the order of the
    batches, so their differences are paired. The random rivals draw their images anew for each
    seed. Every finished row is kept in `evaluation/NAME.partial.jsonl`: an evaluation that was
    stopped goes on where it was, and one that is asked for more seeds or methods adds them.

    Args:
        config: Settings of the evaluation.
        progress: Show a bar, where there is a terminal.

    Returns:
        The figures, which are also in `evaluation/NAME.json` of the run.

    Raises:
        DataError: Images or labels are not what the methods need, or a file is damaged.
        ConfigError: A setting is missing, or a result with other settings would be lost, or another
            process writes this one.
        NonFiniteError: A training diverged.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the rows that were finished are kept.
    """
    materials = open_materials(config)
    stores = {x.path: x for x in (materials.store, materials.source) if x is not None}
    verifications = [Verification(store) for store in stores.values()]
    notes = data_notes(materials.store, materials.test_split, materials.held_out_from[0])
    trials = Trials(materials)
    name = config.name or config.store.resolve().name
    folder = config.folder
    config = replace(config, methods=materials.config.methods)
    keys = {method: materials.fingerprint(method) for method in config.names}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    jobs = [(method, seed) for seed in seeds for method in config.names]
    partial = folder / f"{name}.partial.jsonl"
    # Refused before anything is written.
    _rows_at_hand(config, folder / f"{name}.json", partial, keys, jobs)

    folder.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with locked(partial):
        try:
            rows = _rows_at_hand(config, folder / f"{name}.json", partial, keys, jobs)
            missing = [job for job in jobs if job not in rows]
            with (
                _told(rows, jobs, partial),
                closing(_finished(trials, config, missing, keys, progress)) as finished,
            ):
                for row in finished:
                    # A row that is finished is kept, and wholly, when a signal comes now.
                    with Interrupts().noted(""):
                        # What a damaged store led to is not saved.
                        for verification in verifications:
                            verification.finish()
                        append_jsonl(partial, asdict(row))
                        rows[row.method, row.seed] = row

            ordered = tuple(rows[job] for job in jobs)
            evaluation = Evaluation(
                name=name,
                config=config,
                rows=ordered,
                num_images=len(materials.distilled),
                environment=describe(),
                seconds=sum(row.seconds for row in ordered),
                label_counts=trials.label_counts,
                notes=notes,
            )
            write_json(folder / f"{name}.json", evaluation.to_json(), sealed=True)
            partial.unlink(missing_ok=True)
            return evaluation
        finally:
            # It holds no row yet. Only the process that has the lock removes it.
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()


def _finished(
    trials: Trials,
    config: EvaluateConfig,
    jobs: Sequence[Job],
    keys: Mapping[str, str],
    progress: bool,
) -> Generator[Row]:
    """Yield the rows of `jobs` as they are finished, here or in other processes."""
    if config.workers > 1 and len(jobs) > 1:
        with progress_bar(progress, total=len(jobs), unit="row") as bar:
            for row in rows_by_processes(config, jobs, keys):
                yield row
                bar.update()
        return
    total = sum(_ticks(trials.materials, method) for method, _ in jobs)
    if config.kd.steps and any(method != "target" for method, _ in jobs):
        total += config.kd.teacher_steps
    with progress_bar(progress, total=total, unit="step") as bar:
        for method, seed in jobs:
            bar.set_description(f"{method} seed {seed}")
            yield trials.run(method, seed, keys[method], bar.update)


@contextmanager
def _told(rows: Mapping[Job, Row], jobs: Sequence[Job], partial: Path) -> Iterator[None]:
    """Let a signal end the block at once, and say how many rows are finished and where they are."""
    try:
        with raised_signals():
            yield
    except Interrupted as error:
        where = f", kept in {partial.parent}" if rows else ""
        raise Interrupted(
            error.signum, f"with {len(rows)} of {len(jobs)} trials finished{where}"
        ) from None


def _rows_at_hand(
    config: EvaluateConfig,
    output: Path,
    partial: Path,
    keys: Mapping[str, str],
    jobs: Sequence[Job],
) -> dict[Job, Row]:
    """Return the rows of this evaluation that an earlier call has computed."""
    finished: list[Row] = []
    if output.exists() and not config.overwrite:
        finished = list(Evaluation.from_json(read_json(output, sealed="result"), output).rows)
        for row in finished:
            if (row.method, row.seed) not in jobs:
                raise ConfigError(
                    f"evaluate: {output} also holds {row.method} with seed {row.seed}, which was "
                    "not asked for this time; ask for it, or pass --overwrite to drop it"
                )
            if row.fingerprint != keys[row.method]:
                raise ConfigError(
                    f"evaluate: {output} holds {row.method} with seed {row.seed} made with other "
                    "settings or data; pass --overwrite to replace it or --name to keep both"
                )
    # Rows of version 1 had other settings, and are computed anew as all such rows are.
    kept = [row for row in read_jsonl(partial) if "scores" in row]
    found = finished + [from_dict(Row, row) for row in kept]
    return {
        (row.method, row.seed): row
        for row in found
        if (row.method, row.seed) in jobs and row.fingerprint == keys[row.method]
    }


def _ticks(materials: Materials, method: str) -> int:
    """Count the progress of a row: one for each SGD step and each closed-form probe."""
    config = materials.config
    probe, linear = config.probe, config.probe.steps if config.probe.solver == "sgd" else 1
    costs = {"probe": linear, "outputs": linear * materials.has_outputs(method), "knn": 1}
    ticks = sum(map(probe.draws, probe.labels)) * sum(costs[m] for m in probe.measures)
    if method != "target":
        ticks += finetune_steps(config.finetune)
        ticks += config.kd.steps
        ticks += config.pretrain.steps if method != "none" else 0
    return ticks
