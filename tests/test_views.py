"""Random views: the compiled operator against the reference and against a loop, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.data import ViewConfig, draw_views, plain_views
from krrst_fast.errors import ConfigError
from krrst_fast.ops.views import views
from krrst_fast.runs.seeding import generator

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)


def draw(count: int, batch: int, shape: tuple[int, int, int], padding: int) -> tuple[Tensor, ...]:
    g = generator(0, "views", count, batch, *shape, padding)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=g)
    index = torch.randint(count, (batch,), generator=g)
    offset = torch.randint(2 * padding + 1, (batch, 2), generator=g)
    return images, index, offset, torch.randint(2, (batch,), generator=g).bool()


def by_loop(images, index, offset, flip, padding, mean, std) -> np.ndarray:
    """One pixel at a time, from the definition."""
    _, channels, height, width = images.shape
    out = np.empty((len(index), channels, height, width), np.float32)
    for b, c, y, x in np.ndindex(*out.shape):
        row = y + int(offset[b, 0]) - padding
        column = (width - 1 - x if flip[b] else x) + int(offset[b, 1]) - padding
        inside = 0 <= row < height and 0 <= column < width
        level = int(images[index[b], c, row, column]) if inside else 0
        out[b, c, y, x] = (np.float32(level) / np.float32(255) - np.float32(mean[c])) / np.float32(
            std[c]
        )
    return out


SHAPES = [
    (5, 7, (3, 8, 8), 4),
    (1, 3, (1, 1, 1), 0),
    (1, 3, (1, 1, 1), 2),
    (4, 5, (2, 3, 7), 1),
    (4, 5, (3, 7, 3), 5),
    (3, 4, (3, 13, 17), 0),
    (2, 1, (3, 33, 31), 4),
]


@pytest.mark.parametrize(("count", "batch", "shape", "padding"), SHAPES)
def test_the_operator_the_reference_and_a_loop_agree_in_every_bit(count, batch, shape, padding):
    args = draw(count, batch, shape, padding)
    mean, std = MEAN[: shape[0]], STD[: shape[0]]
    got = views(*args, padding=padding, mean=mean, std=std)
    assert got.dtype == torch.float32
    assert torch.equal(got, reference.views(*args, padding, mean, std))
    assert np.array_equal(got.numpy(), by_loop(*args, padding, mean, std))


@pytest.mark.parametrize("corner", [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)])
@pytest.mark.parametrize("flipped", [False, True])
def test_the_extreme_offsets_move_the_image_by_the_padding(corner, flipped):
    images = draw(1, 1, (3, 6, 6), 4)[0]
    got = views(
        images,
        torch.tensor([0]),
        torch.tensor([corner]),
        torch.tensor([flipped]),
        padding=4,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    padded = torch.zeros(3, 14, 14)
    padded[:, 4:10, 4:10] = images[0].float() / 255
    crop = padded[:, corner[0] : corner[0] + 6, corner[1] : corner[1] + 6]
    assert torch.equal(got[0], crop.flip(2) if flipped else crop)


def test_a_batch_may_be_empty_and_may_repeat_an_image():
    images, index, offset, flip = draw(3, 4, (3, 5, 5), 1)
    empty = views(images, index[:0], offset[:0], flip[:0], padding=1, mean=MEAN, std=STD)
    assert empty.shape == (0, 3, 5, 5)
    none = images[:0]
    assert views(none, index[:0], offset[:0], flip[:0], padding=1, mean=MEAN, std=STD).shape == (
        0,
        3,
        5,
        5,
    )
    same = plain_views(images, torch.tensor([2, 2, 0, 2]), MEAN, STD)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[3])
    assert not torch.equal(same[0], same[2])


def test_strided_images_and_draws_give_the_same_views():
    images, index, offset, flip = draw(6, 9, (3, 6, 4), 2)
    expected = reference.views(images, index, offset, flip, 2, MEAN, STD)
    channels_last = images.to(memory_format=torch.channels_last)
    transposed = images.mT.contiguous().mT
    wide = offset.repeat_interleave(2, 1)[:, ::2]
    for source in (channels_last, transposed, torch.cat([images, images], 3)[..., :4]):
        got = views(source, index, wide, flip, padding=2, mean=MEAN, std=STD)
        assert torch.equal(got, expected) and got.is_contiguous()
    twice = torch.stack([index, index], 1)[:, 0]
    assert torch.equal(views(images, twice, offset, flip, padding=2, mean=MEAN, std=STD), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_float32_result_rounded(dtype):
    args = draw(4, 5, (3, 4, 4), 1)
    got = views(*args, padding=1, mean=MEAN, std=STD, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, reference.views(*args, 1, MEAN, STD).to(dtype))


def test_plain_views_are_the_images_normalised():
    images, index, _, _ = draw(4, 6, (3, 5, 5), 0)
    expected = (images[index] / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    assert torch.equal(plain_views(images, index, MEAN, STD), expected)


def test_opcheck():
    args = draw(4, 5, (3, 4, 6), 2)
    torch.library.opcheck(torch.ops.krrst_fast.views.default, (*args, 2, list(MEAN), list(STD)))


def test_the_operator_called_past_the_checks_does_not_read_wildly():
    images, index, offset, flip = draw(4, 5, (3, 4, 6), 2)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("krrst_fast::views", "CPU"):
        pytest.skip("the extension is not built")
    for bad in ((index + 4, offset), (index - 5, offset), (index, offset + 5), (index, offset - 5)):
        with pytest.raises(RuntimeError, match="views: an (index|offset) is not"):
            torch.ops.krrst_fast.views(images, *bad, flip, 2, list(MEAN), list(STD))


def call(**changes):
    images, index, offset, flip = draw(4, 5, (3, 4, 6), 2)
    given = {"images": images, "index": index, "offset": offset, "flip": flip}
    given |= {"padding": 2, "mean": MEAN, "std": STD} | changes
    return views(**given)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(4, 3, 4, 6)}, TypeError, "views: .* uint8.* got float32"),
        ({"index": torch.zeros(5, dtype=torch.int32)}, TypeError, "got uint8, int32, int64"),
        ({"flip": torch.zeros(5, dtype=torch.uint8)}, TypeError, "bool, got .* uint8$"),
        ({"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
        ({"images": torch.zeros(4, 4, 6, dtype=torch.uint8)}, ValueError, r"got \(4, 4, 6\)"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\[B\], got .*\(4,\)"),
        ({"offset": torch.zeros(5, 3, dtype=torch.int64)}, ValueError, r"got .*\(5, 3\)"),
        ({"flip": torch.zeros(5, 1, dtype=torch.bool)}, ValueError, r"got .*\(5, 1\)"),
        ({"padding": -1}, ValueError, "padding must not be negative, got -1"),
        ({"mean": (0.5,)}, ValueError, "each of 3 channels, got 1 and 3"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std above zero, got"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "mean must be finite"),
        ({"index": torch.full((5,), 4)}, ValueError, "index must be from 0 to 3, got 4 to 4"),
        ({"index": torch.full((5,), -1)}, ValueError, "index must be from 0 to 3, got -1 to -1"),
        ({"offset": torch.full((5, 2), 5)}, ValueError, "offset must be from 0 to 4, got 5 to 5"),
        ({"flip": torch.zeros(5, dtype=torch.bool, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_draws_are_reproducible_and_reach_every_view():
    config = ViewConfig(padding=2)
    index = torch.arange(4000)
    view = draw_views(index, config, generator(3, "draw"))
    again = draw_views(index, config, generator(3, "draw"))
    assert all(map(torch.equal, view, again)) and torch.equal(view.index, index)
    offset, flip = view.offset, view.flip
    seen = {(*map(int, corner), bool(f)) for corner, f in zip(offset, flip)}
    assert seen == {(y, x, f) for y in range(5) for x in range(5) for f in (False, True)}
    still = draw_views(index, ViewConfig(padding=0, flip=False), generator(0))
    assert not still.offset.any() and not still.flip.any()
    with pytest.raises(ConfigError, match="padding must be at least 0, got -1"):
        ViewConfig(padding=-1)
