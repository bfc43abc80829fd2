"""What KIP and FRePo have in common: centred labels, and the set that comes of them."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.labelled import RealClasses
from krrst_fast.baselines.regression_config import RegressionConfig
from krrst_fast.data.augment import View, ViewConfig
from krrst_fast.data.store import open_store
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.distill.source import Source
from krrst_fast.runs.environment import pick_device
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.seeding import generator


def centred(labels: Tensor, count: int) -> Tensor:
    """Return one-hot rows [N, count] of labels [N], less 1 / count, so that each row sums to 0."""
    return functional.one_hot(labels, count).float() - 1 / count


class _Labels:
    """Targets of images as what represents their views (a `Represent` function)."""

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets

    def find(self, view: View) -> Tensor:
        """Return the images [B]."""
        return view.index

    def __call__(self, found: Tensor, batch: Tensor) -> Tensor:
        """Return the targets [B, classes]."""
        return self._targets[found]


class LabelTask:
    """The labels of a store as the targets of a regression, and the first synthetic set for it.

    Args:
        config: The settings.
        method: What the set says that it was made by.

    Attributes:
        device: Of all tensors below.
        first_images: Random real ones [M, C, H, W], normalised, in the order of their classes.
        first_targets: Their centred one-hot labels [M, classes].
        source: Draws normalised real images, not augmented, with their centred labels.

    Raises:
        DataError: The store cannot be read, is not labelled, or a class has too few images.
        ConfigError: There is no such device.
    """

    def __init__(self, config: RegressionConfig, *, method: str) -> None:
        self.config, self.method = config, method
        self.device = pick_device(config.device)
        self.store = open_store(config.store)
        # The images are on the device once, in the source.
        self._real = RealClasses(self.store, torch.device("cpu"))
        count = self._real.count
        self.first_images = self._real.first_images(
            config.images_per_class, real=True, generator=generator(config.seed, "initial")
        ).to(self.device)
        self._labels = self._real.labels_of_set(config.images_per_class)
        self.first_targets = centred(self._labels, count).to(self.device)
        real_targets = centred(self.store.labels("train"), count).to(self.device)
        images = self.store.images("train").to(self.device)
        self.source = Source(
            images=images,
            mean=self.store.mean,
            std=self.store.std,
            view=ViewConfig(padding=0, flip=False),
            represent=_Labels(real_targets),
            epochs=Epochs(len(images), config.seed),
            batch_size=config.batch_size,
        )

    def as_set(self, images: Tensor, targets: Tensor) -> DistilledSet:
        """Return the set on the CPU: with one-hot targets, or with `targets` where they are learnt.

        Args:
            images: [M, C, H, W].
            targets: [M, classes].
        """
        made = self._real.as_set(images, self._labels, method=self.method)
        if not self.config.learn_labels:
            return made
        soft = targets.detach().cpu().float().clone()
        return replace(made, targets=soft, meta={**made.meta, "label_kind": "soft"})
