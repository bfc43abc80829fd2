"""What the targets of a set are, and labels that a user brings along."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from krrst_fast.data.source import MOST_CLASSES
from krrst_fast.errors import DataError

Kind = Literal["representation", "class", "soft"]
MOST_TARGETS = 2**28
"""Numbers in the one-hot targets of a set: 1 GiB."""
KINDS: tuple[Kind, ...] = ("representation", "class", "soft")


@dataclass(frozen=True)
class Labels:
    """The labels of the images of a set."""

    kind: Kind
    values: Tensor
    """"class": [M] int64, indices of classes. Otherwise [M, P] float32."""
    classes: tuple[str, ...] = ()
    """Their names in the order of the indices; empty where the set knows better, or nobody does."""
    origin: str = ""
    """Where they come from, if that is not the set itself or its user."""


def targets_of(labels: Labels, classes: Sequence[str]) -> Tensor:
    """Return labels as targets [M, P]: classes as one-hot rows.

    Raises:
        DataError: A class has no name in `classes`, where that names any.
    """
    if labels.kind != "class":
        width = labels.values.shape[1]
        if labels.kind == "soft" and classes and width != len(classes):
            raise DataError(f"the soft labels have {width} classes, and {len(classes)} are named")
        return labels.values
    if int(labels.values.min()) < 0:
        raise DataError("a label is negative; classes count from 0")
    most = int(labels.values.max()) + 1
    if classes and most > len(classes):
        raise DataError(f"label {most - 1} is not among {len(classes)} classes, counted from 0")
    shape = (len(labels.values), len(classes) or most)
    if math.prod(shape) > MOST_TARGETS:
        raise DataError(
            f"label {most - 1} of {shape[0]} images makes one-hot targets of {shape[1]} classes, "
            f"{4 * math.prod(shape) / 2**30:.1f} GiB: number the classes from 0 without gaps"
        )
    return torch.zeros(shape).scatter_(1, labels.values.cpu()[:, None], 1.0)


def labels_in(targets: Tensor, meta: Mapping[str, str]) -> Labels:
    """Return the labels that a set holds, as its metadata says; representations if it does not."""
    kind = meta.get("label_kind", "representation")
    if kind not in KINDS:
        raise DataError(f"label_kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return Labels(kind, targets.argmax(1) if kind == "class" else targets)


def classes_in(meta: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the classes in their order; none if they are not known."""
    text = meta.get("classes", "[]")
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"classes must be a list of texts in JSON, got {text!r:.60}")
    return tuple(names)


def as_labels(values: Tensor, count: int, float_kind: Kind, where: str) -> Labels:
    """Check labels that a file holds, and bring them to the CPU.

    Args:
        values: [count] whole numbers or [count, P] floats.
        count: How many images there are.
        float_kind: What floats are in that format.
        where: The file, for the message.

    Raises:
        DataError: They are neither, not one for each image, not finite, or no classes.
    """
    if values.layout != torch.strided:
        raise DataError(f"{where}: labels must be a dense tensor, got {values.layout}")
    if len(values.shape) == 0 or values.shape[0] != count:
        raise DataError(f"{where}: {count} images need as many labels, got {tuple(values.shape)}")
    if count == 0:
        raise DataError(f"{where}: holds no labels")
    values = values.detach().cpu()
    if values.ndim == 1 and _whole(values):
        # NumPy finds the extremes of unsigned numbers too.
        low, high = int(values.numpy().min()), int(values.numpy().max())
        if low < 0:
            raise DataError(f"{where}: a label is negative, {low}; classes count from 0")
        if high >= MOST_CLASSES:
            raise DataError(f"{where}: label {high} is no class: there are {MOST_CLASSES} at most")
        return Labels("class", values.long())
    if values.ndim == 2 and values.shape[1] > 0 and values.is_floating_point():
        scores = values.float()
        if not torch.isfinite(scores).all():
            raise DataError(f"{where}: a label is NaN or infinite")
        return Labels(float_kind, scores)
    raise DataError(
        f"{where}: labels must be [M] whole numbers or [M, P] floats, "
        f"got {tuple(values.shape)} {values.dtype}"
    )


def _whole(values: Tensor) -> bool:
    inexact = values.is_floating_point() or values.is_complex() or values.is_quantized
    return not inexact and values.dtype != torch.bool


def tensor_of(array: np.ndarray) -> Tensor:
    """Return an array of numbers as a tensor, whatever the byte order of its processor.

    Raises:
        TypeError: It is of text, of objects, or of numbers that torch does not have.
    """
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def load_npy(path: Path) -> Tensor:
    """Load a .npy file of numbers as a tensor.

    Raises:
        DataError: It is missing or damaged, or holds something else.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception as error:  # damaged bytes lead NumPy to errors of any type
        raise DataError(f"{path}: not a readable array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: holds several arrays, and one saved by numpy.save is needed")
    try:
        return tensor_of(array)
    except TypeError:
        raise DataError(f"{path}: must hold numbers, found {array.dtype}") from None


def read_labels(path: Path, count: int | None = None) -> Labels:
    """Read labels that a user gives.

    Args:
        path: A `.npy` file with [M] whole numbers (classes) or [M, K] floats (soft labels), or a
            text file with one whole number a line.
        count: How many images they are for; not compared if left out.

    Raises:
        DataError: The file is none of these, or has not one label for each image.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    if path.suffix == ".npy":
        values = load_npy(path)
    else:
        try:
            lines = path.read_text(encoding="utf-8").split()
            values = torch.tensor([int(line) for line in lines], dtype=torch.int64)
        except (ValueError, RuntimeError) as error:  # torch's word for a number beyond 63 bits
            raise DataError(f"{path}: not a file of labels ({error})") from None
    if count is None:
        count = len(values) if values.ndim else 1
    return as_labels(values, count, "soft", str(path))


def read_classes(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line, in their order."""
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while names and not names[-1]:
        names.pop()
    if "" in names or len(set(names)) < len(names) or not names:
        raise DataError(f"{path}: must hold one name a line, none empty and none twice")
    return tuple(names)
