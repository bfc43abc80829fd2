"""Rivals of a distilled set: real images that are chosen, and sets that other methods learn."""

from typing import TYPE_CHECKING

from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.baselines.coresets import herding, k_centre, kmeans, require_kmeans
    from krrst_fast.baselines.random_images import random_subset, random_subset_labels

__all__ = [
    "herding",
    "k_centre",
    "kmeans",
    "random_subset",
    "random_subset_labels",
    "require_kmeans",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.baselines.coresets": ("herding", "k_centre", "kmeans", "require_kmeans"),
        "krrst_fast.baselines.random_images": ("random_subset", "random_subset_labels"),
    },
)
