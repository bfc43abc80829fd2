"""Differentiable siamese augmentation (Zhao and Bilen 2021, arXiv 2102.08259).

One transformation is drawn and applied to the synthetic and to the real images, and the gradient of
what is computed of the synthetic ones goes back through it. Every transformation is affine in the
pixels. Outside of an image is zero, which in normalised images is the mean of a channel.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.matching_config import FAMILIES, Family

__all__ = ["FAMILIES", "Augmentation", "Family", "draw_augmentation"]

BRIGHTNESS = 1.0
"""Width of the interval round 0 of what is added to normalised pixels."""
SATURATION = 2.0
"""Largest factor of a pixel's distance to the mean of its channels; the smallest is 0."""
CONTRAST = (0.5, 1.5)
"""Smallest and largest factor of a pixel's distance to the mean of its image."""
CROP = 0.125
"""Largest shift, as a share of the side."""
CUTOUT = 0.5
"""Side of the square that is cut out, as a share of the image's."""
SCALE = 1.2
"""An image becomes at most so many times larger or smaller, each side by itself."""
DEGREES = 15.0
"""Largest rotation."""


@dataclass(frozen=True)
class Augmentation:
    """One family of transformations, with its parameters for all images or for each."""

    family: Family
    parameters: Mapping[str, Tensor]
    """[K] each, on the CPU, by name: K = 1 for all images alike, else one for each image."""

    def __call__(self, images: Tensor) -> Tensor:
        """Transform images [B, C, H, W], differentiably; B = K, or any where K = 1."""
        sent = {
            name: values.to(images.device, images.dtype if values.is_floating_point() else None)
            for name, values in self.parameters.items()
        }
        return _APPLY[self.family](images, **sent)


def draw_augmentation(
    families: Sequence[Family], generator: torch.Generator, *, size: int, count: int = 1
) -> Augmentation:
    """Draw one of the families, and its parameters.

    Args:
        families: At least one.
        generator: A CPU generator.
        size: Height and width of the images.
        count: 1 for parameters that all images share, which is the siamese one; else as many as
            there are images.
    """
    family = families[int(torch.randint(len(families), (), generator=generator))]

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator)

    if family == "color":
        drawn = {
            "brightness": uniform(-BRIGHTNESS / 2, BRIGHTNESS / 2),
            "saturation": uniform(0.0, SATURATION),
            "contrast": uniform(*CONTRAST),
        }
    elif family == "crop":
        most = _share(CROP, size)
        drawn = {"down": whole(-most, most), "right": whole(-most, most)}
    elif family == "cutout":
        # The centre of a square of even side lies between pixels, of which there are one more.
        last = size - _share(CUTOUT, size) % 2
        drawn = {"row": whole(0, last), "column": whole(0, last)}
    elif family == "flip":
        drawn = {"flip": torch.rand(count, generator=generator) < 0.5}
    elif family == "scale":
        # The sampling grid is stretched: 1.2 shows more than the image, which becomes smaller.
        drawn = {"height": uniform(1 / SCALE, SCALE), "width": uniform(1 / SCALE, SCALE)}
    else:
        most_angle = math.radians(DEGREES)
        drawn = {"angle": uniform(-most_angle, most_angle)}
    return Augmentation(family, drawn)


def _share(share: float, size: int) -> int:
    return int(share * size + 0.5)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _color(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    x = x + _each(brightness)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * _each(saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * _each(contrast)


def _crop(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift the images; a row or column that comes from outside is zero."""
    rows = torch.arange(x.shape[2], device=x.device) + down[:, None]  # [K, H]
    columns = torch.arange(x.shape[3], device=x.device) + right[:, None]  # [K, W]
    inside = _within(rows, x.shape[2])[:, :, None] & _within(columns, x.shape[3])[:, None, :]
    image = torch.arange(len(x), device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[
        image, rows.clamp(0, x.shape[2] - 1)[:, :, None], columns.clamp(0, x.shape[3] - 1)[:, None]
    ]
    return moved.permute(0, 3, 1, 2) * inside[:, None]


def _within(place: Tensor, size: int) -> Tensor:
    return (place >= 0) & (place < size)


def _cutout(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Put zero in a square round a centre; it may reach beyond the image."""

    def cut(centre: Tensor, size: int) -> Tensor:
        side = _share(CUTOUT, size)
        first = centre[:, None] - side // 2
        place = torch.arange(size, device=x.device)
        return (place >= first) & (place < first + side)

    gone = cut(row, x.shape[2])[:, :, None] & cut(column, x.shape[3])[:, None, :]
    return x * ~gone[:, None]


def _flip(x: Tensor, flip: Tensor) -> Tensor:
    return torch.where(_each(flip), x.flip(3), x)


def _scale(x: Tensor, height: Tensor, width: Tensor) -> Tensor:
    zero = torch.zeros_like(height)
    return _resample(x, (width, zero, zero, height))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    return _resample(x, (angle.cos(), -angle.sin(), angle.sin(), angle.cos()))


def _resample(x: Tensor, matrix: tuple[Tensor, ...]) -> Tensor:
    """Sample bilinearly where a matrix [[a, b], [c, d]] of coordinates (x, y) leads."""
    a, b, c, d = matrix
    zero = torch.zeros_like(a)
    theta = torch.stack([a, b, zero, c, d, zero], 1).view(-1, 2, 3).expand(len(x), 2, 3)
    grid = functional.affine_grid(theta, list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


_APPLY: Mapping[Family, Callable[..., Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
