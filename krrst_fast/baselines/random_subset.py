"""Random real images: the rival every distilled set of the same size must beat."""

import torch
from torch import Tensor

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError
from krrst_fast.runs.seeding import generator
from krrst_fast.targets import FrozenTarget


def random_subset(
    store: ImageStore, target: FrozenTarget, num_images: int, *, seed: int
) -> DistilledSet:
    """Draw random images of the train split, un-augmented, with the target's representations.

    Args:
        store: The source images; labels are not needed.
        target: Gives the representations, and the mean and std the images are normalised with.
        num_images: M.
        seed: Seed of the draw, which is without replacement.

    Returns:
        Images [M, 3, H, W] and targets [M, P], both float32 on the CPU.

    Raises:
        DataError: The store has fewer images, or images of another size than the target's.
    """
    target.check_store(store)
    index = random_index(store, num_images, seed=seed)
    images = plain_views(store.images("train"), index, target.mean, target.std)
    return DistilledSet(
        images=images,
        targets=target.plain(store, index),
        mean=target.mean,
        std=target.std,
        meta={"method": "random_subset", "seed": str(seed), "source": str(store.path)},
    )


def random_subset_labels(store: ImageStore, num_images: int, *, seed: int) -> Tensor:
    """Return the labels [M] of the images that `random_subset` draws with the same seed.

    Raises:
        DataError: The store has no labels, or fewer images.
    """
    return store.labels("train")[random_index(store, num_images, seed=seed)]


def random_index(store: ImageStore, num_images: int, *, seed: int) -> Tensor:
    """Draw the positions [M] of random images of the train split."""
    count = store.count("train")
    if num_images > count:
        raise DataError(
            f"{store.path}: {num_images} random images were asked for, and the train split has "
            f"{count}"
        )
    return torch.randperm(count, generator=generator(seed, "random_subset"))[:num_images]
