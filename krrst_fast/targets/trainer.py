"""Everything that a step of self-supervised training reads and changes."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast.data.store import ImageStore
from krrst_fast.errors import NonFiniteError
from krrst_fast.models import build, place
from krrst_fast.runs.epochs import Epochs
from krrst_fast.runs.seeding import derive, generator
from krrst_fast.targets import losses
from krrst_fast.targets.augment import augment_pair
from krrst_fast.targets.config import TargetConfig
from krrst_fast.targets.weights import check_finite

Loss = Callable[[Tensor, Tensor], Tensor]


def make_loss(config: TargetConfig) -> Loss:
    """Return the loss of two views' projections that the settings name."""
    if config.loss == "barlow_twins":
        return partial(losses.barlow_twins, off_diagonal=config.off_diagonal)
    if config.loss == "simclr":
        return partial(losses.nt_xent, temperature=config.temperature)
    return losses.vicreg


def make_projector(inputs: int, widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Build linear layers with batch norm and ReLU between them; the identity without widths."""
    layers = nn.Sequential()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        for i, width in enumerate(widths):
            if i > 0:
                layers.append(nn.BatchNorm1d(inputs)).append(nn.ReLU(inplace=True))
            layers.append(nn.Linear(inputs, width, bias=False))
            inputs = width
    return layers


def learning_rate(config: TargetConfig, step: int) -> float:
    """Return the rate of the step after `step` others: a linear rise, then a cosine down to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """The networks, their optimizer, the random stream, and the number of steps done."""

    def __init__(
        self,
        config: TargetConfig,
        store: ImageStore,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ) -> None:
        self.config, self.device, self.mean, self.std = config, device, mean, std
        self.images = store.images("train")
        self.epochs = Epochs(len(self.images), config.seed, "order")
        self.loss = make_loss(config)
        self.model = build(
            config.model,
            image_size=store.size,
            num_outputs=config.num_outputs,
            seed=derive(config.seed, "model"),
            channels=store.channels,
        )
        self.projector = make_projector(
            config.num_outputs or self.model.feature_dim,
            config.projector,
            derive(config.seed, "projector"),
        )
        place(self.model, device)
        self.projector.to(device)
        self.optimizer = self._make_optimizer()
        self.generator = generator(config.seed, "views")
        self.step = 0

    def _make_optimizer(self) -> torch.optim.AdamW:
        parameters = [*self.model.parameters(), *self.projector.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        decay = self.config.weight_decay
        return torch.optim.AdamW(groups, lr=self.config.lr, weight_decay=decay, fused=True)

    def train_step(self) -> tuple[float, Tensor]:
        """Take one optimizer step.

        Returns:
            The loss, and the representations of the first views, [B, P].

        Raises:
            NonFiniteError: The loss is NaN or infinite; the weights are left as they were.
        """
        index = self.epochs.whole_batch(self.step, self.config.batch_size)
        x1, x2 = augment_pair(
            self.images,
            index,
            self.config.augment,
            self.mean,
            self.std,
            self.generator,
            device=self.device,
        )
        y1, y2 = self.model(x1), self.model(x2)
        loss = self.loss(self.projector(y1), self.projector(y2))
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(
                f"train_target: the loss is {value} at step {self.step + 1}; lower lr "
                f"({self.config.lr:g}) or raise warmup_steps ({self.config.warmup_steps})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return value, y1.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a step depends on.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        for module in (self.model, self.projector):
            check_finite(module.state_dict(), f"train_target: step {self.step}")
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "projector": self.projector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        self.projector.load_state_dict(state["projector"])
        # The optimizer would keep the very tensors of the dict, and change them.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.generator.set_state(state["generator"])
        self.step = state["step"]
