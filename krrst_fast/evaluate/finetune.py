"""Fine-tuning of all weights on labelled images."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast.data.augment import draw_views
from krrst_fast.evaluate.config import FinetuneConfig
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.ops.views import views
from krrst_fast.seeding import generator


def finetune(
    net: nn.Module,
    images: Tensor,
    index: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    tick: Callable[[], object] | None = None,
) -> float:
    """Train all of `net` on random views of the chosen images, in place; leave it in eval mode.

    Args:
        net: [B, 3, H, W] -> [B, classes].
        images: uint8 [N, 3, H, W], on the device of `net`.
        index: The images to train on [L].
        labels: Theirs [L].
        config: Steps, batch size, SGD settings, augmentation.
        mean: Of the normalisation.
        std: Of the normalisation.
        seed: Of the batch order and the views.
        tick: Called after every step.

    Returns:
        The loss of the last step.

    Raises:
        NonFiniteError: training diverged.
    """
    draws, device = generator(seed, "finetune views"), images.device

    def loss_of(batch: Tensor) -> Tensor:
        offset, flip = draw_views(len(batch), config.views, draws)
        x = views(
            images,
            index[batch].to(device),
            offset.to(device),
            flip.to(device),
            padding=config.views.padding,
            mean=mean,
            std=std,
        )
        return F.cross_entropy(net(x), labels[batch].to(device))

    net.train()
    loss = descend(
        net.parameters(),
        loss_of,
        batches(len(index), config.batch_size, config.steps, generator(seed, "finetune")),
        steps=config.steps,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        cosine=True,
        what="finetune",
        tick=tick,
    )
    net.eval()
    return loss
