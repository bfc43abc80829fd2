"""The siamese augmentation: one draw for both batches, its definition, its gradient, its ranges."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast.baselines.siamese import FAMILIES, Augmentation, Family, draw_augmentation


def images(count: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(
        count, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype
    )


def drawn(family: Family, seed: int = 0, size: int = 8, count: int = 1) -> Augmentation:
    return draw_augmentation([family], torch.Generator().manual_seed(seed), size=size, count=count)


def given(family: Family, **values: float | bool) -> Augmentation:
    return Augmentation(family, {name: torch.tensor([value]) for name, value in values.items()})


@pytest.mark.parametrize("family", FAMILIES)
def test_synthetic_and_real_images_are_transformed_alike(family: Family) -> None:
    synthetic, real = images(2), images(5).flip(0)
    moved = 0
    for seed in range(4):
        augmentation = drawn(family, seed)
        both = augmentation(torch.cat([synthetic, real]))
        assert torch.allclose(both[:2], augmentation(synthetic), atol=1e-6)
        assert torch.allclose(both[2:], augmentation(real), atol=1e-6)
        moved += not torch.equal(both[:2], synthetic)
        assert torch.equal(drawn(family, seed)(synthetic), augmentation(synthetic))
    assert moved > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_with_parameters_for_each_image_they_are_transformed_apart(family: Family) -> None:
    augmentation, x = drawn(family, count=3), images(3)
    together = augmentation(x)
    for i in range(3):
        own = {name: values[i : i + 1] for name, values in augmentation.parameters.items()}
        assert torch.allclose(together[i], Augmentation(family, own)(x[i : i + 1])[0], atol=1e-6)
    assert any(len(set(values.tolist())) > 1 for values in augmentation.parameters.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_goes_back_to_the_images(family: Family) -> None:
    x = images(2, size=4, dtype=torch.float64).requires_grad_(True)
    for count in (1, 2):
        assert torch.autograd.gradcheck(drawn(family, seed=3, size=4, count=count), (x,))


def _rotated(x: Tensor) -> Tensor:
    return x.rot90(1, (2, 3))


def _shifted(x: Tensor) -> Tensor:
    moved = torch.zeros_like(x)
    moved[:, :, :-2, 1:] = x[:, :, 2:, :-1]
    return moved


def _cut(x: Tensor) -> Tensor:
    cut = x.clone()
    cut[:, :, :3, 3:7] = 0
    return cut


def _coloured(x: Tensor) -> Tensor:
    y = x + 0.25
    y = y.mean(1, keepdim=True) * 0.5 + y * 0.5
    return 1.25 * y - 0.25 * y.mean((1, 2, 3), keepdim=True)


DEFINED: list[tuple[Augmentation, Callable[[Tensor], Tensor]]] = [
    (given("color", brightness=0.0, saturation=1.0, contrast=1.0), lambda x: x),
    (given("color", brightness=0.25, saturation=0.5, contrast=1.25), _coloured),
    (given("crop", down=2, right=-1), _shifted),
    (given("cutout", row=1, column=5), _cut),
    (given("flip", flip=True), lambda x: x.flip(3)),
    (given("flip", flip=False), lambda x: x),
    (given("rotate", angle=0.0), lambda x: x),
    (given("rotate", angle=math.pi / 2), _rotated),
    (given("scale", height=1.0, width=1.0), lambda x: x),
    (given("scale", height=-1.0, width=1.0), lambda x: x.flip(2)),
    (given("scale", height=1.0, width=-1.0), lambda x: x.flip(3)),
]


@pytest.mark.parametrize("augmentation, formula", DEFINED, ids=lambda x: getattr(x, "family", ""))
def test_against_the_definition(
    augmentation: Augmentation, formula: Callable[[Tensor], Tensor]
) -> None:
    x = images(dtype=torch.float64)
    # 1e-6: the angle is rounded to float32
    assert (augmentation(x) - formula(x)).abs().max() < 1e-6


def test_scaling_by_two_shows_the_image_at_half_its_size() -> None:
    x = torch.ones(1, 3, 8, 8)
    smaller = given("scale", height=2.0, width=2.0)(x)
    assert torch.equal(smaller[:, :, 2:6, 2:6], torch.ones(1, 3, 4, 4))
    assert float(smaller.sum()) == 3 * 16
    assert float(given("scale", height=0.5, width=0.5)(x).min()) == 1


RANGES = {
    "color": {"brightness": (-0.5, 0.5), "saturation": (0, 2), "contrast": (0.5, 1.5)},
    "crop": {"down": (-4, 4), "right": (-4, 4)},
    "cutout": {"row": (0, 32), "column": (0, 32)},
    "flip": {"flip": (0, 1)},
    "scale": {"height": (1 / 1.2, 1.2), "width": (1 / 1.2, 1.2)},
    "rotate": {"angle": (-math.pi / 12, math.pi / 12)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_fill_the_published_ranges(family: Family) -> None:
    found = drawn(family, size=32, count=2000).parameters
    assert set(found) == set(RANGES[family])
    for name, (low, high) in RANGES[family].items():
        values = found[name].float()
        assert low - 1e-6 <= float(values.min()) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < float(values.max()) <= high + 1e-6
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))
    if len(found) == 2:
        one, other = (values.float() for values in found.values())
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


def test_each_family_is_drawn_as_often() -> None:
    draw = torch.Generator().manual_seed(0)
    names = [draw_augmentation(FAMILIES, draw, size=8).family for _ in range(600)]
    counts = [names.count(family) for family in FAMILIES]
    assert sum(counts) == 600 and min(counts) > 70
