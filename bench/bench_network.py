"""ConvNets on a CPU: features, features with the gradient to the images, and training."""

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench.suite import Case, Comparison, Setting
from krrst_fast.models import ModelConfig, Network, build, place
from krrst_fast.runs.seeding import generator

OUTPUTS = 64


class Shape(NamedTuple):
    """M images of `size` by `size` pixels through a ConvNet of these widths."""

    m: int
    size: int
    widths: tuple[int, ...]


SHAPES = (
    Shape(125, 32, (128, 256, 512)),
    Shape(32, 64, (64, 128, 256, 512)),
    Shape(100, 32, (32, 64, 128)),
    Shape(100, 32, (16, 32, 64)),
)


def network(shape: Shape) -> Network:
    """Make an untrained network, as the library places it."""
    config = ModelConfig(widths=shape.widths)
    net = build(config, image_size=shape.size, num_outputs=OUTPUTS, channels=3, seed=0)
    return place(net, "cpu")


def images(shape: Shape) -> Tensor:
    """Draw images [M, 3, size, size]."""
    size = (shape.m, 3, shape.size, shape.size)
    return torch.randn(size, generator=generator(0, "images"))


def embed(net: Network, x: Tensor) -> Tensor:
    """Compute features as the library does."""
    return net.embed(x)


def embed_by_modules(net: Network, x: Tensor) -> Tensor:
    """Compute features by PyTorch's modules."""
    return net.blocks(x).flatten(1)  # type: ignore[operator]


def flops(shape: Shape) -> float:
    """Count the arithmetic of the convolutions of a forward pass, without shortcuts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(shape).embed(images(shape))
    return counter.get_total_flops()


class Features(Comparison):
    """Features [M, D] of a network at rest, without a graph."""

    against = "PyTorch's modules, channels innermost"
    params = (SHAPES, ("cpp",), ("float32",))
    passes = 1
    """How often the arithmetic of a forward pass is needed."""

    def case(self, shape: Shape, how: Setting) -> Case:
        net, x = self.rested(network(shape)), images(shape)
        exact = copy.deepcopy(net).double()
        return Case(
            ours=partial(self.call, embed, net, x),
            reference=partial(self.call, embed_by_modules, copy.deepcopy(net), x),
            exact=partial(self.call, embed_by_modules, exact, x.double()),
            flops=self.passes * flops(shape),
        )

    def rested(self, net: Network) -> Network:
        """Put a network into the state that is measured."""
        return net.eval().requires_grad_(False)

    @staticmethod
    def call(features, net: Network, x: Tensor) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
        """Make the measured call."""
        with torch.no_grad():
            return (features(net, x),)


class FeaturesWithGradient(Features):
    """The same with a backward pass to the images: the gradient of half the squared norm."""

    passes = 2

    @staticmethod
    def call(features, net: Network, x: Tensor) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
        leaf = x.detach().requires_grad_()
        found = features(net, leaf)
        return (found.detach(), *torch.autograd.grad(found, leaf, found.detach()))


class Training(Features):
    """Mean squared error in training mode, and the gradients of all parameters."""

    passes = 3

    def rested(self, net: Network) -> Network:
        return net.train()

    @staticmethod
    def call(features, net: Network, x: Tensor) -> Sequence[Tensor]:  # type: ignore[no-untyped-def]
        y = torch.randn((len(x), OUTPUTS), generator=generator(0, "targets")).to(x)
        loss = F.mse_loss(net.fc(features(net, x)), y)
        return (loss.detach(), *torch.autograd.grad(loss, list(net.parameters())))
