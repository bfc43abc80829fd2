"""How the networks of a run compute: dtype, half precision, torch.compile, TF32."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.data.augment import View
from krrst_fast.distill.config import DistillConfig
from krrst_fast.models import Network
from krrst_fast.models.functional import AtRest, TrainingLoss, is_functional, state_of
from krrst_fast.targets import FrozenTarget


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How built-in networks compute.

    By default they run as they are. Else batch norm at rest is folded into the convolutions.
    """

    half: bool = False
    """In float16, channels innermost; parameters, images and the KRR loss stay in float32."""
    compiles: bool = False
    """By torch.compile."""

    @property
    def is_plain(self) -> bool:
        """Return whether networks run as they are."""
        return not (self.half or self.compiles)

    def __str__(self) -> str:
        if self.is_plain:
            return "plain PyTorch"
        precision = "float16" if self.half else "float32"
        return f"{'torch.compile' if self.compiles else 'PyTorch'} in {precision}"

    def at_rest(self, network: Network, *, head: bool) -> AtRest | None:
        """Return the function of networks like this one in evaluation mode, None for the plain one.

        The user's own networks are plain ones.
        """
        if self.is_plain or not is_functional(network):
            return None
        return AtRest(network, head=head, half=self.half, compiles=self.compiles)

    def training(self, network: Network) -> TrainingLoss | None:
        """Return the loss of networks like this one in training mode, None for the plain one."""
        if self.is_plain or not is_functional(network):
            return None
        return TrainingLoss(network, half=self.half, compiles=self.compiles)


PLAIN = Arithmetic()


def arithmetic(config: DistillConfig, device: torch.device) -> Arithmetic:
    """Return how the networks of a run compute on a device: compiled on GPUs, but for float64.

    Torch's own switch for the whole process, TORCH_COMPILE_DISABLE=1, is followed.
    """
    wanted = config.dtype != "float64" and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
    compiles = device.type == "cuda" and wanted
    return Arithmetic(half=config.dtype == "float16", compiles=compiles)


def storage(config: DistillConfig) -> torch.dtype:
    """Return the dtype of images, parameters and losses."""
    return torch.float64 if config.dtype == "float64" else torch.float32


class FastTarget:
    """The outputs of a target [B, C, H, W] -> [B, P], in the arithmetic of a run.

    Args:
        target: On its device; encoders, and all targets in plain arithmetic, run as they are.
        arithmetic: That of the run.
    """

    def __init__(self, target: FrozenTarget, arithmetic: Arithmetic) -> None:
        self._target = target
        self._function = None
        if isinstance(target.model, Network):
            self._function = arithmetic.at_rest(target.model, head=True)
        self._state = state_of(target.model)
        self._fills_up, self._size = arithmetic.compiles, 0

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Compute the outputs of normalised images, which the target takes in float32."""
        x, count = x.float(), len(x)
        if self._function is None:
            return self._target(x)
        if self._fills_up and count < self._size:
            # The last chunk of many, which would be compiled anew for its size.
            x = torch.cat([x, x.new_zeros(self._size - count, *x.shape[1:])])
        self._size = max(self._size, count)
        return self._function(self._state, x)[:count]


class RunTarget:
    """The outputs of a target on every batch anew (a `Represent` function).

    Args:
        target: On its device; those of a table of features are looked up in it.
        run: The target in the arithmetic of the run.
    """

    def __init__(self, target: FrozenTarget, run: FastTarget) -> None:
        self._table, self._run = target.table, run
        self._is_built_in = is_functional(target.model)

    @property
    def is_known(self) -> bool:
        """Whether all its code is the library's: a built-in network, or a table."""
        return self._table is not None or self._is_built_in

    def find(self, view: View) -> Tensor:
        """Return images and flips [B, 2] for a table, and else nothing, [B, 0]."""
        parts = [] if self._table is None else [view.index, view.flip.long()]
        return torch.stack(parts, 1) if parts else view.index.new_empty(len(view.index), 0)

    def __call__(self, found: Tensor, batch: Tensor) -> Tensor:
        """Return the outputs [B, P] on views [B, C, H, W]."""
        return self._run(batch) if self._table is None else self._table.rows(*found.unbind(1))


def environment_of(
    config: DistillConfig, device: torch.device, outputs: str | None
) -> dict[str, str]:
    """Return what the environment of a run records beside versions and hardware.

    Convolutions are named where torch may round them to TF32, by its switch as it is now.

    Args:
        config: Settings of the run.
        device: Its device.
        outputs: How the target's outputs are kept; None if the target runs at every step.
    """
    named = {"networks": str(arithmetic(config, device))}
    named["target"] = outputs or "run at every step"
    if device.type == "cuda" and config.dtype != "float64":
        rounds = torch.backends.cudnn.allow_tf32
        named["convolutions"] = "in TF32" if rounds else "in float32"
    return named


@contextmanager
def convolutions(*, tf32: bool) -> Iterator[None]:
    """Keep the convolutions of a GPU from rounding to TF32, or leave the switch as it is."""
    if tf32:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
