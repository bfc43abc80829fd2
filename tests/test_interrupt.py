"""A signal makes a run save and end; a run has one writer; the lock dies with its process."""

import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

import krrst_fast.distill.loop as loop
import krrst_fast.targets.train as train_module
from krrst_fast.data import ViewConfig
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig
from krrst_fast.runs import environment
from krrst_fast.runs.checkpoint import Saves
from krrst_fast.runs.files import read_json, read_jsonl
from krrst_fast.runs.interrupt import Interrupted, Interrupts, raised_signals
from krrst_fast.runs.lock import locked
from krrst_fast.runs.tensors import load_state
from krrst_fast.targets import SSLAugmentConfig, TargetConfig, train_target

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

pytestmark = pytest.mark.usefixtures("default_signals")


@pytest.fixture
def config(tiny_store, tiny_target, tmp_path) -> DistillConfig:
    return DistillConfig(
        store=tiny_store,
        target=tiny_target,
        out=tmp_path / "run",
        num_images=6,
        steps=8,
        batch_size=16,
        lr=0.01,
        views=ViewConfig(padding=2),
        pool=PoolConfig(size=2, online_steps=6, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=100,
        log_every=1,
    )


def _send_in_call(monkeypatch, module, name: str, number: int, *, call: int, times: int = 1):
    """Send this process a signal at the start of a call."""
    real, calls = getattr(module, name), iter(range(call))

    def sending(*args, **options):
        if next(calls, None) is None and times:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(*args, **options)

    monkeypatch.setattr(module, name, sending)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_the_step_it_came_in(config, tmp_path, monkeypatch, number):
    whole = distill(dataclasses.replace(config, out=tmp_path / "whole"), progress=False)
    with monkeypatch.context() as patch:
        _send_in_call(patch, loop, "outer_step", number, call=4)
        with pytest.raises(Interrupted, match=f"{number.name} after step 5 of 8, which is saved"):
            distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 5
    assert [row["step"] for row in read_jsonl(config.out / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    result = distill(config, resume=True, progress=False)
    assert torch.equal(result.images, whole.images) and result.meta == whole.meta
    assert [row["step"] for row in read_jsonl(config.out / "metrics.jsonl")] == list(range(1, 9))


def test_a_signal_in_the_warm_up_saves_a_part_of_it(config, tmp_path, monkeypatch):
    whole = distill(dataclasses.replace(config, out=tmp_path / "whole"), progress=False)
    with monkeypatch.context() as patch:
        _send_in_call(patch, loop, "located", signal.SIGTERM, call=2)
        with pytest.raises(Interrupted, match="after a part of the pool's warm-up, which is saved"):
            distill(config, progress=False)
    saved = load_state(config.out / "checkpoint.pt")
    assert sum(slot["age"] for slot in saved["state"]["pool"]) == 3 < sum(saved["warm_up_ages"])
    assert torch.equal(distill(config, resume=True, progress=False).images, whole.images)


def test_a_second_signal_ends_at_once(config, monkeypatch):
    _send_in_call(monkeypatch, loop, "outer_step", signal.SIGINT, call=4, times=2)
    with pytest.raises(KeyboardInterrupt):
        distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_training_of_a_target_saves_on_a_signal(tiny_store, tmp_path, monkeypatch):
    config = TargetConfig(
        store=tiny_store,
        out=tmp_path / "target",
        steps=6,
        batch_size=8,
        projector=(8,),
        model=ModelConfig(widths=(4, 8)),
        augment=SSLAugmentConfig(),
    )
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train_target(whole, progress=False)
    with monkeypatch.context() as patch:
        _send_in_call(patch, train_module.Trainer, "train_step", signal.SIGHUP, call=3)
        with pytest.raises(Interrupted, match="SIGHUP after step 4 of 6, which is saved"):
            train_target(config, progress=False)
    train_target(config, resume=True, progress=False)
    name = "target.safetensors"
    assert (config.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_ignored_and_foreign_handlers_and_other_threads_are_left_alone(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with Interrupts().noted() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signum is None
    seen = []

    def work() -> None:
        with Interrupts().noted(), raised_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_minutes_bring_a_checkpoint_too():
    saves = Saves(every=10, minutes=1e-9, last=99, interrupts=Interrupts())
    assert saves.due(3)
    saves = Saves(every=10, minutes=1e9, last=99, interrupts=Interrupts())
    assert [step for step in range(1, 100) if saves.due(step)] == [*range(10, 100, 10), 99]


def test_a_folder_has_one_writer(config, tmp_path):
    config.out.mkdir()
    with locked(config.out), pytest.raises(ConfigError, match="run: another process is writing"):
        distill(config, resume=True, progress=False)
    assert list(config.out.iterdir()) == []
    target = TargetConfig(store=config.store, out=config.out, steps=1, batch_size=8)
    with locked(config.out), pytest.raises(ConfigError, match="another process is writing here"):
        train_target(target, resume=True, progress=False)
    distill(config, resume=True, progress=False)


def test_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from krrst_fast.runs.lock import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_lock_is_told_of(tmp_path, monkeypatch):
    """As NFS does: no locks on folders, or none at all."""
    real = fcntl.flock

    def refuse_folders(descriptor: int, how: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", refuse_folders)
    with locked(tmp_path), pytest.raises(ConfigError, match="another process"), locked(tmp_path):
        pass

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available."), locked(tmp_path):
        pass


def test_a_run_that_goes_on_elsewhere_keeps_both_environments(tmp_path):
    cpu = torch.device("cpu")
    environment.record(tmp_path, cpu)
    environment.record(tmp_path, cpu)
    assert [path.name for path in environment.recorded(tmp_path)] == ["environment.json"]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.warns(UserWarning, match=f"threads was {threads} and is {threads + 1}"):
            environment.record(tmp_path, cpu)
        environment.record(tmp_path, cpu)
    finally:
        torch.set_num_threads(threads)
    first, second = environment.recorded(tmp_path)
    assert second.name == "environment.2.json"
    assert read_json(second)["threads"] == read_json(first)["threads"] + 1


@pytest.mark.parametrize("before", [{}, {"networks": "plain PyTorch", "convolutions": "in TF32"}])
def test_other_arithmetic_on_the_same_device_is_another_environment(before, tmp_path):
    """A run of an earlier version recorded no choice, as there was none."""
    gpu = torch.device("cuda")
    environment.record(tmp_path, gpu, **before)
    environment.record(tmp_path, gpu, networks="plain PyTorch", convolutions="in TF32")
    assert len(environment.recorded(tmp_path)) == 1
    with pytest.warns(UserWarning, match="convolutions was in TF32 and is in float32"):
        environment.record(tmp_path, gpu, networks="plain PyTorch", convolutions="in float32")
    with pytest.warns(UserWarning, match="networks was plain PyTorch and is compiled; conv"):
        environment.record(tmp_path, gpu, networks="compiled", convolutions="in TF32")
    written = [read_json(path) for path in environment.recorded(tmp_path)]
    assert [one.get("convolutions", "in TF32") for one in written] == [
        *("in TF32", "in float32", "in TF32")
    ]


@pytest.mark.slow
def test_commands_killed_at_any_moment_go_on_to_the_same_bits(tmp_path):
    """Whole commands are sent SIGKILL and SIGTERM by the clock."""

    def krrst(*words: object) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "krrst_fast", *map(str, words)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    store = tmp_path / "store"
    assert krrst("prepare", "digits", store, "--size", 8).wait() == 0
    target = ["target", "--store", store, "--steps", 40, "--batch_size", 32]
    target += ["--projector", "[16]", "--model.kind", "convnet", "--model.widths", "[4,8]"]
    assert krrst(*target, "--out", tmp_path / "whole").wait() == 0
    out, delay = tmp_path / "killed", 1.0
    while True:
        process = krrst(*target, "--out", out, "--resume")
        try:
            code = process.wait(timeout=delay)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL if int(delay * 10) % 2 else signal.SIGTERM)
            process.wait()
            delay *= 1.3
    assert code == 0
    name = "target.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_a_closed_terminal_sends_its_signal_twice(config, monkeypatch):
    """The kernel does, and the shell: the step is saved all the same."""
    _send_in_call(monkeypatch, loop, "outer_step", signal.SIGHUP, call=4, times=2)
    with pytest.raises(Interrupted, match="SIGHUP after step 5 of 8, which is saved"):
        distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 5


def test_the_lock_of_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """A writer that ends removes its file: who opened it before must not lock what is gone."""
    path, real = tmp_path / "x.jsonl", fcntl.flock
    path.touch()

    def removed(descriptor: int, how: int) -> None:
        path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    with pytest.raises(ConfigError, match="has just ended writing"), locked(path):
        pass


def test_a_signal_ends_the_targets_outputs_at_once(config, monkeypatch):
    with monkeypatch.context() as patch:
        _send_in_call(patch, loop, "make_source", signal.SIGTERM, call=0)
        with raised_signals(), pytest.raises(Interrupted, match="SIGTERM before step 1 of 8; the"):
            distill(config, progress=False)
    assert load_state(config.out / "checkpoint.pt")["state"]["step"] == 0
    assert len(distill(config, resume=True, progress=False)) == 6
