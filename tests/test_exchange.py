"""Sets in the layouts of other projects: out and in again, and files as those projects write."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.cli.exchange import FROM, TO
from krrst_fast.cli.main import main
from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange import EXPORTS, IMPORTS, export_set, import_set
from krrst_fast.exchange.labels import Labels, read_labels

MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)
SCALE = {"mean": MEAN, "std": STD}
NAMES = ("zebra", "ant", "cow/bull", "bee")
LABELS = torch.tensor([2, 0, 3, 0, 2, 1])


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _set(kind: str) -> DistilledSet:
    """Six images whose pixels are whole numbers of 255, so that a PNG loses little."""
    draw = _draw()
    pixels = torch.randint(0, 256, (6, 3, 4, 5), generator=draw) / 255
    images = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    targets = torch.randn(6, 4, generator=draw)
    if kind == "class":
        targets = torch.nn.functional.one_hot(LABELS, 4).float()
    meta = {"method": "krr-st", "target": "sha256:abc"}
    if kind != "representation":
        meta |= {"label_kind": kind, "classes": json.dumps(NAMES)}
    return DistilledSet(images=images, targets=targets, mean=MEAN, std=STD, meta=meta)


PAIRS = [(to, kind) for to, export in EXPORTS.items() for kind in export.kinds]


@pytest.mark.parametrize("to, kind", PAIRS)
def test_what_is_exported_comes_back(tmp_path: Path, to: str, kind: str) -> None:
    made = _set(kind)
    export_set(made, tmp_path / "out", to=to)
    read = import_set(tmp_path / "out", source=to)
    assert read.left_out == ()
    # float32 of a pixel in [0, 1] divided by the smallest std
    tolerance = 0.0 if EXPORTS[to].exact else 3e-6
    assert torch.allclose(read.distilled.images, made.images, rtol=0, atol=tolerance)
    assert torch.equal(read.distilled.targets, made.targets)
    assert (read.distilled.mean, read.distilled.std) == (MEAN, STD)
    assert read.distilled.meta == made.meta
    about = json.loads((tmp_path / "out" / "krrst.json").read_text())
    assert (about["encoder"], about["label_kind"]) == ("sha256:abc", kind)
    assert about["classes"] == ([] if kind == "representation" else list(NAMES))


def test_a_png_clips_and_rounds_and_says_so(tmp_path: Path) -> None:
    made = _set("representation")
    far = DistilledSet(images=made.images * 3 + 0.001, targets=made.targets, mean=MEAN, std=STD)
    export_set(far, tmp_path / "out", to="imagefolder")
    back = import_set(tmp_path / "out", source="imagefolder").distilled
    assert torch.equal(back.pixels(), far.pixels())
    assert not torch.allclose(back.images, far.images, atol=0.1)
    assert json.loads((tmp_path / "out" / "krrst.json").read_text())["exact"] is False


@pytest.mark.parametrize("to", ["ddranking", "dcbench", "lgm", "datm"])
def test_labels_are_never_invented(tmp_path: Path, to: str) -> None:
    with pytest.raises(DataError, match=f"{to} holds labels of kind .* representation"):
        export_set(_set("representation"), tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["ddranking", "dcbench", "lgm", "npz", "imagefolder"])
def test_labels_of_a_user_are_written_and_the_targets_are_kept(tmp_path: Path, to: str) -> None:
    np.save(tmp_path / "labels.npy", LABELS.numpy())
    made = _set("representation")
    labels = read_labels(tmp_path / "labels.npy", 6)
    export_set(made, tmp_path / "out", to=to, labels=labels)
    assert torch.equal(import_set(tmp_path / "out", source=to).distilled.targets, made.targets)
    if to == "dcbench":
        assert torch.equal(torch.load(tmp_path / "out/labels_best.pt"), LABELS)


def test_labels_that_were_moved_after_the_export_are_found(tmp_path: Path) -> None:
    export_set(_set("class"), tmp_path / "out", to="dcbench")
    torch.save(LABELS + 1, tmp_path / "out" / "labels_best.pt")
    with pytest.raises(DataError, match="labels in the files are not those that were exported"):
        import_set(tmp_path / "out", source="dcbench")
    export_set(_set("soft"), tmp_path / "soft", to="datm")
    torch.save(torch.zeros(6, 4), tmp_path / "soft" / "labels_best.pt")
    with pytest.raises(DataError, match=r"not those of targets\.npy"):
        import_set(tmp_path / "soft", source="datm")


def test_the_folders_of_classes_sort_in_the_order_of_the_labels(tmp_path: Path) -> None:
    export_set(_set("class"), tmp_path / "out", to="imagefolder")
    folders = sorted(x.name for x in (tmp_path / "out/train").iterdir() if x.is_dir())
    assert folders == ["0000_zebra", "0001_ant", "0002_cow_bull", "0003_bee"]
    lines = (tmp_path / "out/train/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["label"] for row in rows] == LABELS.tolist()
    assert all((tmp_path / "out/train" / row["file_name"]).exists() for row in rows)


def test_the_card_begins_with_yaml(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    export_set(_set("class"), tmp_path / "out", to="imagefolder")
    _, header, page = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    values = yaml.safe_load(header)
    assert values["size_categories"] == ["n<1K"] and "dataset-distillation" in values["tags"]
    assert values["configs"][0]["data_files"] == [{"split": "train", "path": "train/**"}]
    assert (values["license"], values["library_name"]) == ("unknown", "krrst_fast")
    # What is uploaded is what lies there: no temporary file, and no link.
    assert {x.name for x in (tmp_path / "out").iterdir()} == {
        *("README.md", "krrst.json", "targets.npy", "train")
    }
    assert "zebra, ant, cow/bull, bee" in page and "sha256:abc" in page


def _images() -> torch.Tensor:
    return torch.randn(6, 3, 4, 5, generator=_draw())


def _write(source: str, folder: Path, images: torch.Tensor | None = None) -> Path:
    """What the project itself writes: what is to be read."""
    images = _images() if images is None else images
    soft = torch.arange(24.0).view(6, 4)
    if source in ("dc", "dsa", "dm"):
        path = folder / f"res_{source.upper()}_CIFAR10_ConvNet_1ipc.pt"
        trials = [[torch.zeros(2, 3, 4, 5), torch.tensor([0, 1])], [images, LABELS]]
        accuracies = {"ConvNet": [np.float64(0.5), np.float64(0.25)]}
        torch.save({"data": trials, "accs_all_exps": accuracies}, path)
        return path
    if source in ("mtt", "mkdt"):
        for step in (100, 5000):
            torch.save(images + (step == 100), folder / f"images_{step}.pt")
            torch.save(LABELS if source == "mtt" else soft, folder / f"labels_{step}.pt")
        return folder / "images_5000.pt"
    if source == "frepo":
        np.savez(folder / "step1.npz", image=images.permute(0, 2, 3, 1).numpy(), label=soft.numpy())
        return folder / "step1.npz"
    if source == "ddranking":
        torch.save(images.requires_grad_(), folder / "images.pt")
        torch.save(soft, folder / "labels.pt")
    if source in ("datm", "dcbench"):
        torch.save(images, folder / "images_best.pt")
        torch.save(soft if source == "datm" else LABELS, folder / "labels_best.pt")
    return folder


KINDS = {"mkdt": "representation", "frepo": "soft", "ddranking": "soft", "datm": "soft"}


@pytest.mark.parametrize(
    "source", ["dc", "dsa", "dm", "mtt", "mkdt", "frepo", "ddranking", "dcbench", "datm"]
)
def test_files_of_other_projects_are_read(tmp_path: Path, source: str) -> None:
    path = _write(source, tmp_path)
    with pytest.raises(ConfigError, match="--mean and --std"):
        import_set(path, source=source)
    read = import_set(path, source=source, classes=NAMES, **SCALE)
    made, kind = read.distilled, KINDS.get(source, "class")
    assert torch.equal(made.images, _images()) and made.mean == MEAN
    one_hot = torch.nn.functional.one_hot(LABELS, 4).float()
    assert torch.equal(made.targets, one_hot if kind == "class" else torch.arange(24.0).view(6, 4))
    assert made.meta["label_kind"] == kind and json.loads(made.meta["classes"]) == list(NAMES)
    of_trials = ("1 earlier trials of data", "accs_all_exps of the file")
    of_steps = ("images_100.pt, another step",)
    left = dict.fromkeys(("dc", "dsa", "dm"), of_trials) | dict.fromkeys(("mtt", "mkdt"), of_steps)
    assert read.left_out == left.get(source, ())
    made.save(tmp_path / FILE_NAME)
    assert torch.equal(load_distilled(tmp_path).targets, made.targets)


def test_lgm_holds_pixels(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 4, 5, generator=_draw()) * 1.5 - 0.25
    torch.save({"images": images, "labels": LABELS, "step": 7}, tmp_path / "data.pth")
    read = import_set(tmp_path, source="lgm")
    assert read.distilled.mean == (0.0,) * 3 and read.left_out == ("step of the file",)
    with pytest.raises(ConfigError, match="leave out --mean"):
        import_set(tmp_path, source="lgm", **SCALE)
    dark = torch.zeros(6, 3, 4, 5)
    dark[0, 0, 0, 0] = 254.9
    for wrong in (images.clamp(0) * 255, dark, images.clamp(0, 1) * 2 - 1, _images()):
        torch.save({"images": wrong, "labels": LABELS}, tmp_path / "data.pth")
        with pytest.raises(DataError, match=r"data\.pth: the images must be pixels in \[0, 1\]"):
            import_set(tmp_path / "data.pth", source="lgm")


@pytest.mark.parametrize("source", ["dc", "mtt", "frepo", "ddranking", "dcbench"])
def test_bytes_are_not_normalised_images(tmp_path: Path, source: str) -> None:
    path = _write(source, tmp_path, images=torch.rand(6, 3, 4, 5, generator=_draw()) * 255)
    for scale in (SCALE, {"mean": (0,) * 3, "std": (1,) * 3}):
        with pytest.raises(DataError, match="divide pixels of 0 to 255 by 255"):
            import_set(path, source=source, **scale)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code of the file ran",))


def test_objects_are_not_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"data": [[_images(), LABELS]], "more": _Evil()}, tmp_path / "res_DC.pt")
    with pytest.raises(DataError, match=r"not unpickled.*torch\.save its tensors"):
        import_set(tmp_path / "res_DC.pt", source="dc", **SCALE)
    (tmp_path / "images.pt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(DataError):
        import_set(tmp_path, source="ddranking", **SCALE)
    np.savez(tmp_path / "x.npz", image=np.array([_Evil()], dtype=object), label=np.zeros(1))
    with pytest.raises(DataError, match="plain arrays"):
        import_set(tmp_path / "x.npz", source="frepo", **SCALE)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("source", sorted(IMPORTS))
def test_damaged_and_missing_files_are_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        import_set(tmp_path / "nowhere", source=source)
    for name in ("images.pt", "images_best.pt", "data.pth", "distilled.npz", "res_DC.pt", "a.png"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not that")
    path = tmp_path / "res_DC.pt" if source in ("dc", "dsa", "dm", "frepo") else tmp_path
    with pytest.raises(DataError, match=str(tmp_path)):
        import_set(path, source=source)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="6 images, and 2 labels"):
        export_set(_set("class"), tmp_path / "o", to="npz", labels=Labels("class", LABELS[:2]))
    path = _write("dcbench", tmp_path)
    with pytest.raises(DataError, match="label 3 is not among 3 classes"):
        import_set(path, source="dcbench", classes=NAMES[:3], **SCALE)
    (tmp_path / "labels.txt").write_text("0\n-1\n")
    with pytest.raises(DataError, match="negative"):
        read_labels(tmp_path / "labels.txt", 2)
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match="not a file of labels"):
        read_labels(tmp_path / "labels.txt", 1)


def test_the_command_line_goes_out_and_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = _set("representation")
    made.save(tmp_path / "run.safetensors")
    words = ["export", str(tmp_path / "run.safetensors"), "--to", "npz", "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    out = str(tmp_path / "back.safetensors")
    assert main(["import", str(tmp_path / "out"), "--from", "npz", "--out", out]) == 0
    assert "DistilledSet(6 images of 3x4x5, 4 targets" in capsys.readouterr().out
    assert Path(out).read_bytes() == (tmp_path / "run.safetensors").read_bytes()
    assert main(["import", str(tmp_path / "out"), "--from", "npz", "--out", out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "out"), "--overwrite"]) == 0


def test_the_command_line_lists_the_formats_there_are() -> None:
    assert tuple(EXPORTS) == TO and tuple(IMPORTS) == FROM
