"""Contact sheets: the PNG holds the pixels, and says what it leaves out."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.report.contact_sheet import amplified, percent, sheets, tile


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_difference_is_amplified_around_grey() -> None:
    change = np.zeros((1, 10, 10, 3))
    change[0, 0] = -0.02
    change[0, 1] = 0.01
    shown, factor = amplified(change)
    assert factor == 25
    assert shown[0, 0].tolist() == [[0, 0, 0]] * 10
    assert shown[0, 1].tolist() == [[192, 192, 192]] * 10
    assert (shown[0, 2:] == 128).all()
    nothing, factor = amplified(np.zeros((1, 2, 2, 3)))
    assert factor == 1 and (nothing == 128).all()


def test_at_most_a_hundred_images_are_shown() -> None:
    many = DistilledSet(
        images=torch.rand(130, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        targets=torch.zeros(130, 2),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )
    (sheet,) = sheets(None, many)
    assert "first 100 of 130" in sheet.caption and "30 are not shown" in sheet.caption
    # Ten rows of ten images of four pixels and a gap as wide as a pixel, but for the last gap.
    assert sheet.width == sheet.height == 10 * 5 * 15 - 15
    assert (decoded(sheet.uri) == tile(many.pixels()[:100].numpy())).all()


def test_grey_images_are_shown_in_grey() -> None:
    one = DistilledSet(
        images=torch.full((1, 1, 3, 5), 0.2), targets=torch.zeros(1, 2), mean=(0.0,), std=(1.0,)
    )
    (sheet,) = sheets(None, one)
    assert set(decoded(sheet.uri)[..., :3].flatten().tolist()) == {51}
    assert sheet.width * 3 == sheet.height * 5


def test_values_outside_the_range_are_counted() -> None:
    images = torch.full((1, 3, 2, 2), 0.5)
    images[0, 0, 0, 0], images[0, 1, 0, 0], images[0, 2, 0, 0] = -0.1, 1.1, 1.0005
    made = DistilledSet(images=images, targets=torch.zeros(1, 2), mean=(0.0,) * 3, std=(1.0,) * 3)
    (sheet,) = sheets(None, made)
    assert f"{percent(2 / 12)} of the values lie outside" in sheet.caption
    assert decoded(sheet.uri)[0, 0].tolist() == [0, 255, 255, 255]


def test_sets_of_other_shapes_have_no_difference() -> None:
    one, other = (
        DistilledSet(
            images=torch.zeros(count, 3, 2, 2),
            targets=torch.zeros(count, 2),
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        )
        for count in (2, 3)
    )
    assert [sheet.title for sheet in sheets(one, other)] == ["At the start", "Now"]
    assert [sheet.title for sheet in sheets(one, one)][2] == "Difference"
