"""Labelled real images class by class, and the label set that is learnt of them."""

import json

import torch
from torch import Tensor

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError
from krrst_fast.exchange.labels import Labels, targets_of


class RealClasses:
    """The train split of a labelled store by class; images leave it normalised by its statistics.

    Args:
        store: The images.
        device: Where batches are made.

    Raises:
        DataError: The store has no labels, or a class no image.
    """

    def __init__(self, store: ImageStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self._images = store.images("train").to(device)
        labels = store.labels("train")
        self.count = len(store.classes)
        self._members = [(labels == label).nonzero().flatten() for label in range(self.count)]
        self.require_images(1)

    def require_images(self, number: int) -> None:
        """Raise DataError, naming a class, unless each class has `number` images."""
        for name, members in zip(self.store.classes, self._members):
            if len(members) < number:
                raise DataError(
                    f"{self.store.path}: {number} images of each class are needed in the train "
                    f"split, and class {name} has {len(members)}"
                )

    def batch(self, label: int, size: int, generator: torch.Generator) -> Tensor:
        """Draw different images of a class: [B, C, H, W] float32, B = size or all there are."""
        members = self._members[label]
        drawn = members[torch.randperm(len(members), generator=generator)[:size]]
        return plain_views(self._images, drawn.to(self.device), self.store.mean, self.store.std)

    def labels_of_set(self, images_per_class: int) -> Tensor:
        """Return the labels [M] of a set whose images are in the order of their classes."""
        return torch.arange(self.count).repeat_interleave(images_per_class)

    def first_images(
        self, images_per_class: int, *, real: bool, generator: torch.Generator
    ) -> Tensor:
        """Return first images [M, C, H, W] in the order of their classes: real ones or noise.

        Raises:
            DataError: Real ones are wanted, and a class has too few.
        """
        if real:
            self.require_images(images_per_class)
            classes = range(self.count)
            return torch.cat([self.batch(c, images_per_class, generator) for c in classes])
        shape = (self.count * images_per_class, *self._images.shape[1:])
        return torch.randn(shape, generator=generator).to(self.device)

    def as_set(self, images: Tensor, labels: Tensor, *, method: str) -> DistilledSet:
        """Return images [M, C, H, W] with labels [M] as one-hot targets, on the CPU.

        `krrst import` stores a set of labels of another project in this form too.
        """
        classes = self.store.classes
        return DistilledSet(
            images=images.detach().cpu().float().clone(),
            targets=targets_of(Labels("class", labels.cpu()), classes),
            mean=self.store.mean,
            std=self.store.std,
            meta={
                "method": method,
                "label_kind": "class",
                "classes": json.dumps(classes),
                "store": self.store.identity(),
            },
        )
