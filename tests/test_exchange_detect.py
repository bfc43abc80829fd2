"""What `import_set` takes a path for, what it says it left out, and labels that cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange import EXPORTS, export_set, import_set
from krrst_fast.exchange.labels import Labels, as_labels, read_labels, targets_of

SCALE = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
IMAGES = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([1, 0, 2, 1])
SOFT = torch.softmax(torch.arange(12.0).view(4, 3), 1)
OUTPUTS = torch.arange(-8.0, 12.0).view(4, 5)


def _set(targets: torch.Tensor = OUTPUTS, **meta: str) -> DistilledSet:
    mean, std = SCALE.values()
    return DistilledSet(images=IMAGES, targets=targets, mean=mean, std=std, meta=meta)


def _files(folder: Path, **files: object) -> Path:
    """Save each under its name, in which `__` stands for a dot."""
    for name, value in files.items():
        torch.save(value, folder / name.replace("__", "."))
    return folder


def _trials(labels: torch.Tensor = CLASSES) -> dict[str, object]:
    return {"data": [[IMAGES, labels]]}


def _png(path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (5, 5)).save(path)


CASES = {
    "dc": lambda at: _files(at, res_DC_CIFAR10__pt=_trials()),
    "dsa": lambda at: _files(at, res_DSA_CIFAR10_ConvNet_1ipc__pt=_trials()),
    "dm": lambda at: _files(at, res_DM_CIFAR10__pt=_trials()) / "res_DM_CIFAR10.pt",
    "mtt": lambda at: _files(at, images_50__pt=IMAGES, labels_50__pt=CLASSES),
    "dcbench": lambda at: _files(at, images_best__pt=IMAGES, labels_best__pt=CLASSES),
    "datm": lambda at: _files(at, images_best__pt=IMAGES, labels_best__pt=SOFT),
    "ddranking": lambda at: _files(at, images__pt=IMAGES, labels__pt=OUTPUTS),
    "lgm": lambda at: _files(at, data__pth={"images": IMAGES, "labels": CLASSES}),
}


@pytest.mark.parametrize("source", CASES)
def test_the_format_is_told_by_the_files(tmp_path: Path, source: str) -> None:
    path = CASES[source](tmp_path)
    scale = {} if source == "lgm" else SCALE
    told = import_set(path, **scale)
    results = list(tmp_path.glob("res_*.pt"))
    given = import_set(results[0] if results else path, source=source, **scale)
    assert told.source == source and told.why and told.left_out == given.left_out == ()
    assert torch.equal(told.distilled.images, IMAGES)
    assert torch.equal(told.distilled.targets, given.distilled.targets)
    assert told.distilled.meta["method"] == f"imported from {source}"


@pytest.mark.parametrize("to", EXPORTS)
def test_what_was_exported_is_told_by_its_record(tmp_path: Path, to: str) -> None:
    kind = EXPORTS[to].kinds[-1]
    labels = Labels("soft", SOFT) if kind == "soft" else Labels("class", CLASSES)
    export_set(_set(method="krr-st"), tmp_path / "out", to=to, labels=labels)
    read = import_set(tmp_path / "out")
    assert (read.source, read.left_out) == (to, ())
    assert torch.equal(read.distilled.targets, OUTPUTS)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert import_set(tmp_path / "out").left_out == ("notes.txt",)


def test_arrays_and_folders_of_images(tmp_path: Path) -> None:
    for name, arrays in (
        ("frepo", {"image": IMAGES.permute(0, 2, 3, 1).numpy(), "label": SOFT.numpy()}),
        ("npz", {"images": IMAGES.numpy(), "targets": OUTPUTS.numpy()}),
    ):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "set.npz", **arrays)
        for path in (tmp_path / name, tmp_path / name / "set.npz"):
            read = import_set(path, **SCALE)
            assert read.source == name and torch.equal(read.distilled.images, IMAGES)
    for name in ("cat/1.png", "cat/2.jpg", "dog/1.JPEG"):
        _png(tmp_path / "folder" / "train" / name)
    _png(tmp_path / "folder" / "val" / "cat" / "1.png")
    (tmp_path / "folder" / "train" / "metadata.jsonl").touch()
    read = import_set(tmp_path / "folder")
    assert read.source == "imagefolder" and len(read.distilled) == 3
    assert json.loads(read.distilled.meta["classes"]) == ["cat", "dog"]
    assert read.left_out == ("train/metadata.jsonl", "val/cat/1.png")


AMBIGUOUS = {
    "floats that may be either": (
        lambda at: _files(at, images_best__pt=IMAGES, labels_best__pt=OUTPUTS),
        "--from datm or --from mkdt",
    ),
    "images of two steps": (
        lambda at: _files(at, images_1__pt=IMAGES, images_2__pt=IMAGES, labels_2__pt=CLASSES),
        "several sets; give the path of one: images_1.pt, images_2.pt",
    ),
    "two results": (
        lambda at: _files(at, res_DC_a__pt=_trials(), images__pt=IMAGES),
        "give the path of one: images.pt, res_DC_a.pt",
    ),
    "a dict that may be pixels": (
        lambda at: _files(at, x__pt={"images": IMAGES, "labels": CLASSES}) / "x.pt",
        "--from lgm if its images are pixels",
    ),
    "a set of ours": (lambda at: (_set().save(at / "distilled.safetensors"), at)[1], "already"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_what_is_not_clear_is_asked(tmp_path: Path, case: str) -> None:
    make, says = AMBIGUOUS[case]
    with pytest.raises(ConfigError, match=says):
        import_set(make(tmp_path), **SCALE)


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="known layout, but no file"):
        import_set(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"known layout, but a\.txt"):
        import_set(tmp_path)
    for name, value, says in (
        ("a.pt", {"weight": IMAGES}, "it holds .*weight"),
        ("b.pt", IMAGES, "it holds Tensor"),
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(DataError, match=says):
            import_set(tmp_path / name)
    np.savez(tmp_path / "c.npz", x=np.zeros(2))
    with pytest.raises(DataError, match="found .'x'"):
        import_set(tmp_path / "c.npz")


@pytest.mark.parametrize("rate", [torch.tensor([[0.05]]), torch.tensor(0.05), 0.05])
def test_a_learned_rate_is_metadata(tmp_path: Path, rate: object) -> None:
    _files(tmp_path, images_best__pt=IMAGES, labels_best__pt=SOFT, lr_best__pt=rate)
    for path in (tmp_path, tmp_path / "images_best.pt"):
        read = import_set(path, **SCALE)
        assert float(read.distilled.meta["learning_rate"]) == pytest.approx(0.05)
        assert read.left_out == ()
    (tmp_path / "ranking").mkdir()
    _files(tmp_path / "ranking", images__pt=IMAGES, labels__pt=SOFT, lr__pt=rate)
    assert "learning_rate" in import_set(tmp_path / "ranking", **SCALE).distilled.meta


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    _files(tmp_path, images_best__pt=IMAGES, labels_best__pt=SOFT, lr_best__pt=IMAGES)
    _files(tmp_path, images_10__pt=IMAGES, labels_10__pt=SOFT, weights__pt=SOFT)
    left = import_set(tmp_path, **SCALE).left_out
    assert left == (
        "images_10.pt, another step",
        "lr_best.pt: holds no single number",
        "labels_10.pt",
        "weights.pt",
    )
    for i in range(12):
        (tmp_path / f"{i:02}.log").touch()
    assert import_set(tmp_path, **SCALE).left_out[2:] == (
        "14 other files, such as 00.log, 01.log, 02.log",
    )


def test_an_npz_without_its_record_keeps_its_scale(tmp_path: Path) -> None:
    export_set(_set(), tmp_path / "out", to="npz", labels=Labels("class", CLASSES))
    (tmp_path / "alone").mkdir()
    (tmp_path / "out" / "distilled.npz").rename(tmp_path / "alone" / "x.npz")
    read = import_set(tmp_path / "alone" / "x.npz")
    assert (read.distilled.mean, read.distilled.std) == tuple(SCALE.values())
    assert read.left_out == ("targets of the file (4x5): its labels are the targets of the set",)
    assert torch.equal(read.distilled.targets.argmax(1), CLASSES)
    with pytest.raises(ConfigError, match="already says mean and std"):
        import_set(tmp_path / "alone" / "x.npz", **SCALE)


BAD = {
    "one class too many to count": (torch.tensor([0, 2**62]), "label 4611686018427387904 is no"),
    "beyond 63 bits": (torch.tensor([0, 2**63], dtype=torch.uint64), "label 9223372036854775808"),
    "negative": (torch.tensor([0, -7]), "a label is negative, -7"),
    "halves": (torch.tensor([0.5, 1.0]), "must be .M. whole numbers"),
    "truth": (torch.tensor([True, False]), "must be .M. whole numbers"),
    "nan": (torch.tensor([[0.5], [torch.nan]]), "NaN or infinite"),
    "too large for float32": (torch.tensor([[1.0], [1e300]], dtype=torch.float64), "infinite"),
    "too few": (torch.tensor([0]), "2 images need as many labels"),
    "one number": (torch.tensor(1), "2 images need as many labels"),
    "no score": (torch.zeros(2, 0), r"got \(2, 0\)"),
    "sparse": (torch.eye(2).to_sparse(), "dense"),
}


@pytest.mark.parametrize("case", BAD)
def test_labels_that_cannot_be(case: str) -> None:
    values, says = BAD[case]
    with pytest.raises(DataError, match=f"labels.pt: .*{says}"):
        as_labels(values, 2, "soft", "labels.pt")


def test_labels_with_gaps_do_not_fill_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = torch.zeros(600, dtype=torch.int64)
    labels[7] = 999_999
    with pytest.raises(DataError, match="label 999999 of 600 images .*1000000 classes, 2.2 GiB"):
        targets_of(Labels("class", labels), ())
    _files(tmp_path, images__pt=IMAGES, labels__pt=CLASSES + 2**40)
    scale = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    words = ["import", str(tmp_path), *scale, "--out", str(tmp_path / "o.safetensors")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "labels.pt: label 1099511627778 is no class" in line
    with pytest.raises(DataError, match="negative"):
        targets_of(Labels("class", CLASSES - 1), ())
    (tmp_path / "l.txt").write_text("99999999999999999999\n")
    with pytest.raises(DataError, match=r"l\.txt"):
        read_labels(tmp_path / "l.txt", 1)
    np.savez(tmp_path / "t.npz", image=np.zeros((2, 4, 4, 3)), label=np.array(["cat", "dog"]))
    with pytest.raises(DataError, match="label: must hold numbers, found <U3"):
        import_set(tmp_path / "t.npz", **SCALE)


def test_the_command_says_what_it_took_it_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _files(tmp_path, images_50__pt=IMAGES, labels_50__pt=CLASSES, other__pt=SOFT)
    out = tmp_path / "o.safetensors"
    scale = ["--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]
    assert main(["import", str(tmp_path), "--out", str(out), *scale]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"took {tmp_path} for mtt: labels_50.pt holds classes"
    assert lines[2:] == ["its targets are classes, one-hot", "left out: other.pt"]
    assert torch.equal(load_distilled(out).targets.argmax(1), CLASSES)
