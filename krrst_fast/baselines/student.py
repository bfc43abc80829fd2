"""A network as a differentiable function of one vector of all its parameters."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from krrst_fast.models import ModelConfig, build

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [B, P], targets) -> the mean loss, a scalar."""


class Student:
    """A built-in network in training mode, without values of its own.

    Batch norms take the statistics of their batch and keep no running ones, so a vector of
    parameters [size] is all that the outputs depend on.

    Args:
        model: The architecture.
        image_size: Height and width of the images.
        num_outputs: P.
        channels: Channels of the images.
        device: Where it computes.

    Attributes:
        size: The number of parameters.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        image_size: int,
        num_outputs: int,
        channels: int,
        device: torch.device,
    ) -> None:
        self.device = device
        self._build = partial(
            build, model, image_size=image_size, num_outputs=num_outputs, channels=channels
        )
        network = self._build(seed=0).train()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        self._shapes = {name: value.shape for name, value in network.named_parameters()}
        self._lengths = [math.prod(shape) for shape in self._shapes.values()]
        self._network = network.to("meta")
        self.size = sum(self._lengths)

    def fresh(self, seed: int) -> Tensor:
        """Return the parameters [size] of an untrained network, on the CPU."""
        return nn.utils.parameters_to_vector(self._build(seed=seed).parameters()).detach()

    def __call__(self, vector: Tensor, x: Tensor) -> Tensor:
        """Compute outputs [B, P] of images [B, C, H, W] with the parameters `vector` [size]."""
        parts = vector.split(self._lengths)
        named = zip(self._shapes.items(), parts)
        parameters = {name: part.view(shape) for (name, shape), part in named}
        return functional_call(self._network, parameters, (x,))

    def unroll(
        self,
        start: Tensor,
        rate: Tensor,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss: Loss,
    ) -> Tensor:
        """Return the parameters [size] after a step of plain SGD on each batch.

        They are differentiable by the images and targets of the batches and by the rate, through
        all steps: the graph holds the activations of every step, forward and backward, until it is
        released. Without gradients, as under torch.no_grad, nothing is held.

        Args:
            start: The parameters at the start, [size].
            rate: Of SGD, a scalar.
            batches: (images [B, C, H, W], targets) of each step.
            loss: What SGD makes smaller.
        """
        differentiable = torch.is_grad_enabled()
        vector = start.detach().requires_grad_()
        for images, targets in batches:
            with torch.enable_grad():
                value = loss(self(vector, images), targets)
                (gradient,) = torch.autograd.grad(value, vector, create_graph=differentiable)
            vector = vector - rate * gradient
            if not differentiable:
                vector.requires_grad_()
        return vector


def distance_ratio(reached: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return |reached - end|^2 / |start - end|^2 of vectors of parameters, the outer loss of MTT.

    1 is a student that is as far from the expert's end as it was at the start.
    """
    return (reached - end).square().sum() / (start - end).square().sum()
