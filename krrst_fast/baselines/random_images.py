"""Random real images: the rival every distilled set of the same size must beat."""

import torch
from torch import Tensor

from krrst_fast.baselines.subset import real_images, require_enough
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
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
    return real_images(store, target, index, method="random_subset", seed=seed)


def random_subset_labels(store: ImageStore, num_images: int, *, seed: int) -> Tensor:
    """Return the labels [M] of the images that `random_subset` draws with the same seed.

    Raises:
        DataError: The store has no labels, or fewer images.
    """
    return store.labels("train")[random_index(store, num_images, seed=seed)]


def random_index(store: ImageStore, num_images: int, *, seed: int) -> Tensor:
    """Draw the positions [M] of random images of the train split."""
    require_enough(store, num_images)
    order = torch.randperm(store.count("train"), generator=generator(seed, "random_subset"))
    return order[:num_images]
