"""Knowledge distillation without the labelled images, as the paper's application of its sets.

The protocol of the released code (zeroshot_kd.py, test_kd.py): a ResNet18 trained on the labelled
images teaches a student that was pre-trained on a distilled set, on the images of that set under
differentiable augmentation, by the cross-entropy of the outputs at temperature 1 (AdamW, rate 1e-4,
cosine decay). A student without pre-training learns on Gaussian noise, drawn anew in each step, at
rate 1e-3. One thing differs: the released code teaches and measures with batch statistics, so that
the answer for an image depends on those beside it. Here the teacher teaches, and both are measured,
with running statistics.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from krrst_fast.baselines.matching_config import FAMILIES
from krrst_fast.baselines.siamese import draw_augmentation
from krrst_fast.errors import NonFiniteError
from krrst_fast.evaluate.config import FinetuneConfig, KDConfig
from krrst_fast.evaluate.finetune import finetune
from krrst_fast.evaluate.materials import Split
from krrst_fast.evaluate.probe import accuracy, in_chunks
from krrst_fast.evaluate.sgd import batches, descend
from krrst_fast.models import Network
from krrst_fast.runs.seeding import derive, generator, seeded


def train_teacher(
    net: Network,
    train: Split,
    config: KDConfig,
    training: FinetuneConfig,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seed: int,
    tick: Callable[[], object] | None = None,
) -> None:
    """Train a fresh network on all labelled images by cross-entropy, in place; freeze it.

    Args:
        net: Network that maps images [B, C, H, W] to class scores [B, classes].
        train: The labelled images.
        config: Its steps and rate.
        training: Everything else: batch size, momentum, weight decay and views of fine-tuning.
        mean: Channel means that normalise the images.
        std: Channel standard deviations that normalise the images.
        seed: Seed of the batch order and the views.
        tick: Function to call after every step.

    Raises:
        NonFiniteError: Training diverged.
    """
    try:
        finetune(
            net,
            train.images,
            torch.arange(len(train.labels)),
            train.labels,
            replace(training, steps=config.teacher_steps),
            rate=config.teacher_lr,
            mean=mean,
            std=std,
            seed=seed,
            tick=tick,
        )
    except NonFiniteError as error:
        raise NonFiniteError(f"kd: the teacher: {error}") from None
    net.requires_grad_(False)


def distil_knowledge(
    student: Network,
    teacher: Network,
    images: Tensor,
    config: KDConfig,
    *,
    noise: bool = False,
    scale: tuple[Tensor, Tensor] | None = None,
    seed: int,
    tick: Callable[[], object] | None = None,
) -> float:
    """Train `student` to give the teacher's outputs, in place; leave it in eval mode.

    Args:
        student: Network that maps images [B, C, H, W] to class scores [B, classes].
        teacher: Another with as many classes, frozen, in eval mode.
        images: Normalised images [M, C, H, W], which both see under the same augmentation, each
            image by its own parameters and all of a batch by one family.
        config: Steps, batch size and rates.
        noise: Whether to show standard normal noise of that shape instead.
        scale: What the images are multiplied by, and then what is added, for the teacher, each
            [C, 1, 1]; None where it takes them as they are.
        seed: Seed of the batch order, the augmentation, the noise and dropout.
        tick: Function to call after every step.

    Returns:
        The loss of the last step: the cross-entropy of the student's to the teacher's outputs.

    Raises:
        NonFiniteError: Training diverged.
    """
    draws, device = generator(seed, "kd views"), images.device

    def loss_of(index: Tensor) -> Tensor:
        shape = (len(index), *images.shape[1:])
        if noise:
            x = torch.randn(shape, generator=draws).to(device)
        else:
            drawn = draw_augmentation(FAMILIES, draws, size=shape[-1], count=len(index))
            x = drawn(images[index.to(device)])
        with torch.no_grad():
            shown = x if scale is None or noise else x * scale[0] + scale[1]
            wanted = teacher(shown).softmax(1)
        return F.cross_entropy(student(x), wanted)

    student.train()
    # Dropout draws from the default generators.
    with seeded(derive(seed, "kd dropout"), device):
        loss = descend(
            student.parameters(),
            loss_of,
            batches(len(images), config.batch_size, config.steps, generator(seed, "kd")),
            steps=config.steps,
            lr=config.noise_lr if noise else config.lr,
            cosine=True,
            adam=True,
            what="kd",
            tick=tick,
        )
    student.eval()
    return loss


def measured(
    net: Network, split: Split, *, mean: tuple[float, ...], std: tuple[float, ...]
) -> float:
    """Return the accuracy of a network in per cent of the images of a split.

    Raises:
        NonFiniteError: Its outputs are not finite.
    """
    everything = torch.arange(len(split.labels))
    scores = in_chunks(net, split.images, everything, mean=mean, std=std)
    if not bool(torch.isfinite(scores).all()):
        raise NonFiniteError("kd: the network gives NaN or infinity")
    return accuracy(scores.cpu(), split.labels)
