"""Image folders as distilled sets: which files, in which order; and records that are damaged."""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from krrst_fast.cli.main import main
from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
from krrst_fast.errors import DataError
from krrst_fast.exchange import export_set, import_set
from krrst_fast.exchange.labels import read_labels
from krrst_fast.targets.open_encoder import read_features

FILES = ("cat/b_10.png", "cat/b_9.png", "cat-big/a_1.png", "dog/a_1.png")
ORDER = ("cat/b_9.png", "cat/b_10.png", "cat-big/a_1.png", "dog/a_1.png")
LABELS = torch.tensor([1, 0, 3, 2])


def _png(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 5), (level,) * 3).save(path)


def _folder(root: Path) -> Path:
    """Each image is as bright as its place in ORDER."""
    for name in FILES:
        _png(root / name, ORDER.index(name))
    return root


def _levels(made: DistilledSet) -> list[int]:
    return made.pixels()[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("train", [False, True])
def test_images_come_in_the_order_of_their_paths(tmp_path: Path, train: bool) -> None:
    _folder(tmp_path / "set" / "train" if train else tmp_path / "set")
    read = import_set(tmp_path / "set")
    assert read.names == ORDER and _levels(read.distilled) == [0, 1, 2, 3]
    assert json.loads(read.distilled.meta["classes"]) == ["cat", "cat-big", "dog"]
    assert read.distilled.targets.argmax(1).tolist() == [0, 0, 1, 2] and read.left_out == ()


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    root = _folder(tmp_path / ".cache" / "set")  # a set may lie in a hidden folder itself
    for name in (".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/b_9.png", "dog/._a_1.png"):
        _png(root / name, 99)
    (root / ".distilled.npz").touch()
    read = import_set(root)
    assert json.loads(read.distilled.meta["classes"]) == ["cat", "cat-big", "dog"]
    assert _levels(read.distilled) == [0, 1, 2, 3]
    assert read.left_out == (
        "3 hidden images, such as .ipynb_checkpoints/x.png",
        ".distilled.npz",
    )
    _png(tmp_path / "none" / ".hidden" / "a.png", 0)
    with pytest.raises(DataError, match="no distilled set of a known layout"):
        import_set(tmp_path / "none")


def test_labels_of_a_user_go_by_that_order_and_have_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = _folder(tmp_path / "set"), tmp_path / "o.safetensors"
    labels = tmp_path / "labels.npy"
    np.save(labels, LABELS.numpy().astype(">i4"))
    words = ["import", str(root), "--labels", str(labels), "--out", str(out)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    told = f"labels of {labels}: the first is of cat/b_9.png, the last of dog/a_1.png"
    assert told in lines
    assert "left out: 3 names of folders: the labels that are given have no names" in lines
    made = load_distilled(out)
    assert made.targets.argmax(1).tolist() == LABELS.tolist() and "classes" not in made.meta
    named = import_set(root, labels=read_labels(labels), classes=("a", "b", "c", "d"))
    assert json.loads(named.distilled.meta["classes"]) == ["a", "b", "c", "d"]
    assert named.left_out == ()


def test_classes_beyond_four_digits_come_back(tmp_path: Path) -> None:
    images, targets = torch.zeros(2, 3, 4, 4), torch.zeros(2, 10_001)
    targets[0, 10_000] = targets[1, 3] = 1
    made = DistilledSet(
        images=images,
        targets=targets,
        mean=(0.5,) * 3,
        std=(1.0,) * 3,
        meta={"label_kind": "class"},
    )
    export_set(made, tmp_path / "out", to="imagefolder")
    assert torch.equal(import_set(tmp_path / "out").distilled.targets, targets)


def _exported(folder: Path, to: str = "npz") -> Path:
    images = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(8.0).view(4, 2)
    made = DistilledSet(images=images, targets=targets, mean=(0.5,) * 3, std=(0.25,) * 3)
    return export_set(made, folder / "out", to=to)


@pytest.mark.parametrize("order", [">f4", "<f4", ">f8", "<f2"])
def test_targets_of_any_byte_order_are_read(tmp_path: Path, order: str) -> None:
    out = _exported(tmp_path)
    np.save(out / "targets.npy", np.arange(8.0).reshape(4, 2).astype(order))
    assert torch.equal(import_set(out).distilled.targets, torch.arange(8.0).view(4, 2))
    arrays = {"image": np.full((4, 4, 4, 3), 0.5, ">f4"), "label": np.arange(4, dtype=">i8")}
    np.savez(tmp_path / "frepo.npz", **arrays)
    scale = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    read = import_set(tmp_path / "frepo.npz", **scale).distilled
    assert torch.equal(read.targets, torch.eye(4)) and bool((read.images == 0.5).all())


@pytest.mark.parametrize(
    "array, says",
    [
        (np.array([["a", "b"]] * 4), "targets.npy: must hold numbers, found <U1"),
        (np.ones((4, 2), np.complex64), "targets.npy: must hold real numbers"),
        (np.zeros((4, 2), [("x", "f4")]), "targets.npy: must hold numbers"),
        (np.zeros(()), "targets must be"),
    ],
)
def test_targets_that_are_no_numbers_are_refused(
    tmp_path: Path, array: np.ndarray, says: str
) -> None:
    out = _exported(tmp_path)
    np.save(out / "targets.npy", array)
    with pytest.raises(DataError, match=says):
        import_set(out)


@pytest.mark.parametrize("classes", ["cat", "5", '{"a": 1}', "[1, 2]", '["cat", 2]'])
def test_names_of_classes_are_a_list_of_texts(tmp_path: Path, classes: str) -> None:
    images, scale = torch.zeros(2, 3, 4, 4), {"mean": (0.5,) * 3, "std": (1.0,) * 3}
    meta = {"label_kind": "class", "classes": classes}
    made = DistilledSet(images=images, targets=torch.eye(2), **scale, meta=meta)
    with pytest.raises(DataError, match="classes must be a list of texts in JSON"):
        export_set(made, tmp_path / "out", to="lgm")


def test_damaged_arrays_are_data_errors(tmp_path: Path) -> None:
    out, draw = _exported(tmp_path), random.Random(0)
    head = b"\x93NUMPY\x01\x00"
    texts = (b"{'descr': (\n", b"{", b"[1]", b"{'descr': '<f4', 'shape': (10**9, 10**9)}", b"\xff")
    damaged = [head + len(text).to_bytes(2, "little") + text for text in (*texts, b"")]
    for name in ("targets.npy", "distilled.npz"):
        good = (out / name).read_bytes()
        for _ in range(100):
            content = bytearray(good)
            for _ in range(3):
                content[draw.randrange(len(good))] = draw.randrange(256)
            damaged.append(bytes(content[: draw.choice((len(good), draw.randrange(len(good))))]))
        for content in damaged:
            (out / name).write_bytes(content)
            # A change of its numbers alone is no damage that these files can show.
            with contextlib.suppress(DataError):
                assert len(import_set(out).distilled) == 4
        (out / name).write_bytes(good)
        damaged = damaged[:6]
    for text in damaged:
        (tmp_path / "labels.npy").write_bytes(text)
        with pytest.raises(DataError, match=r"labels\.npy: not a readable array"):
            read_labels(tmp_path / "labels.npy", 4)
        with pytest.raises(DataError, match=r"labels\.npy: not a readable \.npy file"):
            read_features(tmp_path / "labels.npy", 4)


BAD = [
    {"mean": ["a", 0, 0]},
    {"mean": [None, 0, 0]},
    {"mean": [True, 0, 0]},
    {"mean": 0.5},
    {"mean": "abc"},
    {"std": [10**400, 1, 1]},
    {"std": [0, 1, 1]},
    {"std": [1, 1]},
    {"meta": 5},
    {"meta": {"classes": 5}},
    {"shape": "big"},
    {"labels": 3},
    {"label_kind": ["class"]},
    {"format_version": [1]},
]


@pytest.mark.parametrize("to", ["npz", "imagefolder"])
@pytest.mark.parametrize("change", BAD, ids=lambda change: json.dumps(change)[:30])
def test_a_damaged_record_is_one_line(
    tmp_path: Path, change: dict[str, object], to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = _exported(tmp_path, to)
    record = out / "krrst.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert main(["import", str(out), "--out", str(tmp_path / "o.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line and len(line) < 500
    assert not (tmp_path / "o.safetensors").exists()
