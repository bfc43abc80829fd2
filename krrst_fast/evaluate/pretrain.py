"""Pre-training of a fresh network on a few images, in place."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast.evaluate.config import PretrainConfig
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.models import Network
from krrst_fast.models.rate import stable_rate
from krrst_fast.runs.seeding import derive, generator, seeded


def pretrain(
    net: nn.Module,
    images: Tensor,
    targets: Tensor,
    config: PretrainConfig,
    *,
    seed: int,
    rate: float | None = None,
    tick: Callable[[], object] | None = None,
) -> float:
    """Train `net` to give each image's target representation, by mean squared error.

    Args:
        net: Network that maps [B, 3, H, W] to [B, P]; left in eval mode with the running BatchNorm
            statistics of the images.
        images: Normalised images [M, 3, H, W].
        targets: Target representations [M, P].
        config: Steps, batch size and SGD settings.
        seed: Seed of the batch order.
        rate: Rate of SGD; left out it is `pretraining_rate`.
        tick: Function to call after every step.

    Returns:
        The loss of the last step.

    Raises:
        NonFiniteError: Training diverged.
    """

    def loss_of(index: Tensor) -> Tensor:
        return F.mse_loss(net(images[index]), targets[index])

    if rate is None:
        rate = pretraining_rate(net, images, targets, config)
    return _fit(net, loss_of, len(images), config, rate, config.weight_decay, seed, tick)


def pretraining_rate(
    net: nn.Module, images: Tensor, targets: Tensor, config: PretrainConfig
) -> float:
    """Return `config.lr`, or a lower one that the head of a network can bear: `stable_rate`."""
    if not isinstance(net, Network):
        return config.lr
    return stable_rate(
        net, images, num_outputs=targets.shape[1], rate=config.lr, momentum=config.momentum
    )


def pretrain_labels(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: PretrainConfig,
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
) -> float:
    """Train `net` [B, 3, H, W] -> [B, classes] on labels [M] by cross-entropy; else as `pretrain`.

    The steps and the batch order are those of `pretrain`, the rate and the weight decay are
    `config.label_lr` and `config.label_weight_decay`.
    """

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(net(images[index]), labels[index])

    rate, decay = config.label_lr, config.label_weight_decay
    return _fit(net, loss_of, len(images), config, rate, decay, seed, tick)


def settle_norms(net: nn.Module, images: Tensor) -> None:
    """Set the running BatchNorm statistics of `net` to those of `images` [M, 3, H, W]; eval mode.

    For the network without pre-training: with its initial statistics a probe on it would measure
    the missing normalisation (digits: 3 points of accuracy) along with the missing training.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            # None averages over all batches, here the one.
            module.momentum = None
    net.train()
    with torch.no_grad(), seeded(0, images.device):
        net(images)
    net.eval()


def _fit(
    net: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    config: PretrainConfig,
    lr: float,
    weight_decay: float,
    seed: int,
    tick: Callable[[], object] | None,
) -> float:
    net.train()
    # Dropout draws from the default generators.
    with seeded(derive(seed, "pretrain dropout"), next(net.parameters()).device):
        loss = descend(
            net.parameters(),
            loss_of,
            batches(count, config.batch_size, config.steps, generator(seed, "pretrain")),
            steps=config.steps,
            lr=lr,
            momentum=config.momentum,
            weight_decay=weight_decay,
            what="pretrain",
            tick=tick,
        )
    net.eval()
    return loss
