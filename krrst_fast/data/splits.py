"""What the splits of a store should not share, and what they should: images, and classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from krrst_fast.data.source import UNLABELLED
from krrst_fast.data.store import ImageStore

_NAMED = 4


def repeated(images: Tensor, others: Tensor) -> Tensor:
    """Return positions of the images that stand among others too, pixel for pixel.

    Their digests are compared: half a second for 70,000 images of 32 px.

    Args:
        images: uint8 [N, C, H, W], on the CPU.
        others: uint8 [K, C, H, W], on the CPU; of another C, H, W they have no image in common.

    Returns:
        int64 [R], ascending.
    """
    if images.shape[1:] != others.shape[1:] or not len(images) or not len(others):
        return torch.empty(0, dtype=torch.int64)
    known = set(map(_digest, others.numpy()))
    found = [place for place, image in enumerate(images.numpy()) if _digest(image) in known]
    return torch.tensor(found, dtype=torch.int64)


def _digest(image: npt.NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def overlap_in_words(store: ImageStore) -> str:
    """Return "10 of 10000 test images stand in train too", with val alike; "" if none does."""
    told = [
        f"{count} of {store.count(name)} {name} images"
        for name in _held_out(store)
        if (count := len(repeated(store.images(name), store.images("train"))))
    ]
    return f"{' and '.join(told)} stand in train too" if told else ""


def _held_out(store: ImageStore) -> list[str]:
    """Return the splits beside train, where there is one."""
    names = [name for name in store.splits if store.count(name)]
    return [name for name in names if name != "train"] if "train" in names else []


@dataclass(frozen=True, kw_only=True)
class ClassGaps:
    """The classes of which only one of two splits has images."""

    split: str
    """The split that is compared with train."""
    classes: int
    untrained: tuple[str, ...]
    """Classes of the split that train lacks."""
    images: int
    """Images of the split that are of these classes."""
    total: int
    """Images of the split that have a class."""
    untested: tuple[str, ...]
    """Classes of train that the split lacks."""

    def __str__(self) -> str:
        told = []
        if self.untrained:
            told.append(
                f"{self.images} of {self.total} {self.split} images are of "
                f"{len(self.untrained)} of {self.classes} classes that no train image has "
                f"({some(self.untrained)})"
            )
        if self.untested:
            told.append(
                f"{len(self.untested)} of {self.classes} classes have train images and no "
                f"{self.split} image ({some(self.untested)})"
            )
        return "; ".join(told)


def class_gaps(store: ImageStore, split: str) -> ClassGaps | None:
    """Compare the classes of a split with those of train; None if each has those of the other.

    Images without labels are not counted; a split of these alone is not compared.
    """
    names, places = store.classes, (_labels(store, "train"), _labels(store, split))
    if not all(map(len, places)):
        return None
    train, held_out = (torch.bincount(labels, minlength=len(names)) for labels in places)
    untrained, untested = (train == 0) & (held_out > 0), (held_out == 0) & (train > 0)
    if not bool((untrained | untested).any()):
        return None
    return ClassGaps(
        split=split,
        classes=len(names),
        untrained=tuple(names[i] for i in untrained.nonzero().flatten().tolist()),
        images=int(held_out[untrained].sum()),
        total=int(held_out.sum()),
        untested=tuple(names[i] for i in untested.nonzero().flatten().tolist()),
    )


def remarks(store: ImageStore) -> tuple[str, ...]:
    """Return a line for what the splits share and should not, and one for each split's classes."""
    found = [class_gaps(store, name) for name in _held_out(store)] if store.has_labels else []
    gaps = [str(gaps) for gaps in found if gaps is not None]
    return tuple(filter(None, (overlap_in_words(store), *gaps)))


def some(names: Sequence[str]) -> str:
    """Return "cat, dog, fox, hen and 3 more"."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _labels(store: ImageStore, split: str) -> Tensor:
    labels = store.labels(split, partly=True)
    return labels[labels != UNLABELLED]
