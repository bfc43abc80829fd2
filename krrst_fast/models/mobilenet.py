"""MobileNetV2 for small images, with the shapes and names of the network of KRR-ST."""

from typing import NamedTuple

from torch import Tensor, nn

from krrst_fast.models.network import Network

_STEM, _LAST = 32, 1280


class _Stage(NamedTuple):
    expansion: int
    outputs: int
    depth: int
    stride: int
    """Of its first block; the others have 1."""


# Twofold expansion in place of MobileNetV2's sixfold, and an image that is halved twice.
STAGES = (
    _Stage(1, 16, 1, 1),
    _Stage(2, 24, 2, 1),
    _Stage(2, 32, 3, 2),
    _Stage(2, 64, 4, 2),
    _Stage(2, 96, 3, 1),
    _Stage(2, 160, 3, 2),
    _Stage(2, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 (wider), 3x3 on each channel (with the stride), 1x1 (narrower, no ReLU).

    Blocks of stride 1 add their input, through a 1x1 convolution where the channels change.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.conv1 = nn.Conv2d(inputs, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.adds_input = stride == 1
        self.shortcut = nn.Sequential()
        if self.adds_input and inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.adds_input else y


class MobileNet(Network):
    """Inverted residuals over images of any size, then the mean over the image."""

    def __init__(self, *, num_outputs: int, channels: int) -> None:
        super().__init__(feature_dim=_LAST, channels=channels, image_size=None)
        self.conv1 = nn.Conv2d(channels, _STEM, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.layers = nn.Sequential()
        inputs = _STEM
        for expansion, outputs, depth, stride in STAGES:
            for block in range(depth):
                step = stride if block == 0 else 1
                self.layers.append(InvertedResidual(inputs, outputs, expansion, step))
                inputs = outputs
        self.conv2 = nn.Conv2d(inputs, _LAST, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(_LAST)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.set_head(num_outputs)

    def _features(self, x: Tensor) -> Tensor:
        x = self.layers(self.relu(self.bn1(self.conv1(x))))
        return self.avgpool(self.relu(self.bn2(self.conv2(x))))
