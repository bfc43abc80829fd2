"""The form that every choice of real images takes: the images with the target's representations."""

from torch import Tensor

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import DataError
from krrst_fast.targets import FrozenTarget


def real_images(
    store: ImageStore, target: FrozenTarget, index: Tensor, *, method: str, seed: int
) -> DistilledSet:
    """Return images `index` [M] of the train split, un-augmented, with their representations.

    Returns:
        Images [M, C, H, W] and targets [M, P], both float32 on the CPU.
    """
    return DistilledSet(
        images=plain_views(store.images("train"), index, target.mean, target.std),
        targets=target.plain(store, index),
        mean=target.mean,
        std=target.std,
        meta={"method": method, "seed": str(seed), "source": str(store.path)},
    )


def require_enough(store: ImageStore, num_images: int) -> None:
    """Raise DataError if the train split has fewer than `num_images` images."""
    count = store.count("train")
    if num_images > count:
        raise DataError(
            f"{store.path}: {num_images} real images were asked for, and the train split has "
            f"{count}"
        )
