"""Base class of the networks: a feature map, its dimension, and a linear head called `fc`."""

from abc import ABC, abstractmethod
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


class Network(nn.Module, ABC):
    """A feature map `embed` followed by the head `fc`.

    Attributes:
        feature_dim: D, the number of features `embed` returns.
        channels: The number of input channels.
        image_size: Height and width of the input, or None if any size will do.
        draws: Whether training may draw random numbers, as dropout does.
    """

    draws: ClassVar[bool] = False

    def __init__(self, *, feature_dim: int, channels: int, image_size: int | None) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.channels = channels
        self.image_size = image_size
        self.fc: nn.Module = nn.Identity()

    def set_head(self, num_outputs: int) -> None:
        """Make a new linear head of `num_outputs`, or none if that is 0."""
        self.fc = nn.Linear(self.feature_dim, num_outputs) if num_outputs else nn.Identity()

    def body_state(self) -> dict[str, Tensor]:
        """Return the state of the feature map, which is all but the head."""
        state = self.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("fc.")}

    def embed(self, x: Tensor) -> Tensor:
        """Compute features [B, D] of images [B, C, H, W].

        Raises:
            ValueError: The images have another shape than this network takes.
        """
        size = self.image_size
        square = x.dim() == 4 and (size is None or x.shape[2:] == (size, size))
        if not square or x.shape[1] != self.channels:
            need = f"[B, {self.channels}, {size or 'H'}, {size or 'W'}]"
            raise ValueError(f"{type(self).__name__}: x must be {need}, got {tuple(x.shape)}")
        return self._features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the head: [B, C, H, W] -> [B, P], or [B, D] without a head."""
        return self.fc(self.embed(x))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [B, D] and outputs [B, P] in one pass."""
        features = self.embed(x)
        return features, self.fc(features)

    @abstractmethod
    def _features(self, x: Tensor) -> Tensor:
        """Return the last feature map, [B, C', H', W'] with C' * H' * W' = D."""


def place(network: N, device: torch.device | str, dtype: torch.dtype = torch.float32) -> N:
    """Move a network to `device`, in the memory layout its convolutions are fastest in there.

    On a CPU that is channels innermost, for what PyTorch's modules run there. The values of the
    parameters do not change; results change in their last bits.
    """
    device = torch.device(device)
    # Torch has no such layout of five dimensions.
    is_flat = all(x.dim() <= 4 for x in (*network.parameters(), *network.buffers()))
    on_cpu = device.type == "cpu"
    layout = torch.channels_last if on_cpu and is_flat else torch.contiguous_format
    return network.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
