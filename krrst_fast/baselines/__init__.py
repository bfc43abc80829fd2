"""Rivals of a distilled set: each is a function that returns a set of the same size."""

from krrst_fast.baselines.coresets import herding, k_centre, kmeans, require_kmeans
from krrst_fast.baselines.random_subset import random_subset, random_subset_labels

__all__ = [
    "herding",
    "k_centre",
    "kmeans",
    "random_subset",
    "random_subset_labels",
    "require_kmeans",
]
