"""Triton's views against the reference, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference

MEAN, STD = (0.5071, 0.4866, 0.4409, 0.1), (0.2673, 0.2564, 0.2762, 0.3)


def draw(count: int, batch: int, shape: tuple[int, int, int], padding: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(count + batch + sum(shape))
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=g)
    index = torch.randint(count, (batch,), generator=g)
    offset = torch.randint(2 * padding + 1, (batch, 2), generator=g)
    return images, index, offset, torch.randint(2, (batch,), generator=g).bool()


def check(kernels: Callable, tensors: tuple[Tensor, ...], padding: int) -> None:
    channels = tensors[0].shape[1]
    arguments = (*tensors, padding, MEAN[:channels], STD[:channels])
    assert torch.equal(kernels("views.views", *arguments), reference.views(*arguments))


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 1), (3, 5, 7), (4, 31, 33), (1, 32, 33)])
def test_views(kernels: Callable, shape: tuple[int, int, int], padding: int) -> None:
    check(kernels, draw(7, 5, shape, padding), padding)


def test_all_bytes_in_all_channels(kernels: Callable) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    check(kernels, (images, *draw(1, 2, (3, 16, 16), 2)[1:]), 2)


def test_any_strides_and_integers(kernels: Callable) -> None:
    images, index, offset, flip = draw(6, 4, (3, 9, 10), 2)
    images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    index = index.int().repeat_interleave(2)[::2]
    offset = offset.mT.contiguous().mT.int()
    check(kernels, (images, index, offset, flip.repeat_interleave(3)[::3]), 2)


def test_an_image_that_is_not_there_is_nan(kernels: Callable) -> None:
    images, _, offset, flip = draw(3, 4, (3, 5, 7), 1)
    index = torch.tensor([2, 3, -1, 0])
    views = kernels("views.views", images, index, offset, flip, 1, MEAN[:3], STD[:3])
    assert views[1:3].isnan().all() and views[[0, 3]].isfinite().all()


@pytest.mark.parametrize("batch", [0, 1])
def test_few(kernels: Callable, batch: int) -> None:
    check(kernels, draw(3, batch, (3, 4, 4), 1), 1)
