"""An encoder from elsewhere as a target: it gets its own size and scale of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_fast.errors import ConfigError
from krrst_fast.models import Network

BATCH = {"cpu": 16}
"""Images that the encoder sees at once, 64 on a GPU: they are larger than those of the store, and
on a CPU few of them stay in its caches (EfficientNet-lite0 at 112 px: 1.7 times as fast)."""


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What a target file says of its encoder, so that the same one is opened again."""

    spec: str
    """As `--encoder` takes it; a file of a network is named as the copy beside the target."""
    digest: str
    """Of the weights, or of the file."""
    dim: int
    """D, the features it gives."""
    explained: float
    """The part of their variance that is left in the outputs."""
    input_size: int = 0
    """Of the images it sees; 0 for a table of features."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    """What it wants images normalised by."""


class Encoder(Network):
    """Any module behind the images of a store: features [B, D], and the head `fc` once fitted.

    Args:
        module: Takes [B, 3, S, S] images normalised by its own mean and std.
        dim: D, the features it gives.
        image_size, channels: Of the images of the store.
        mean, std: What the images that come are normalised by; they are turned back to pixels.
        input_size: S.
        input_mean, input_std: What the module wants them normalised by.
        device: Where the module is; a file of ONNX has no weights that say so.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dim: int,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: int,
        input_mean: Sequence[float],
        input_std: Sequence[float],
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(feature_dim=dim, channels=channels, image_size=image_size)
        self.module = module
        self._here: Tensor
        self.register_buffer("_here", torch.empty(0, device=device), persistent=False)
        self.input_size = input_size
        self._scale: dict[str, tuple[float, ...]] = {
            "mean": tuple(mean),
            "std": tuple(std),
            "input_mean": tuple(input_mean),
            "input_std": tuple(input_std),
        }

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of the head alone: the module stays in evaluation mode."""
        # A program of torch.export has no modes, and raises.
        self.training = mode
        self.fc.train(mode)
        return self

    @property
    def device(self) -> torch.device:
        """Return where the images are to be."""
        return self._here.device

    def _features(self, x: Tensor) -> Tensor:
        size = BATCH.get(x.device.type, 64)
        parts = [pooled(self.module(self._seen(part))) for part in x.split(size)]
        features = torch.cat(parts).float()
        if features.shape != (len(x), self.feature_dim):
            raise ConfigError(
                f"encoder: {len(x)} images must give [{len(x)}, {self.feature_dim}] features, "
                f"got {list(features.shape)}"
            )
        return features

    def _seen(self, x: Tensor) -> Tensor:
        """Return images as the module wants them."""

        def column(name: str) -> Tensor:
            return x.new_tensor(self._scale[name]).view(-1, 1, 1)

        pixels = (x * column("std") + column("mean")).contiguous()
        if pixels.shape[-1] != self.input_size:
            size = (self.input_size, self.input_size)
            pixels = F.interpolate(
                pixels, size, mode="bilinear", antialias=True, align_corners=False
            )
        return (pixels - column("input_mean")) / column("input_std")


def pooled(output: object) -> Tensor:
    """Return the features [B, D] in what a module gave.

    Maps [B, D, H, W] and tokens [B, T, D] are averaged. Of the outputs of transformers' models the
    pooled one is taken, else the last hidden state.
    """
    for name in ("pooler_output", "last_hidden_state"):
        if isinstance(output, Tensor):
            break
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        output = output if found is None else found
    if isinstance(output, list | tuple) and len(output) == 1:
        output = output[0]
    if isinstance(output, Tensor) and not output.is_floating_point():
        raise ConfigError(f"encoder: must give floats, got {output.dtype}")
    if not isinstance(output, Tensor) or output.dim() not in (2, 3, 4):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            "encoder: must give one tensor [B, D], [B, T, D] or [B, D, H, W], or an object with "
            f"pooler_output or last_hidden_state, got {got}"
        )
    if output.dim() == 4:
        # [B, D, 1, 1] as well
        return output.mean((2, 3))
    return output.mean(1) if output.dim() == 3 else output


class FeatureTable(nn.Module):
    """Representations of the images of one store, from an encoder that ran elsewhere.

    Args:
        outputs: [N, V, P]: of each image, plain, and mirrored if V is 2.
    """

    def __init__(self, outputs: Tensor, *, channels: int) -> None:
        super().__init__()
        self.outputs: Tensor
        self.register_buffer("outputs", outputs.float().contiguous())
        self.feature_dim, self.channels = outputs.shape[2], channels

    @property
    def mirrored(self) -> bool:
        """Return whether it has features of mirrored images."""
        return self.outputs.shape[1] == 2

    def rows(self, index: Tensor, flip: Tensor | None = None) -> Tensor:
        """Look up the representations [B, P] of images `index` [B], mirrored where `flip` [B]."""
        at = index.to(self.outputs.device)
        view = torch.zeros_like(at) if flip is None else flip.to(at)
        return self.outputs[at, view]

    def forward(self, x: Tensor) -> Tensor:
        """Raise ConfigError: there is no network."""
        raise ConfigError(
            "the target is a table of features: it has outputs for the plain images of its store "
            "only, not for noise, other views or other images"
        )
