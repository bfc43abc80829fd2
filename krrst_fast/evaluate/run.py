"""The evaluation itself: every method with every seed, resumable, into one JSON file."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from krrst_fast.data.verify import Verification
from krrst_fast.errors import ConfigError, KrrstError, NonFiniteError, NotPositiveDefiniteError
from krrst_fast.evaluate.config import EvaluateConfig
from krrst_fast.evaluate.materials import Materials, open_materials
from krrst_fast.evaluate.networks import NONE_KEPT, Networks
from krrst_fast.evaluate.notes import data_notes
from krrst_fast.evaluate.table import Evaluation, Row
from krrst_fast.evaluate.trial import Trials
from krrst_fast.evaluate.tuning import finetune_steps
from krrst_fast.evaluate.workers import Failure, Job, rows_by_processes
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.environment import describe
from krrst_fast.runs.files import append_jsonl, atomic_path, read_json, read_jsonl, write_json
from krrst_fast.runs.interrupt import Interrupted, Interrupts, raised_signals
from krrst_fast.runs.lock import locked
from krrst_fast.runs.progress import progress_bar


def evaluate(
    config: EvaluateConfig, *, progress: bool = True, networks: Path | None = None
) -> Evaluation:
    """Measure how well networks pre-trained in several ways transfer to labelled images.

    Within a seed all methods share the initial weights, the draw of labels and the order of the
    batches, so their differences are paired. The random rivals draw their images anew for each
    seed. Every finished row is kept in `evaluation/NAME.partial.jsonl`: an evaluation that was
    stopped goes on where it was, and one that is asked for more seeds or methods adds them.

    Args:
        config: Settings of the evaluation.
        progress: Show a bar, where there is a terminal.
        networks: A folder that keeps pre-trained networks, for evaluations that differ by their
            store or by how networks are measured; None keeps none.

    Returns:
        The figures, which are also in `evaluation/NAME.json` of the run.

    Raises:
        DataError: Images or labels are not what the methods need, or a file is damaged.
        ConfigError: A setting is missing, or a result with other settings would be lost, or another
            process writes this one.
        NonFiniteError, NotPositiveDefiniteError: Rows failed; the others are finished and kept.
        Interrupted: SIGINT, SIGTERM or SIGHUP came; the rows that were finished are kept.
    """
    opened = _open(config, Networks(networks))
    config, partial, rows = opened.config, opened.partial, dict[Job, Row]()
    config.folder.mkdir(parents=True, exist_ok=True)
    partial.touch()
    with locked(partial):
        try:
            rows |= opened.rows_at_hand()
            missing = [job for job in opened.jobs if job not in rows]
            failed: list[KrrstError] = []
            with (
                _told(rows, opened.jobs, partial),
                closing(_finished(opened, missing, progress)) as finished,
            ):
                for row in finished:
                    if not isinstance(row, Row):
                        failed.append(row)
                        continue
                    # A row that is finished is kept, and wholly, when a signal comes now.
                    with Interrupts().noted(""):
                        # What a damaged store led to is not saved.
                        for verification in opened.verifications:
                            verification.finish()
                        append_jsonl(partial, asdict(row))
                        rows[row.method, row.seed] = row
            if failed:
                more = f"; {len(rows)} of {len(opened.jobs)} trials are finished and kept"
                raise type(failed[0])("; ".join(sorted(map(str, failed))) + more)

            ordered = tuple(rows[job] for job in opened.jobs)
            evaluation = Evaluation(
                name=opened.name,
                config=config,
                rows=ordered,
                num_images=len(opened.trials.materials.distilled),
                environment=describe(),
                seconds=sum(row.seconds for row in ordered),
                label_counts=opened.trials.label_counts,
                notes=opened.notes,
            )
            write_json(opened.output, evaluation.to_json(), sealed=True)
            _keep_the_others(partial, ordered)
            return evaluation
        finally:
            # It holds no row yet. Only the process that has the lock removes it.
            if partial.exists() and partial.stat().st_size == 0:
                partial.unlink()


def check(config: EvaluateConfig) -> None:
    """Raise what `evaluate` would raise before it trains: DataError or ConfigError."""
    _open(config)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """An evaluation whose inputs are open and checked."""

    config: EvaluateConfig
    networks: Networks
    trials: Trials
    verifications: list[Verification]
    notes: tuple[str, ...]
    keys: Mapping[str, str]
    """The fingerprint of each method's rows."""
    jobs: list[Job]

    @property
    def name(self) -> str:
        """Of the result."""
        return self.config.name or self.config.store.resolve().name

    @property
    def output(self) -> Path:
        """The file of the result."""
        return self.config.folder / f"{self.name}.json"

    @property
    def partial(self) -> Path:
        """The file of the rows that are finished before that."""
        return self.config.folder / f"{self.name}.partial.jsonl"

    def rows_at_hand(self) -> dict[Job, Row]:
        """Return the rows that an earlier call has computed."""
        return _rows_at_hand(self.config, self.output, self.partial, self.keys, self.jobs)


def _open(config: EvaluateConfig, networks: Networks = NONE_KEPT) -> _Opened:
    """Open everything, and refuse what cannot be computed or written."""
    materials = open_materials(config)
    stores = {x.path: x for x in (materials.store, materials.source) if x is not None}
    config = replace(config, methods=materials.config.methods)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    opened = _Opened(
        config=config,
        networks=networks,
        trials=Trials(materials, networks),
        verifications=[Verification(store) for store in stores.values()],
        notes=data_notes(materials.store, materials.test_split, materials.held_out_from[0]),
        keys={method: materials.fingerprint(method) for method in config.names},
        jobs=[(method, seed) for seed in seeds for method in config.names],
    )
    opened.rows_at_hand()
    return opened


def _keep_the_others(partial: Path, used: Sequence[Row]) -> None:
    """Leave in the file of finished rows those that the result does not hold, if there are any."""
    known = {(row.method, row.seed, row.fingerprint) for row in used}
    others = [
        row
        for row in (from_dict(Row, row) for row in read_jsonl(partial))
        if (row.method, row.seed, row.fingerprint) not in known
    ]
    with atomic_path(partial) as temporary:
        temporary.touch()
        for row in others:
            append_jsonl(temporary, asdict(row))
    if not others:
        partial.unlink()


def _finished(opened: _Opened, jobs: Sequence[Job], progress: bool) -> Generator[Row | Failure]:
    """Yield the rows of `jobs` as they are finished, here or in other processes, or their errors.

    What fails in one row by its numbers does not keep the others from being computed.
    """
    config, trials = opened.config, opened.trials
    if config.workers > 1 and jobs:
        # Here, so that it is said once if there is none.
        if any(trials.materials.is_represented(method) for method, _ in jobs):
            _ = trials.materials.held_out
        with progress_bar(progress, total=len(jobs), unit="row") as bar:
            for row in rows_by_processes(config, jobs, opened.keys, opened.networks):
                yield row
                bar.update()
        return
    total = sum(_ticks(trials.materials, method) for method, _ in jobs)
    if config.kd.steps and any(method != "target" for method, _ in jobs):
        total += config.kd.teacher_steps
    with progress_bar(progress, total=total, unit="step") as bar:
        for method, seed in jobs:
            bar.set_description(f"{method} seed {seed}")
            try:
                row = trials.run(method, seed, opened.keys[method], bar.update)
            except (NonFiniteError, NotPositiveDefiniteError) as error:
                yield error
            else:
                yield row


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
