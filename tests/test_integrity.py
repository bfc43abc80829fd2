"""What a command reads is whole, or refused by name: flipped bits, cut files, and others' files."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from krrst_fast.data import ViewConfig, open_store
from krrst_fast.data import verify as verify_module
from krrst_fast.data.verify import Verification
from krrst_fast.distill import DistillConfig, PoolConfig, distill
from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
from krrst_fast.errors import CheckpointError, DataError, KrrstError
from krrst_fast.models import ModelConfig
from krrst_fast.runs.checkpoint import load_checkpoint
from krrst_fast.runs.files import append_jsonl, read_json, read_jsonl, write_json
from krrst_fast.runs.seal import KEY
from krrst_fast.runs.tensors import save_state
from krrst_fast.targets import load_target


def _config(store: Path, target: Path, out: Path) -> DistillConfig:
    return DistillConfig(
        store=store,
        target=target,
        out=out,
        num_images=6,
        steps=4,
        batch_size=16,
        views=ViewConfig(padding=2),
        pool=PoolConfig(size=2, online_steps=4, model=ModelConfig(widths=(4, 8))),
        checkpoint_every=2,
    )


@pytest.fixture(scope="module")
def run(tiny_store, tiny_target, tmp_path_factory) -> Path:
    """A folder with store, target and a finished run."""
    folder = tmp_path_factory.mktemp("integrity")
    shutil.copytree(tiny_store, folder / "store")
    shutil.copy(tiny_target, folder / "target.safetensors")
    distill(
        _config(folder / "store", folder / "target.safetensors", folder / "run"), progress=False
    )
    write_json(folder / "result.json", {"accuracy": 0.5, "rows": [1, 2]}, sealed=True)
    for step in range(3):
        append_jsonl(folder / "rows.jsonl", {"step": step, "loss": 0.25})
    return folder


def _resumed(path: Path) -> object:
    folder = path.parent.parent
    config = _config(folder / "store", folder / "target.safetensors", folder / "run")
    return load_checkpoint(path, config, ("store", "target", "out"))


READERS: dict[str, Callable[[Path], object]] = {
    "run/checkpoint.pt": _resumed,
    "run/distilled.safetensors": load_distilled,
    "run/initial.safetensors": load_distilled,
    "run/summary.json": read_json,
    "run/environment.json": read_json,
    "run/metrics.jsonl": read_jsonl,
    "target.safetensors": load_target,
    "store/images.u8": lambda path: Verification(open_store(path.parent)),
    "store/labels.i64": lambda path: Verification(open_store(path.parent)),
    "store/index.json": lambda path: Verification(open_store(path.parent)),
    "result.json": read_json,
    "rows.jsonl": read_jsonl,
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_anywhere_and_a_cut_file_are_refused_by_name(run, tmp_path, name):
    shutil.copytree(run, tmp_path / "copy")
    path, read = tmp_path / "copy" / name, READERS[name]
    good = path.read_bytes()
    read(path)
    for number in range(24):
        place, bit = (len(good) - 1) * number // 23, number % 8
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
        with pytest.raises(KrrstError, match=path.name):
            read(path)
    for cut in (0, len(good) // 3, len(good) - 3):
        if name.endswith(".jsonl"):
            continue  # A kill may cut a log anywhere; tests/test_files.py cuts one.
        path.write_bytes(good[:cut])
        with pytest.raises(KrrstError, match=path.name):
            read(path)


def test_each_bit_of_what_a_seal_is_found_by(run, tmp_path):
    """The key, the mark and the digits of a checksum cannot be damaged into its absence."""
    for name in ("result.json", "rows.jsonl", "target.safetensors"):
        good = (run / name).read_bytes()
        key = b"crc32" if name == "rows.jsonl" else KEY.encode()
        start = good.rindex(key) - 1
        path = tmp_path / name
        for place in range(start, min(start + 100, len(good) - 1)):
            for bit in range(8):
                path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
                with pytest.raises(KrrstError, match=name):
                    READERS[name](path)


def test_a_large_store_is_read_beside_the_run_and_nothing_is_saved(run, tmp_path, monkeypatch):
    monkeypatch.setattr(verify_module, "_AT_ONCE", 0)
    shutil.copytree(run / "store", tmp_path / "store")
    config = _config(tmp_path / "store", run / "target.safetensors", tmp_path / "run")
    images = tmp_path / "store" / "images.u8"
    data = bytearray(images.read_bytes())
    data[-1] ^= 1
    images.write_bytes(data)
    with pytest.raises(DataError, match=r"images.u8: the checksum is wrong"):
        distill(config, progress=False)
    assert not (config.out / "checkpoint.pt").exists()
    assert not (config.out / "distilled.safetensors").exists()
    data[-1] ^= 1
    images.write_bytes(data)
    assert distill(config, resume=True, progress=False).meta["step"] == "4"


def test_the_set_of_another_run_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    folder = tmp_path / "copy"
    config = _config(folder / "store", folder / "target.safetensors", folder / "other")
    distill(dataclasses.replace(config, seed=1), progress=False)
    shutil.copy(folder / "other/distilled.safetensors", folder / "run")
    with pytest.raises(DataError, match="the set of another run: seed is 1 there and 0 in config"):
        load_distilled(folder / "run")
    with pytest.raises(DataError, match="the set of another run"):
        distill(dataclasses.replace(config, out=folder / "run"), resume=True, progress=False)


def test_files_without_a_checksum_are_read_with_a_warning(run, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    def stripped(name: str) -> Path:
        with safe_open(run / name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = {k: v for k, v in file.metadata().items() if k != KEY}
        save_file(tensors, tmp_path / Path(name).name, metadata)
        return tmp_path / Path(name).name

    saved = torch.load(_plain(run / "run/checkpoint.pt", tmp_path), weights_only=True)
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    for read, path in (
        (load_distilled, stripped("run/distilled.safetensors")),
        (load_target, stripped("target.safetensors")),
        (_resumed, tmp_path / "run" / "checkpoint.pt"),
    ):
        with pytest.warns(UserWarning, match=f"{path.name}: .* without a checksum"):
            read(path)
    shutil.copytree(run / "store", tmp_path / "store")
    write_json(tmp_path / "store/index.json", read_json(run / "store/index.json"))
    with pytest.warns(UserWarning, match="index.json: this index was written without a checksum"):
        open_store(tmp_path / "store")


def _plain(checkpoint: Path, folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "plain.pt").write_bytes(checkpoint.read_bytes().partition(b"\n")[2])
    return folder / "plain.pt"


def test_the_same_set_gives_the_same_bytes(tmp_path):
    made = DistilledSet(
        images=torch.ones(1, 3, 2, 2), targets=torch.ones(1, 1), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    for name in "ab":
        made.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_thing_in_the_place_of_another_is_called_what_it_is(run, tmp_path):
    for path, message in (
        (run / "run", "is the folder of a distillation run, not of a target"),
        (run / "run/distilled.safetensors", "is a distilled set, not a target"),
        (run / "store", "is an image store, not a target"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_target(path)
    (tmp_path / "target").mkdir()
    shutil.copy(run / "target.safetensors", tmp_path / "target")
    for path, message in (
        (tmp_path / "target", "is a target, not a distilled set"),
        (run / "target.safetensors", "is a target, not a distilled set"),
        (run / "store", "is a store of images, not a distilled set"),
    ):
        with pytest.raises(DataError, match=message):
            load_distilled(path)


def test_advice_to_run_code_is_not_relayed(tmp_path):
    from krrst_fast.runs.tensors import load_state

    torch.save({"x": Path("a")}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="holds more than tensors and plain values") as caught:
        load_state(tmp_path / "c.pt")
    assert "weights_only" not in str(caught.value) and "succeed" not in str(caught.value)
    save_state(tmp_path / "c.pt", {"x": 1})
    assert load_state(tmp_path / "c.pt") == {"x": 1}
