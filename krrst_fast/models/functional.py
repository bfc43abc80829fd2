"""Networks as functions of their parameters: for torch.compile, and in half precision.

All networks of an architecture share such a function, so that ten of them, and the fresh ones that
take their places, are compiled once.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from krrst_fast.models.compiled import Compiled
from krrst_fast.models.convnet import ConvNet
from krrst_fast.models.mobilenet import MobileNet
from krrst_fast.models.network import Network
from krrst_fast.models.resnet import ResNet
from krrst_fast.models.stacked import Stacked

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""

BUILT_IN = (ConvNet, ResNet, Stacked, MobileNet)
"""Networks all of whose code is known here; not their subclasses, which are somebody's own."""

_PROBED = 16
"""Pixels of the images that a folded network is tried on, where any size will do."""

_GRADIENT_BITS = 6
"""In half precision the largest gradient by a feature is scaled to nearly 2 to this power.

Layers make gradients smaller or larger by some powers of two. Float16 has 15 above 1 and 24 below.
"""
_SMALLEST_SCALED = -100
"""Gradients below 2 to this power are not scaled up further, as float32 has no such scale."""


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers themselves, not copies."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def is_functional(network: nn.Module) -> bool:
    """Return whether a network can be made a function: it is built in, by its exact class.

    What else is a `Network`, as encoders and the user's own are, may hold any code.
    """
    return type(network) in BUILT_IN


class AtRest:
    """(state, x) -> outputs of a network in evaluation mode, in x's dtype.

    Batch norm is folded into the convolutions, as new weights at each call. The parameters get no
    gradient, x gets its own.

    Args:
        network: Any of the networks that are to share this; it is not changed.
        head: Whether the outputs are those of `fc`, else the features.
        half: Compute in float16, channels innermost, with weights rounded from the state.
        compiles: Compile it, which is done at the first call; a failure costs a warning.

    Raises:
        ValueError: A batch norm does not follow the convolution that is defined before it.
    """

    def __init__(
        self, network: Network, *, head: bool, half: bool = False, compiles: bool = False
    ) -> None:
        self._skeleton, self._norms = _folded_skeleton(network, head)
        _require_same_outputs(network, self._skeleton, self._norms, head)
        self._half = half
        self._function: Any = self._outputs
        if compiles:
            what = f"{type(network).__name__} at rest"
            self._function = Compiled(self._outputs, what)

    def __call__(self, state: State, x: Tensor) -> Tensor:
        """Compute outputs [B, D] of images [B, C, H, W].

        Args:
            state: The `state_of` a network.
            x: The images.
        """
        state = _needed(state, self._skeleton)
        if self._half and x.requires_grad and torch.is_grad_enabled():
            return _scaled(lambda x: self._function(state, x), x)
        return self._function(state, x)

    def _outputs(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = _fold(state, self._norms)
        if not self._half:
            return functional_call(self._skeleton, weights, (x,))
        weights = {name: _halved(value) for name, value in weights.items()}
        return functional_call(self._skeleton, weights, (_halved(x),)).to(x.dtype)


class TrainingLoss:
    """(state, x, y) -> mean((network(x) - y)^2) of a network in training mode.

    Parameters get gradients, running statistics are updated in place in the state.

    Args:
        network: Any of the networks that are to share this; it is not changed.
        half: Compute in float16 with autocast, channels innermost; parameters stay as they are.
        compiles: As of `AtRest`.
    """

    def __init__(self, network: Network, *, half: bool = False, compiles: bool = False) -> None:
        self._skeleton = copy.deepcopy(network).train().to("meta")
        self._half = half
        self._function: Any = self._loss
        if compiles:
            self._function = Compiled(self._loss, f"{type(network).__name__} in training")

    def backward(self, state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Compute the loss, and the gradients of the parameters that require one, which have none.

        Args:
            state: The `state_of` a network.
            x: Images [M, C, H, W].
            y: Targets [M, P].

        Returns:
            The loss, a scalar without a graph.
        """
        scale = self._scale(y)
        loss = self._function(state, x, y)
        # Not autograd.grad: this one lays gradients out in memory as fused optimizers need them.
        (loss * scale).backward()
        if scale != 1:
            gradients = [value.grad for value in state.values() if value.requires_grad]
            torch._foreach_div_([x for x in gradients if x is not None], scale)
        return loss.detach()

    def _scale(self, y: Tensor) -> float:
        """Return a power of two that makes the gradients by the outputs numbers of about 1 / 8.

        They are the errors divided by the number of outputs, which float16 would round to zero.
        """
        return 2.0 ** max(0, y.numel().bit_length() - 5) if self._half else 1.0

    def _loss(self, state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        if not self._half:
            return nn.functional.mse_loss(functional_call(self._skeleton, state, (x,)), y)
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.float16):
            outputs = functional_call(self._skeleton, state, (x,))
        return nn.functional.mse_loss(outputs.to(y.dtype), y)


def _folded_skeleton(network: Network, head: bool) -> tuple[Network, list[tuple[str, str, float]]]:
    """Return the network without batch norms and values, and (convolution, norm, eps) of each.

    Each batch norm is taken to follow the convolution that is defined before it.
    """
    skeleton = copy.deepcopy(network).eval().requires_grad_(False).to("meta")
    if not head:
        skeleton.fc = nn.Identity()
    norms, convolution = [], ""
    for name, module in list(skeleton.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = name
        elif isinstance(module, nn.BatchNorm2d):
            before = skeleton.get_submodule(convolution)
            # A subclass may do more, such as an activation. A norm without numbers folds nothing.
            is_plain = type(module) is nn.BatchNorm2d and module.affine
            if not (is_plain and module.track_running_stats and isinstance(before, nn.Conv2d)):
                raise ValueError(f"AtRest: {name} of {type(network).__name__} {_UNFOLDED}")
            before.bias = nn.Parameter(
                torch.empty(module.num_features, device="meta"), requires_grad=False
            )
            skeleton.set_submodule(name, nn.Identity())
            norms.append((convolution, name, module.eps))
    return skeleton, norms


def _needed(state: State, skeleton: Network) -> dict[str, Tensor]:
    """Return the part of a state that a folded skeleton is called with."""
    has_head = isinstance(skeleton.fc, nn.Linear)
    return {
        name: value
        for name, value in state.items()
        if not name.endswith(".num_batches_tracked") and (has_head or not name.startswith("fc."))
    }


_UNFOLDED = "must be a batch norm that directly follows the convolution defined before it"


@torch.no_grad()
def _require_same_outputs(
    network: Network, skeleton: Network, norms: list[tuple[str, str, float]], head: bool
) -> None:
    """Raise ValueError unless a folded network gives what the network gives.

    Both are tried in float64, with statistics, gains and shifts of which none is trivial.
    """
    if not norms:
        return
    twin = copy.deepcopy(network).eval().to("cpu", torch.float64)
    draw = torch.Generator().manual_seed(0)
    for value in state_of(twin).values():
        if value.dim() == 1:
            # Positive, as variances are; near 1, so that no layer dies or explodes.
            value.copy_(0.75 + 0.5 * torch.rand(value.shape, generator=draw, dtype=torch.float64))
    size = network.image_size or _PROBED
    x = torch.randn(2, network.channels, size, size, generator=draw, dtype=torch.float64)
    exact = twin(x) if head else twin.embed(x)
    try:
        weights = _fold(_needed(state_of(twin), skeleton), norms)
        got = functional_call(skeleton, weights, (x,))
    except (KeyError, RuntimeError):  # of other widths
        got = torch.full_like(exact, torch.nan)
    if not (got - exact).norm() <= 1e-6 * exact.norm():
        names = ", ".join(norm for _, norm, _ in norms)
        raise ValueError(f"AtRest: each of {names} of {type(network).__name__} {_UNFOLDED}")


def _fold(state: State, norms: list[tuple[str, str, float]]) -> dict[str, Tensor]:
    """Return the weights of convolutions that do what they and their batch norms do."""
    weights = dict(state)
    for convolution, norm, eps in norms:
        gain, shift, mean, variance = (
            weights.pop(f"{norm}.{name}")
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        factor = gain * torch.rsqrt(variance + eps)  # [C']
        bias = weights.get(f"{convolution}.bias", 0.0)
        weights[f"{convolution}.weight"] = (
            weights[f"{convolution}.weight"] * factor[:, None, None, None]
        )
        weights[f"{convolution}.bias"] = shift + (bias - mean) * factor
    return weights


def _halved(x: Tensor) -> Tensor:
    layout = torch.channels_last if x.dim() == 4 else torch.preserve_format
    return x.to(torch.float16, memory_format=layout)


def _scaled(function: Any, x: Tensor) -> Tensor:
    """Call a function whose backward pass is in float16, with gradients scaled on their way in.

    The scale is a power of two, so that it rounds nothing, and is not read by the host.
    """
    scale: list[Tensor] = []

    def up(gradient: Tensor) -> Tensor:
        exponent = torch.frexp(gradient.detach().abs().amax()).exponent.clamp(min=_SMALLEST_SCALED)
        scale.append(torch.exp2((_GRADIENT_BITS - exponent).to(gradient.dtype)))
        return gradient * scale[-1]

    x = x.view_as(x)
    x.register_hook(lambda gradient: gradient / scale.pop())
    outputs = function(x)
    outputs.register_hook(up)
    return outputs
