"""VGG-11 and AlexNet for small images, with the shapes and names of the networks of KRR-ST."""

from typing import NamedTuple

from torch import Tensor, nn

from krrst_fast.models.config import StackedKind
from krrst_fast.models.network import Network


class _Layer(NamedTuple):
    """A convolution that keeps the size of the image, and what follows its norm and ReLU."""

    outputs: int
    kernel: int
    pooled: bool


PLANS: dict[StackedKind, tuple[_Layer, ...]] = {
    "vgg11": (
        _Layer(64, 3, True),
        _Layer(128, 3, True),
        _Layer(256, 3, False),
        _Layer(256, 3, True),
        _Layer(512, 3, False),
        _Layer(512, 3, True),
        _Layer(512, 3, False),
        _Layer(512, 3, True),
    ),
    "alexnet": (
        _Layer(128, 5, True),
        _Layer(192, 5, True),
        _Layer(256, 3, False),
        _Layer(192, 3, False),
        _Layer(192, 3, True),
    ),
}


def halvings(kind: StackedKind) -> int:
    """Return how often the network halves the image."""
    return sum(layer.pooled for layer in PLANS[kind])


class Stacked(Network):
    """Convolutions, each with batch norm and ReLU, and 2x2 max-pools between some of them."""

    def __init__(
        self, kind: StackedKind, *, image_size: int, num_outputs: int, channels: int
    ) -> None:
        plan = PLANS[kind]
        last_size = image_size >> halvings(kind)
        super().__init__(
            feature_dim=plan[-1].outputs * last_size**2, channels=channels, image_size=image_size
        )
        self.features = nn.Sequential()
        inputs = channels
        for outputs, kernel, pooled in plan:
            # The bias has no effect before a batch norm; the released weights have one.
            self.features.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
            self.features.append(nn.BatchNorm2d(outputs)).append(nn.ReLU(inplace=True))
            if pooled:
                self.features.append(nn.MaxPool2d(2))
            inputs = outputs
        self.set_head(num_outputs)

    def _features(self, x: Tensor) -> Tensor:
        return self.features(x)
