"""Real images chosen by where they lie among the target's representations of the train split."""

import warnings

import numpy as np
import torch
from torch import Tensor

from krrst_fast.baselines.subset import real_images, require_enough
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError
from krrst_fast.runs.seeding import derive, generator
from krrst_fast.targets import FrozenTarget

_ITERATIONS = 50


def kmeans(
    store: ImageStore,
    target: FrozenTarget,
    num_images: int,
    *,
    seed: int,
    outputs: Tensor | None = None,
) -> DistilledSet:
    """Choose the image nearest to each of M centres of k-means (Lloyd 1982, k-means++ starts).

    Args:
        store: The source images; labels are not looked at.
        target: Gives the representations that are clustered, and those of the result.
        num_images: M.
        seed: Seed of the first centres.
        outputs: The `all_outputs` of both [N, P], if they are known; else they are computed.

    Returns:
        Images [M, C, H, W] and targets [M, P], both float32 on the CPU.

    Raises:
        DataError: The store has fewer images, or others than the target takes.
        ConfigError: scikit-learn is not installed.
    """
    require_kmeans()
    require_enough(store, num_images)
    outputs = all_outputs(store, target) if outputs is None else outputs
    index = kmeans_index(outputs, num_images, seed=seed)
    return real_images(store, target, index, method="kmeans", seed=seed)


def herding(
    store: ImageStore,
    target: FrozenTarget,
    num_images: int,
    *,
    seed: int = 0,
    outputs: Tensor | None = None,
) -> DistilledSet:
    """Choose images one by one so that their mean stays nearest to that of all (Welling 2009).

    As `kmeans`; nothing is drawn, so `seed` only says which rival of an evaluation this is.
    """
    require_enough(store, num_images)
    outputs = all_outputs(store, target) if outputs is None else outputs
    index = herding_index(outputs, num_images)
    return real_images(store, target, index, method="herding", seed=seed)


def k_centre(
    store: ImageStore,
    target: FrozenTarget,
    num_images: int,
    *,
    seed: int,
    outputs: Tensor | None = None,
) -> DistilledSet:
    """Choose a random image, then always the one farthest from those chosen (Gonzalez 1985).

    As `kmeans`; known as k-center greedy (Sener and Savarese 2018).
    """
    require_enough(store, num_images)
    outputs = all_outputs(store, target) if outputs is None else outputs
    index = k_centre_index(outputs, num_images, seed=seed)
    return real_images(store, target, index, method="k_centre", seed=seed)


def require_kmeans() -> None:
    """Raise ConfigError where scikit-learn, which `kmeans` computes with, is not installed."""
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"kmeans: needs scikit-learn ({error}): pip install 'krrst-fast[data]', or leave that "
            "method out"
        ) from None


def kmeans_index(features: Tensor, count: int, *, seed: int) -> Tensor:
    """Return the positions [count] of the rows of `features` [N, P] nearest to k-means centres."""
    from sklearn.cluster import KMeans

    start = derive(seed, "kmeans") % 2**32
    with warnings.catch_warnings():
        # Fewer distinct rows than centres: the empty clusters are filled below.
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        found = KMeans(count, n_init=1, max_iter=_ITERATIONS, random_state=start).fit(
            features.numpy()
        )
    cluster = torch.from_numpy(found.labels_).long()
    centres = torch.from_numpy(found.cluster_centers_).to(features)
    distance = (features - centres[cluster]).square().sum(1).numpy()
    # Sorted by cluster and then by distance, the first of each cluster is its nearest.
    order = np.lexsort((distance, cluster.numpy()))
    _, first = np.unique(cluster.numpy()[order], return_index=True)
    nearest = torch.from_numpy(order[first])
    others = torch.ones(len(features), dtype=torch.bool)
    others[nearest] = False
    return torch.cat([nearest, others.nonzero().flatten()[: count - len(nearest)]])


def herding_index(features: Tensor, count: int) -> Tensor:
    """Return positions [count] of rows of `features` [N, P] whose mean stays near that of all."""
    rows = features.double()
    mean, squares = rows.mean(0), rows.square().sum(1)
    chosen, total = [], torch.zeros_like(mean)
    free = torch.ones(len(rows), dtype=torch.bool)
    for step in range(count):
        # |mean - (total + row) / (step + 1)|^2 without what is the same for every row.
        gap = (step + 1) * mean - total
        distance = (squares - 2 * (rows @ gap)).masked_fill(~free, torch.inf)
        best = int(distance.argmin())
        chosen.append(best)
        free[best] = False
        total += rows[best]
    return torch.tensor(chosen)


def k_centre_index(features: Tensor, count: int, *, seed: int) -> Tensor:
    """Return positions [count] of rows of `features` [N, P], each farthest from those before it."""
    first = int(torch.randint(len(features), (), generator=generator(seed, "k-centre")))
    chosen = [first]
    distance = (features - features[first]).square().sum(1)
    distance[first] = -1
    for _ in range(count - 1):
        best = int(distance.argmax())
        chosen.append(best)
        distance = torch.minimum(distance, (features - features[best]).square().sum(1))
        distance[best] = -1  # chosen rows stay below copies of them, which are at distance 0
    return torch.tensor(chosen)


def all_outputs(store: ImageStore, target: FrozenTarget) -> Tensor:
    """Compute the target's outputs [N, P] on the plain images of the train split, on the CPU."""
    return target.plain(store, torch.arange(store.count("train")))
