"""ResNet-10, -18 and -50, with the names torchvision gives their parameters."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from krrst_fast.models.blocks import (
    conv_norm_at_rest,
    get_no_gradient,
    is_plain_conv,
    is_plain_norm,
    takes,
)
from krrst_fast.models.config import ResNetKind, Stem
from krrst_fast.models.network import Network


class _Residual(nn.Module, ABC):
    """relu(branch(x) + shortcut(x)); subclasses say what the branch is."""

    downsample: nn.Sequential | None

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    @abstractmethod
    def branch(self, x: Tensor) -> Tensor:
        """Return the term that is added to the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.branch(x) + shortcut)

    def at_rest(self, x: Tensor) -> Tensor:
        """Compute the same from x [N, H, W, C] in evaluation mode, without a graph."""
        shortcut = x
        if self.downsample is not None:
            conv, norm = self.downsample.children()
            assert isinstance(conv, nn.Conv2d)
            shortcut = conv_norm_at_rest(conv, norm, x, relu=False)
        *first, last = self.layers()
        for conv, norm in first:
            x = conv_norm_at_rest(conv, norm, x)
        return conv_norm_at_rest(*last, x, shortcut=shortcut)

    @abstractmethod
    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Return the convolutions of the branch, each with its norm."""


class BasicBlock(_Residual):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__(inputs, planes, stride)
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        # Every block starts as the identity (zero-initialised last norm).
        nn.init.zeros_(self.bn2.weight)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2)]


class Bottleneck(_Residual):
    """1x1, 3x3 (with the stride), 1x1 convolutions; four times as many outputs as planes."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        outputs = planes * self.expansion
        super().__init__(inputs, outputs, stride)
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn3.weight)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        return [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]


class _Plan(NamedTuple):
    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]


PLANS: dict[ResNetKind, _Plan] = {
    "resnet10": _Plan(BasicBlock, (1, 1, 1, 1)),
    "resnet18": _Plan(BasicBlock, (2, 2, 2, 2)),
    "resnet50": _Plan(Bottleneck, (3, 4, 6, 3)),
}


class ResNet(Network):
    """A residual network over images of any size.

    The small stem is that of the targets released with KRR-ST: 3x3, stride 1, padding 2, and no
    max-pool. The imagenet stem is 7x7, stride 2, and a 3x3 max-pool of stride 2.
    """

    def __init__(self, kind: ResNetKind, stem: Stem, *, num_outputs: int, channels: int) -> None:
        block, depths = PLANS[kind]
        super().__init__(feature_dim=512 * block.expansion, channels=channels, image_size=None)
        if stem == "small":
            self.conv1 = nn.Conv2d(channels, 64, 3, padding=2, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _layer(block, 64, 64, depths[0], stride=1)
        self.layer2 = _layer(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = _layer(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = _layer(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.set_head(num_outputs)

    def _features(self, x: Tensor) -> Tensor:
        if self._is_without_graph(x):
            return self._features_at_rest(x)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.avgpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))

    def _is_without_graph(self, x: Tensor) -> bool:
        """Return whether it is at rest and as it was built, and x gets no gradient."""
        if x.requires_grad and torch.is_grad_enabled() or x.numel() == 0:
            return False
        body = [module for name, module in self.named_modules() if name.partition(".")[0] != "fc"]
        return takes(x, *body) and get_no_gradient(body[1:]) and self._is_as_built()

    def _is_as_built(self) -> bool:
        """Return whether nobody has replaced a part by one that does something else."""
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        if any(type(layer) is not nn.Sequential for layer in layers):
            return False
        blocks: list[Any] = [block for layer in layers for block in layer]
        if any(type(block) not in (BasicBlock, Bottleneck) for block in blocks):
            return False
        pairs = [(self.conv1, self.bn1), *(pair for block in blocks for pair in block.layers())]
        shortcuts = [block.downsample for block in blocks if block.downsample is not None]
        pairs += [tuple(shortcut.children()) for shortcut in shortcuts]
        return (
            all(type(part.relu) is nn.ReLU for part in (self, *blocks))
            and all(type(shortcut) is nn.Sequential for shortcut in shortcuts)
            and all(len(pair) == 2 for pair in pairs)
            and all(is_plain_conv(conv) and is_plain_norm(norm) for conv, norm in pairs)
            and type(self.maxpool) in (nn.Identity, nn.MaxPool2d)
            and type(self.avgpool) is nn.AdaptiveAvgPool2d
            and self.avgpool.output_size == 1
        )

    def _features_at_rest(self, x: Tensor) -> Tensor:
        x = conv_norm_at_rest(self.conv1, self.bn1, x.permute(0, 2, 3, 1).contiguous())
        x = self.maxpool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = block.at_rest(x)  # type: ignore[operator]
        return x.mean((1, 2))


def _layer(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, depth: int, *, stride: int
) -> nn.Sequential:
    later = (block(planes * block.expansion, planes, 1) for _ in range(depth - 1))
    return nn.Sequential(block(inputs, planes, stride), *later)
