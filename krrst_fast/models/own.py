"""A network of the user's own code, with the interface of the built-in ones."""

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast.errors import ConfigError
from krrst_fast.models.network import Network
from krrst_fast.models.source import NetworkSource

_PROBED = 2


class _Reached(Exception):
    """Raised in place of the layer whose input is the feature."""

    def __init__(self, features: Any) -> None:
        self.features = features


class _Tap(nn.Module):
    """A stand-in for a layer: ends the forward pass with the layer's input."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        raise _Reached(x)


class OwnNetwork(Network):
    """A module of the user's with an `embed`, or with a layer whose input is the feature.

    The module's own forward gives the outputs if the module has an `embed` and was made for a
    number of outputs. Else they are those of a new linear layer on the features.
    """

    draws = True

    def __init__(
        self,
        source: NetworkSource,
        layer: str | None,
        *,
        image_size: int,
        num_outputs: int,
        channels: int,
    ) -> None:
        super().__init__(feature_dim=0, channels=channels, image_size=image_size)
        self._source, self._layer = source, layer
        # Without outputs the head is not called, and a linear layer of none could not be made.
        self.net = source.call(
            image_size=image_size, num_outputs=max(num_outputs, 1), channels=channels
        )
        self._own_forward = False
        if layer is not None:
            self._replace(layer)
        elif _has_embed(source, self.net):
            self._own_forward = num_outputs > 0 and "num_outputs" in source.parameters()
        self.net.eval()
        x = self._probe()
        with torch.no_grad():
            self.feature_dim = self._probe_features(x)
            if self._own_forward:
                self._probe_outputs(x, num_outputs)
            else:
                self.set_head(num_outputs)
        self.net.train()

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [B, P] of images [B, C, H, W], or features [B, D] without a head."""
        return self.net(x) if self._own_forward else self.fc(self.embed(x))

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features [B, D] and outputs [B, P]; twice where the forward is its own."""
        return (self.embed(x), self.net(x)) if self._own_forward else super().both(x)

    def _features(self, x: Tensor) -> Tensor:
        if self._layer is None:
            return self.net.embed(x)  # type: ignore[operator]
        try:
            self.net(x)
        except _Reached as reached:
            return reached.features
        raise ConfigError(f"{self._source.spec}: its forward does not call layer {self._layer!r}")

    def body_state(self) -> dict[str, Tensor]:
        """Return the part of the state that the features depend on."""
        unused = self._unused()
        heads = []
        for name, module in self.named_modules():
            below = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
            if below and below <= unused:
                heads.append(f"{name}.")  # the running statistics of its norms too
        return {
            name: value
            for name, value in self.state_dict().items()
            if name not in unused and not name.startswith(tuple(heads))
        }

    def _probe(self) -> Tensor:
        """Return a few images to try the network on [2, C, H, W]."""
        assert self.image_size is not None
        shape = (_PROBED, self.channels, self.image_size, self.image_size)
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def _unused(self) -> set[str]:
        """Return the names of the parameters that the features do not depend on."""
        named = [(n, p) for n, p in self.named_parameters() if p.is_floating_point()]
        training, flags = self.training, [p.requires_grad for _, p in named]
        self.eval().requires_grad_(True)
        x = self._probe().to(named[0][1])
        with torch.enable_grad():
            total = self.embed(x).sum()
            found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        for (_, parameter), flag in zip(named, flags):
            parameter.requires_grad_(flag)
        self.train(training)
        return {name for (name, _), gradient in zip(named, found) if gradient is None}

    def _replace(self, layer: str) -> None:
        """Put a stand-in into the place of the layer."""
        spec, known = self._source.spec, dict(self.net.named_modules())
        if layer not in known or not layer:
            near = get_close_matches(layer, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            last = next(reversed(known)) or "none"
            raise ConfigError(
                f"{spec}: there is no layer {layer!r} to take the features from (its last layer "
                f"is {last}){hint}"
            )
        parent, _, name = layer.rpartition(".")
        setattr(known[parent], name, _Tap())

    def _probe_features(self, x: Tensor) -> int:
        """Check the features of x and return their number D."""
        spec = self._source.spec
        what = "embed" if self._layer is None else f"the input of layer {self._layer!r}"
        with self._source.running("computing features"):
            features, again, alone = (self._features(part) for part in (x, x, x[:1]))
        if not isinstance(features, Tensor):
            kind = type(features).__name__
            raise ConfigError(f"{spec}: {what} must be a tensor of features, got a {kind}")
        shape = tuple(features.shape)
        if len(shape) not in (2, 4) or shape[0] != len(x) or features.numel() == 0:
            raise ConfigError(
                f"{spec}: {what} must be [B, D] or [B, C, H, W], got {shape} for "
                f"{len(x)} images of {tuple(x.shape[1:])}"
            )
        if features.dtype != x.dtype:
            raise ConfigError(f"{spec}: {what} must be {x.dtype} like x, got {features.dtype}")
        same_shape = isinstance(again, Tensor) and again.shape == features.shape
        if not same_shape or not torch.allclose(features, again, equal_nan=True):
            raise ConfigError(
                f"{spec}: {what} is random in evaluation mode: the same images gave two results "
                "(F.dropout needs training=self.training)"
            )
        size = float(features.detach().abs().max())
        near = isinstance(alone, Tensor) and alone.shape == (1, *shape[1:])
        if not near or not torch.allclose(
            alone, features[:1], rtol=0, atol=1e-3 * size + 1e-6, equal_nan=True
        ):
            raise ConfigError(
                f"{spec}: {what} of an image depends on the other images of its batch in "
                "evaluation mode (track_running_stats=False?)"
            )
        return features[0].numel()

    def _probe_outputs(self, x: Tensor, num_outputs: int) -> None:
        with self._source.running("forward"):
            outputs = self.net(x)
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != (len(x), num_outputs):
            raise ConfigError(
                f"{self._source.spec}: forward must give [B, num_outputs], here "
                f"{(len(x), num_outputs)}, got {got}; without a parameter num_outputs, or with "
                "model.features, a linear layer is put on the features instead"
            )


def _has_embed(source: NetworkSource, net: nn.Module) -> bool:
    """Return True, or raise ConfigError if the module has no method `embed`."""
    found = getattr(net, "embed", None)
    if isinstance(found, nn.Module) or not callable(found):
        got = f"a layer {type(found).__name__} of that name" if found is not None else "none"
        last = next(reversed(dict(net.named_modules()))) or "its last layer"
        raise ConfigError(
            f"{source.spec}: needs a method embed(x) that gives features, got {got}; or name the "
            f"layer whose input they are, as in --model.features {last}"
        )
    return True


def check_own(network: OwnNetwork, twin: OwnNetwork) -> None:
    """Check what a run relies on: fresh networks, equal bits, gradients to images and weights.

    Args:
        network: A network on the device and in the dtype of the run; it is used up.
        twin: One made by the same call, with the same seed.

    Raises:
        ConfigError: Something of it fails.
    """
    source = network._source
    for (name, value), other in zip(network.state_dict().items(), twin.state_dict().values()):
        if value.numel() and value.data_ptr() == other.data_ptr():
            raise ConfigError(
                f"{source.spec}: must make a new network at each call, got the same again"
            )
        if not torch.equal(value.cpu(), other.to(value.dtype).cpu()):
            raise ConfigError(
                f"{source.spec}: {name.removeprefix('net.')} differs between two networks of one "
                "seed; initial values must be drawn by torch's default generator"
            )
    x = network._probe().to(next(network.parameters())).requires_grad_(True)
    with source.running("a training step"):
        network(x.detach()).square().mean().backward()
    if all(parameter.grad is None for parameter in network.parameters()):
        raise ConfigError(f"{source.spec}: no parameter has a gradient, there is nothing to train")
    network.eval().requires_grad_(False)
    with source.running("the gradient by the images"):
        features = network.embed(x)
        if features.requires_grad:
            features.sum().backward()
    if x.grad is None:
        raise ConfigError(
            f"{source.spec}: the features have no gradient by the images (a detach or no_grad?)"
        )
