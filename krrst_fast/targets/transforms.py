"""Image transforms over a batch [B, C, H, W] in [0, 1], with one parameter an image, [B]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from krrst_fast.targets.config import Fill


def warp(x: Tensor, matrix: Tensor, fill: Fill) -> Tensor:
    """Sample square images bilinearly at the output's positions mapped by `matrix` [B, 2, 3].

    Positions run from -1 to 1 between the outer edges of the image, x before y.
    """
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=fill, align_corners=False)


def crop_matrix(
    width: Tensor, height: Tensor, center_x: Tensor, center_y: Tensor, angle: Tensor
) -> Tensor:
    """Return the [B, 2, 3] matrix that fills the output with a rotated rectangle of the image.

    Args:
        width, height: Size of the rectangle, as fractions of the image, [B].
        center_x, center_y: Centre of the rectangle, 0 to 1 from left to right, top to bottom, [B].
        angle: Rotation of the output in radians, [B].
    """
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([width * cos, -width * sin, 2 * center_x - 1], dim=1)
    row_y = torch.stack([height * sin, height * cos, 2 * center_y - 1], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def flip(x: Tensor, where: Tensor) -> Tensor:
    """Mirror left and right the images for which `where` is true."""
    return torch.where(_column(where), x.flip(-1), x)


def luma(x: Tensor) -> Tensor:
    """Compute the luma [B, 1, H, W] of RGB images; of other images the mean of the channels."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply, and clamp to [0, 1]."""
    return (x * _column(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Move away from (towards, below 1) the mean luma of the image, and clamp to [0, 1]."""
    return _blend(x, luma(x).mean(dim=(2, 3), keepdim=True), factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Move away from (towards, below 1) the luma of each pixel, and clamp to [0, 1]."""
    return _blend(x, luma(x), factor)


def greyscale(x: Tensor, where: Tensor) -> Tensor:
    """Replace the channels by the luma in the images for which `where` is true."""
    return torch.where(_column(where), luma(x), x)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images by `turn`, in revolutions (HSV space)."""
    value, minimum = x.amax(dim=1), x.amin(dim=1)
    chroma = value - minimum
    red, green, blue = x.unbind(dim=1)
    safe = chroma.clamp(min=torch.finfo(x.dtype).tiny)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sector = sector + 6 * turn.view(-1, 1, 1)
    # Channel n of HSV is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = n + hue in sixths.
    offsets = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = (offsets + sector[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor, where: Tensor) -> Tensor:
    """Blur the images for which `where` is true; the Gaussian window is a tenth of the image."""
    batch, channels, height, width = x.shape
    radius = max(1, math.ceil(width / 20))
    position = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weight = torch.exp(-0.5 * (position / sigma[:, None]).square())
    weight = (weight / weight.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    planes = F.pad(x, (radius,) * 4, mode="reflect").view(
        1, batch * channels, -1, width + 2 * radius
    )
    planes = F.conv2d(planes, weight[:, None, None, :], groups=batch * channels)
    planes = F.conv2d(planes, weight[:, None, :, None], groups=batch * channels)
    return torch.where(_column(where), planes.view(batch, channels, height, width), x)


def noise(x: Tensor, std: float, seed: int) -> Tensor:
    """Add Gaussian noise drawn on the device of `x`, and clamp to [0, 1]."""
    source = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.randn(x.shape, generator=source, device=x.device, dtype=x.dtype)
    return x.add(drawn, alpha=std).clamp_(0, 1)


def _blend(x: Tensor, anchor: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(anchor, x, _column(factor)).clamp_(0, 1)


def _column(parameter: Tensor) -> Tensor:
    return parameter.view(-1, 1, 1, 1)
