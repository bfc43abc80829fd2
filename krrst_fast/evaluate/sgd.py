"""The one training loop of the evaluation: SGD or AdamW on batches from seeded permutations."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError


def batches(
    count: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield `steps` index batches [min(batch_size, count)] cut from permutations laid end to end.

    Every batch has the same size (a remainder of one image would break BatchNorm), and every image
    is drawn equally often, give or take one.
    """
    size = min(batch_size, count)
    ahead = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(ahead) < size:
            ahead = torch.cat([ahead, torch.randperm(count, generator=generator)])
        yield ahead[:size]
        ahead = ahead[size:]


def descend(
    parameters: Iterable[Tensor],
    loss_of: Callable[[Tensor], Tensor],
    order: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    cosine: bool = False,
    adam: bool = False,
    what: str,
    tick: Callable[[], object] | None = None,
) -> float:
    """Minimise `loss_of(index)` over the batches of `order`.

    Args:
        parameters: Tensors to train, in place.
        loss_of: Function from a batch of indices [B] to its loss.
        order: Batches of indices, `steps` of them.
        steps: Number of batches, for the decay.
        lr: Learning rate; with `cosine` it falls to 0 over the steps.
        momentum: Momentum of SGD.
        weight_decay: Weight decay, of AdamW the decoupled one.
        cosine: Whether the rate decays.
        adam: Whether to use AdamW, which has no momentum to set, instead of SGD.
        what: Name of the training in errors.
        tick: Function to call after every step.

    Returns:
        The loss of the last batch, before its update.

    Raises:
        NonFiniteError: Training diverged.
    """
    optimizer: torch.optim.Optimizer
    if adam:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
        )
    loss = torch.tensor(0.0)
    for step, index in enumerate(order):
        if cosine:
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tick is not None:
            tick()
    last = float(loss.detach())
    if not math.isfinite(last):
        raise NonFiniteError(
            f"{what}: the loss is {last} after {steps} steps at lr {lr:g}; lower the rate"
        )
    return last
