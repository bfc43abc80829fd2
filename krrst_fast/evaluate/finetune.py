"""Fine-tuning of all weights on labelled images."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast.data.augment import draw_views, render
from krrst_fast.evaluate.config import FinetuneConfig
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.runs.seeding import derive, generator, seeded


def finetune(
    net: nn.Module,
    images: Tensor,
    index: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    rate: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    tick: Callable[[], object] | None = None,
) -> float:
    """Train all of `net` on random views of the chosen images, in place; leave it in eval mode.

    Args:
        net: Network that maps images [B, 3, H, W] to class scores [B, classes].
        images: All images, uint8 [N, 3, H, W], on the device of `net`.
        index: Positions of the images to train on, int64 [L].
        labels: Labels of these images, int64 [L].
        config: Steps, batch size, SGD settings, augmentation.
        rate: Rate at the start, one of those of `config`.
        mean: Channel means that normalise the images.
        std: Channel standard deviations that normalise the images.
        seed: Seed of the batch order and the views.
        tick: Function to call after every step.

    Returns:
        The loss of the last step.

    Raises:
        NonFiniteError: Training diverged.
    """
    draws, device = generator(seed, "finetune views"), images.device

    def loss_of(batch: Tensor) -> Tensor:
        x = render(
            images,
            draw_views(index[batch].to(device), config.views, draws),
            padding=config.views.padding,
            mean=mean,
            std=std,
        )
        return F.cross_entropy(net(x), labels[batch].to(device))

    net.train()
    # Dropout draws from the default generators.
    with seeded(derive(seed, "finetune dropout"), device):
        loss = descend(
            net.parameters(),
            loss_of,
            batches(len(index), config.batch_size, config.steps, generator(seed, "finetune")),
            steps=config.steps,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            cosine=True,
            what="finetune",
            tick=tick,
        )
    net.eval()
    return loss
