"""DC and DSA: dataset condensation with gradient matching (Zhao, Mopuri and Bilen 2021).

DC is arXiv 2006.05929. DSA (Zhao and Bilen 2021, arXiv 2102.08259) is DC with differentiable
siamese augmentation.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from krrst_fast.baselines.image_learner import ImageLearner
from krrst_fast.baselines.matching_config import DCConfig, DSAConfig
from krrst_fast.models import Network
from krrst_fast.runs.seeding import derive, generator, seeded

_PUBLISHED = ((1, 10, 20, 30, 40, 50), (1, 10, 20, 30, 40, 50), (1, 50, 25, 20, 15, 10))
"""Images per class, updates of the images with a network, and epochs between two updates."""
_TRAIN_BATCH = 256
_TINY = 1e-6
"""Added to the product of two norms, which may be 0."""


def loops(config: DCConfig) -> tuple[int, int]:
    """Return the updates of the images with a network, and its epochs between two of them.

    What the settings leave open is as published, interpolated between the published numbers of
    images per class and constant beyond.
    """
    images, updates, epochs = _PUBLISHED
    found = [round(np.interp(config.images_per_class, images, way)) for way in (updates, epochs)]
    return config.updates or found[0], config.epochs or found[1]


class GradientMatching(ImageLearner):
    """Images on which a network's loss has the gradients that it has on real images.

    A step is: for each class the distance between the gradients of the cross-entropy, by the
    parameters, on its synthetic images and on a batch of its real ones; the sum over classes goes
    down by SGD on the images; then the network is trained on the images. After `updates` steps a
    fresh network takes its place.

    Args:
        config: The settings, of DC or of DSA.
    """

    config: DCConfig

    def __init__(self, config: DCConfig) -> None:
        if isinstance(config, DSAConfig):
            super().__init__(config, method="dsa", augment=config.augment)
        else:
            super().__init__(config, method="dc")
        self._updates, self._epochs = loops(config)
        self._network: Network | None = None

    def advance(self) -> dict[str, float]:
        """Take a step, as `ImageLearner.advance`, and train the network or let it go."""
        row = super().advance()
        if self.step % self._updates == 0:
            self._network = None
        else:
            with seeded(derive(self.config.seed, "training draws", self.step), self.device):
                self._train(self.network())
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors, those of the network too if it is to be used again."""
        network = None if self._network is None else self._network.state_dict()
        return {**super().state_dict(), "network": network}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self._network = None
        if state["network"] is not None:
            self._network = self.fresh_network(self.step // self._updates)
            self._network.load_state_dict(state["network"])

    def network(self) -> Network:
        """Return the network of this step: a fresh one after `updates` steps."""
        if self._network is None:
            self._network = self.fresh_network(self.step // self._updates)
        return self._network

    def distance(self, network: Network, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """Return the distance between the gradients on synthetic and real images of a class."""
        return matching_loss(network, label, synthetic, real)

    def _train(self, network: Network) -> None:
        """Train a network on the images as they are, for the epochs between two updates."""
        optimizer = torch.optim.SGD(network.parameters(), lr=self.config.network_lr)
        draw = generator(self.config.seed, self.method, "training", self.step)
        images = self.images.detach()
        for _ in range(self._epochs):
            order = torch.randperm(len(images), generator=draw).to(self.device)
            for batch in order.split(_TRAIN_BATCH):
                x = images[batch]
                if self._augment:
                    x = self.draw_augmentation(draw, count=len(x))(x)
                loss = functional.cross_entropy(network(x), self.labels[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def matching_loss(network: Network, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
    """Return the distance of gradients of one class, with a graph to the synthetic images.

    Args:
        network: Of its parameters those count that require a gradient.
        label: Of all images.
        synthetic: [M, C, H, W].
        real: [B, C, H, W].
    """
    parameters = [x for x in network.parameters() if x.requires_grad]

    def gradients(images: Tensor, keep: bool) -> tuple[Tensor, ...]:
        labels = torch.full((len(images),), label, device=images.device)
        loss = functional.cross_entropy(network(images), labels)
        return torch.autograd.grad(loss, parameters, create_graph=keep, materialize_grads=True)

    wanted = gradients(real, keep=False)
    return gradient_distance(gradients(synthetic, keep=True), wanted)


def gradient_distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Return the sum of 1 - cosine over the output rows of all weights.

    Args:
        found: Gradients by the parameters. A weight [out, ...] has one row for each output; biases
            and the gains of norms, which have one dimension, do not count.
        wanted: As many, of the same shapes.
    """
    total = found[0].new_zeros(())
    for one, other in zip(found, wanted, strict=True):
        if one.dim() > 1:
            a, b = one.flatten(1), other.flatten(1)  # [out, inputs]
            product = a.norm(dim=1) * b.norm(dim=1)
            total = total + (1 - (a * b).sum(1) / (product + _TINY)).sum()
    return total
