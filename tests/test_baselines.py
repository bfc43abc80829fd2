"""Random subsets of real images with the target's representations."""

from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.baselines import random_subset, random_subset_labels
from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.errors import DataError
from krrst_fast.models import ModelConfig, build
from krrst_fast.targets import FrozenTarget


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    out = tmp_path_factory.mktemp("data") / "digits"
    return prepare(PrepareConfig(source="digits", out=out, size=8, limit=60))


def make_target(image_size: int) -> FrozenTarget:
    config = ModelConfig(widths=(4, 6))
    return FrozenTarget(
        model=build(config, image_size=image_size, num_outputs=5, seed=1),
        config=config,
        num_outputs=5,
        mean=(0.3, 0.4, 0.5),
        std=(0.2, 0.3, 0.4),
        image_size=image_size,
    )


def test_images_are_real_normalised_and_drawn_without_replacement(store: ImageStore) -> None:
    target = make_target(8)
    chosen = random_subset(store, target, 40, seed=3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (target.mean, target.std))
    pixels = ((chosen.images * std + mean) * 255).round().to(torch.uint8)
    real = {image.numpy().tobytes() for image in store.images("train")}
    drawn = [image.numpy().tobytes() for image in pixels]
    assert set(drawn) <= real
    assert len(set(drawn)) == 40
    assert (chosen.mean, chosen.std) == (target.mean, target.std)


def test_targets_are_the_networks_outputs(store: ImageStore) -> None:
    target = make_target(8)
    chosen = random_subset(store, target, 10, seed=0)
    want = target.model(chosen.images)
    assert (chosen.targets - want).abs().max() < 1e-6


def test_labels_belong_to_the_images(store: ImageStore) -> None:
    target = make_target(8)
    labels = random_subset_labels(store, 25, seed=7)
    of_image = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(store.images("train"), store.labels("train"))
    }
    pixels = random_subset(store, target, 25, seed=7).pixels().permute(0, 3, 1, 2).contiguous()
    assert [of_image[image.numpy().tobytes()] for image in pixels] == labels.tolist()


def test_the_seed_decides_the_draw(store: ImageStore) -> None:
    target = make_target(8)
    first, again, other = (random_subset(store, target, 12, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)


def test_more_images_than_there_are(store: ImageStore) -> None:
    with pytest.raises(DataError, match="61 real images were asked for, .* train split has 60"):
        random_subset(store, make_target(8), 61, seed=0)


def test_target_of_another_image_size(store: ImageStore) -> None:
    with pytest.raises(DataError, match="the images are 8 px, and the target .* on 16 px"):
        random_subset(store, make_target(16), 5, seed=0)


def test_labels_of_an_unlabelled_store(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((6, 8, 8, 3), np.uint8))
    store = prepare(PrepareConfig(source=str(tmp_path / "x.npz"), out=tmp_path / "store", size=8))
    with pytest.raises(DataError, match="labels are needed"):
        random_subset_labels(store, 2, seed=0)
