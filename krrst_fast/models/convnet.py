"""The plain ConvNet of dataset distillation: 3x3 convolutions, each halving the image."""

from collections.abc import Sequence

from torch import Tensor, nn

from krrst_fast.models.blocks import conv_blocks
from krrst_fast.models.config import Norm
from krrst_fast.models.network import Network


class ConvNet(Network):
    """Blocks of conv 3x3 (padding 1) - norm - ReLU - 2x2 average pool, one per width."""

    def __init__(
        self, widths: Sequence[int], norm: Norm, *, image_size: int, num_outputs: int, channels: int
    ) -> None:
        last_size = image_size >> len(widths)
        super().__init__(
            feature_dim=widths[-1] * last_size**2, channels=channels, image_size=image_size
        )
        inputs = (channels, *widths[:-1])
        self.blocks = nn.Sequential(*(_block(i, o, norm) for i, o in zip(inputs, widths)))
        self.set_head(num_outputs)

    def _features(self, x: Tensor) -> Tensor:
        by_kernels = conv_blocks(self.blocks, x)
        return self.blocks(x) if by_kernels is None else by_kernels


def _block(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    # A bias before a norm that subtracts the mean would be a parameter without effect.
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none")
    block = nn.Sequential()
    block.add_module("conv", convolution)
    if norm == "batch":
        block.add_module("norm", nn.BatchNorm2d(outputs))
    elif norm == "instance":
        block.add_module("norm", nn.InstanceNorm2d(outputs, affine=True))
    block.add_module("relu", nn.ReLU(inplace=True))
    block.add_module("pool", nn.AvgPool2d(2))
    return block
