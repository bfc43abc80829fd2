"""Rows of an evaluation computed by several processes, each with a share of the cores."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch

from krrst_fast.errors import KrrstError, NonFiniteError, NotPositiveDefiniteError
from krrst_fast.evaluate.config import EvaluateConfig
from krrst_fast.evaluate.materials import open_materials
from krrst_fast.evaluate.networks import NONE_KEPT, Networks
from krrst_fast.evaluate.table import Row
from krrst_fast.evaluate.trial import Trials

Job = tuple[str, int]
"""A trial: a method and a seed."""
Failure = NonFiniteError | NotPositiveDefiniteError
"""What keeps one row from being computed, and says nothing of the others."""


def rows_by_processes(
    config: EvaluateConfig,
    jobs: Sequence[Job],
    keys: Mapping[str, str],
    networks: Networks = NONE_KEPT,
) -> Generator[Row | Failure]:
    """Compute the rows of `jobs`, and yield each as it is finished, in any order.

    In place of a row that failed by its numbers its error is yielded.

    Every process opens the materials anew, so images and features are in memory once in each. The
    processes end with the iterator, whatever ends it.

    Args:
        config: Settings of the evaluation, which `open_materials` has accepted; `workers` of them,
            but no more than there are jobs, are started.
        jobs: The rows to compute.
        keys: The fingerprint of each method's rows.
        networks: Those that other rows have pre-trained, or will begin with.

    Raises:
        KrrstError: What a row raised, or a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs)[::-1]
    count = min(config.workers, len(waiting))
    # Not by the jobs that are left: the bits of a row depend on its threads.
    threads = max(1, torch.get_num_threads() // config.workers)
    running: dict[Connection, tuple[Any, Job]] = {}
    started = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, config, dict(keys), networks, threads), daemon=True
            )
            process.start()
            started.append(process)
            theirs.close()
            running[ours] = process, waiting.pop()
            ours.send(running[ours][1])
        while running:
            for ready in wait(list(running)):
                ours = cast(Connection, ready)
                process, job = running.pop(ours)
                yield _received(ours, process, job)
                if waiting:
                    running[ours] = process, waiting.pop()
                    ours.send(running[ours][1])
                else:
                    ours.close()
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _received(ours: Connection, process: Any, job: Job) -> Row | Failure:
    """Return what a process sent of a row, or raise what ended the process."""
    try:
        found = ours.recv()
    except (EOFError, OSError):
        process.join()
        raise KrrstError(
            f"evaluate: {job[0]}, seed {job[1]}: its process ended with code {process.exitcode}"
            + (" (out of memory? ask for fewer workers)" if process.exitcode == -9 else "")
        ) from None
    if isinstance(found, Row | NonFiniteError | NotPositiveDefiniteError):
        return found
    assert isinstance(found, KrrstError)
    raise found


def _work(
    jobs: Connection,
    config: EvaluateConfig,
    keys: Mapping[str, str],
    networks: Networks,
    threads: int,
) -> None:
    """Run the trials that come through a connection until it is closed."""
    # A terminal sends Ctrl-C to all; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    # The first process has opened the same materials, and given their warnings.
    warnings.simplefilter("ignore")
    try:
        trials = Trials(open_materials(config), networks)
        while True:
            method, seed = jobs.recv()
            try:
                jobs.send(trials.run(method, seed, keys[method], lambda *steps: None))
            except (NonFiniteError, NotPositiveDefiniteError) as error:
                jobs.send(error)
    except (EOFError, BrokenPipeError):  # the first process has ended
        return
    except Exception as error:
        jobs.send(error if isinstance(error, KrrstError) else KrrstError(f"evaluate: {error!r}"))
        os._exit(1)
