"""A distilled set in the layout of another project, with all that the layout does not carry."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.exchange.card import card
from krrst_fast.exchange.labels import Kind, Labels, classes_in, labels_in
from krrst_fast.runs.files import atomic_folder, write_json

SIDECAR = "krrst.json"
TARGETS = "targets.npy"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Export:
    """One layout that sets are written in."""

    write: Callable[[Path, DistilledSet, Labels], None]
    kinds: tuple[Kind, ...]
    """The kinds of labels it can hold."""
    image_range: str
    """What a number in its image files is."""
    exact: bool
    """Whether its images come back bit by bit."""


def export_set(
    distilled: DistilledSet,
    out: str | Path,
    *,
    to: str,
    labels: Labels | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a set as another project reads it: a new folder, with a data card for Hugging Face.

    Beside the files of the layout lie `krrst.json` (range, normalisation, kind of labels, order of
    classes, identity of the target network) and `targets.npy`, so `import_set` gives the set back.

    Args:
        distilled: The set.
        out: The folder to make.
        to: A key of EXPORTS.
        labels: Labels of the images for a layout that needs them; those of the set if left out.
        overwrite: Replace a folder that an earlier export made.

    Raises:
        ConfigError: There is no such layout, or `out` exists.
        DataError: The layout cannot hold labels of this kind.
    """
    if to not in EXPORTS:
        raise ConfigError(f"export: there is no format {to!r}; there are {', '.join(EXPORTS)}")
    export = EXPORTS[to]
    own = labels_in(distilled.targets.cpu().float(), distilled.meta)
    given = own if labels is None else labels
    if len(given.values) != len(distilled):
        raise DataError(f"export: {len(distilled)} images, and {len(given.values)} labels")
    if given.kind not in export.kinds:
        raise DataError(
            f"export: {to} holds labels of kind {' or '.join(export.kinds)}, and these are of "
            f"kind {given.kind}; give labels of your own with --labels, or write imagefolder or npz"
        )
    classes = given.classes or classes_in(distilled.meta)
    given = replace(given, classes=classes)
    if given.kind == "class" and classes and int(given.values.max()) >= len(classes):
        raise DataError(f"export: label {int(given.values.max())}, and {len(classes)} classes")
    about = {
        "format_version": FORMAT_VERSION,
        "format": to,
        "image_range": export.image_range,
        "exact": export.exact,
        "shape": list(distilled.images.shape),
        "mean": list(distilled.mean),
        "std": list(distilled.std),
        "label_kind": given.kind,
        "labels": given.values.tolist() if given.kind == "class" else None,
        "labels_from": given.origin or None,
        "target_kind": own.kind,
        "classes": list(classes),
        "encoder": distilled.meta.get("target"),
        "meta": dict(distilled.meta),
    }
    with atomic_folder(Path(out), overwrite=overwrite, marker=SIDECAR) as folder:
        export.write(folder, distilled, given)
        np.save(folder / TARGETS, distilled.targets.detach().cpu().float().numpy())
        (folder / "README.md").write_text(card(distilled, about), encoding="utf-8")
        write_json(folder / SIDECAR, about)
    return Path(out)


def _images(distilled: DistilledSet) -> Tensor:
    return distilled.images.detach().cpu().float().contiguous()


def unit_pixels(distilled: DistilledSet) -> Tensor:
    """Return the images in [0, 1] units, not clipped: [M, C, H, W] float32."""
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (distilled.mean, distilled.std)
    )
    return (distilled.images.detach().cpu().double() * std + mean).float()


def _two_tensors(images: str, labels: str) -> Callable[[Path, DistilledSet, Labels], None]:
    def write(folder: Path, distilled: DistilledSet, given: Labels) -> None:
        torch.save(_images(distilled), folder / images)
        torch.save(given.values.clone(), folder / labels)

    return write


def _lgm(folder: Path, distilled: DistilledSet, given: Labels) -> None:
    torch.save(
        {"images": unit_pixels(distilled), "labels": given.values.clone()}, folder / "data.pth"
    )


def _npz(folder: Path, distilled: DistilledSet, given: Labels) -> None:
    arrays = {
        "images": _images(distilled).numpy(),
        "targets": distilled.targets.detach().cpu().float().numpy(),
        "mean": np.array(distilled.mean),
        "std": np.array(distilled.std),
    }
    if given.kind != "representation":
        arrays["labels"] = given.values.numpy()
    np.savez(folder / "distilled.npz", **arrays)  # type: ignore[arg-type]


def _imagefolder(folder: Path, distilled: DistilledSet, given: Labels) -> None:
    from PIL import Image

    if distilled.images.shape[1] not in (1, 3):
        raise DataError(
            f"export: imagefolder holds 1 or 3 channels, got {distilled.images.shape[1]}"
        )
    classes = given.classes
    rows = []
    for index, pixels in enumerate(distilled.pixels().numpy()):
        row: dict[str, object] = {"file_name": f"train/{index:06d}.png"}
        if given.kind == "class":
            label = int(given.values[index])
            # The number leads: readers sort these names, and the sorted order is the classes'.
            name = f"{label:04d}_{_safe(classes[label])}" if classes else f"{label:04d}"
            row = {"file_name": f"train/{name}/{index:06d}.png", "label": label}
        elif given.kind == "soft":
            row["label"] = given.values[index].tolist()
        path = folder / str(row["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)
        rows.append(row)
    # Hugging Face reads metadata.jsonl beside the images of a split, relative to it.
    lines = [json.dumps({**row, "file_name": str(row["file_name"])[6:]}) for row in rows]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


_NORMALISED = "(pixel - mean) / std"

EXPORTS: Mapping[str, Export] = {
    "ddranking": Export(
        _two_tensors("images.pt", "labels.pt"), ("class", "soft"), _NORMALISED, True
    ),
    "dcbench": Export(
        _two_tensors("images_best.pt", "labels_best.pt"), ("class",), _NORMALISED, True
    ),
    "datm": Export(_two_tensors("images_best.pt", "labels_best.pt"), ("soft",), _NORMALISED, True),
    "lgm": Export(_lgm, ("class",), "[0, 1]", False),
    "imagefolder": Export(
        _imagefolder, ("representation", "class", "soft"), "uint8, clipped to 0..255", False
    ),
    "npz": Export(_npz, ("representation", "class", "soft"), _NORMALISED, True),
}
