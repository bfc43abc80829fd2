"""Augmented views of a batch, from packed uint8 images."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.suite import Case, Comparison, Setting
from krrst_fast import reference, views
from krrst_fast.seeding import generator

COUNT = 2048
PADDING = 4
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


class Shape(NamedTuple):
    """B images, of `size` by `size` pixels."""

    b: int
    size: int


def listed(call: partial[Tensor]) -> tuple[Tensor]:
    """What a call gives, as a sequence."""
    return (call(),)


def double_views(draw: dict[str, Any]) -> tuple[Tensor]:
    """The views [B, 3, H, W] in float64: the bytes as the reference crops them, normalised here."""
    pixels = reference.views(**draw, padding=PADDING, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = (pixels.double() * 255).round() / 255
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((pixels - mean) / std,)


class Views(Comparison):
    """Crop, flip and normalise in one pass."""

    against = "padding, indexing and arithmetic"
    params = ((Shape(1024, 32), Shape(1024, 64), Shape(256, 8)), ("cpp",), ("float32",))

    def case(self, shape: Shape, how: Setting) -> Case:
        random = generator(0, "views")
        count = max(COUNT, shape.b)
        integers = partial(torch.randint, generator=random)
        draw: dict[str, Any] = {
            "images": integers(256, (count, 3, shape.size, shape.size), dtype=torch.uint8),
            "index": integers(count, (shape.b,)),
            "offset": integers(2 * PADDING + 1, (shape.b, 2)),
            "flip": integers(2, (shape.b,)).bool(),
        }
        draw = {name: x.to(how.device) for name, x in draw.items()}
        options: dict[str, Any] = {"padding": PADDING, "mean": MEAN, "std": STD}
        return Case(
            ours=partial(listed, partial(views, **draw, **options)),
            reference=partial(listed, partial(reference.views, **draw, **options)),
            exact=partial(double_views, draw),
            # A subtraction and a multiplication for each value: the work is in the memory.
            flops=2 * shape.b * 3 * shape.size**2,
        )
