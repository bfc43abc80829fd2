"""Real images chosen by k-means, herding and k-centre, against their definitions."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast.baselines import herding, k_centre, kmeans, require_kmeans
from krrst_fast.baselines.coresets import herding_index, k_centre_index, kmeans_index
from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.models import ModelConfig, build
from krrst_fast.targets import FrozenTarget

INDICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "kmeans": lambda f, m: kmeans_index(f, m, seed=1),
    "herding": herding_index,
    "k_centre": lambda f, m: k_centre_index(f, m, seed=1),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    out = tmp_path_factory.mktemp("data") / "digits"
    return prepare(PrepareConfig(source="digits", out=out, size=8, limit=60))


@pytest.fixture(scope="module")
def target() -> FrozenTarget:
    config = ModelConfig(widths=(4, 6))
    return FrozenTarget(
        model=build(config, image_size=8, num_outputs=5, seed=1),
        config=config,
        num_outputs=5,
        mean=(0.3, 0.4, 0.5),
        std=(0.2, 0.3, 0.4),
        image_size=8,
    )


def blobs(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows [60, 3] in four clusters far apart, and the cluster of each, shuffled."""
    cluster = torch.arange(60) % 4
    centres = torch.tensor([[0.0, 0, 0], [50, 0, 0], [0, 50, 0], [0, 0, 50]])
    return centres[cluster] + torch.randn(60, 3, generator=generator), cluster


def test_kmeans_takes_the_row_nearest_to_the_mean_of_each_cluster() -> None:
    rows, cluster = blobs(torch.Generator().manual_seed(0))
    chosen = kmeans_index(rows, 4, seed=0).tolist()
    for label in range(4):
        members = (cluster == label).nonzero().flatten()
        away = (rows[members] - rows[members].mean(0)).norm(dim=1)
        assert int(members[away.argmin()]) in chosen


def test_kmeans_without_its_package_says_so_before_anything_is_computed(
    store: ImageStore, target: FrozenTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_kmeans()
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    monkeypatch.setattr(FrozenTarget, "plain", None)  # a call would be an error of another type
    for call in (require_kmeans, lambda: kmeans(store, target, 3, seed=0)):
        with pytest.raises(ConfigError, match=r"^kmeans: needs scikit-learn .*krrst-fast\[data\]"):
            call()


def test_herding_is_greedy_on_the_distance_of_the_means() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen: list[int] = []
    for _ in range(12):
        rest = [i for i in range(40) if i not in chosen]
        gaps = [(rows[[*chosen, i]].mean(0) - rows.mean(0)).norm() for i in rest]
        chosen.append(rest[int(torch.stack(gaps).argmin())])
    assert herding_index(rows, 12).tolist() == chosen


def test_herding_has_a_mean_nearer_to_that_of_all_than_a_random_choice() -> None:
    draw = torch.Generator().manual_seed(2)
    rows = torch.randn(500, 8, generator=draw)
    mean = rows.mean(0)
    herded = (rows[herding_index(rows, 20)].mean(0) - mean).norm()
    drawn = [
        (rows[torch.randperm(500, generator=draw)[:20]].mean(0) - mean).norm() for _ in "12345"
    ]
    assert herded < 0.2 * min(drawn)


def test_k_centre_takes_the_farthest_row_each_time() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    chosen = k_centre_index(rows, 10, seed=5).tolist()
    for n in range(1, 10):
        nearest = torch.cdist(rows, rows[chosen[:n]]).min(1).values
        assert chosen[n] == int(nearest.argmax())


@pytest.mark.parametrize("name", INDICES)
def test_copies_are_chosen_only_once_each(name: str) -> None:
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).repeat(5, 1)
    for count in (1, 4, 15):
        chosen = INDICES[name](rows, count).tolist()
        assert len(chosen) == len(set(chosen)) == count


@pytest.mark.parametrize("choose", [kmeans, herding, k_centre])
def test_sets_are_real_images_with_the_targets_outputs(
    choose: Callable[..., DistilledSet], store: ImageStore, target: FrozenTarget
) -> None:
    chosen = choose(store, target, 12, seed=3)
    assert chosen.images.shape == (12, 3, 8, 8)
    real = {image.numpy().tobytes() for image in store.images("train")}
    pixels = chosen.pixels().permute(0, 3, 1, 2).contiguous()
    assert {image.numpy().tobytes() for image in pixels} <= real
    assert (chosen.targets - target(chosen.images)).abs().max() < 1e-6
    again = choose(store, target, 12, seed=3)
    assert torch.equal(chosen.images, again.images)
    with pytest.raises(DataError, match="61 real images were asked for, .* train split has 60"):
        choose(store, target, 61, seed=3)


def test_seeds_draw_other_images(store: ImageStore, target: FrozenTarget) -> None:
    for choose in (kmeans, k_centre):
        assert not torch.equal(
            choose(store, target, 12, seed=1).images, choose(store, target, 12, seed=2).images
        )
