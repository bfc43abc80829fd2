"""The fast path of built-in networks on a CPU: their 3x3 convolutions by the library's kernels.

At rest a batch norm is folded into the filters, a block of the ConvNet (convolution, ReLU, 2x2
average) is one operator, and the backward pass to the images needs four bits for each pooled pixel
instead of the activations. Training is in `training`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast.convolutions import HAS_EXTENSION, OPS
from krrst_fast.models.training import trained
from krrst_fast.reference import conv as reference


def takes(x: Tensor, *modules: nn.Module) -> bool:
    """Return whether the kernels can run convolutions and norms on x: float32 on a CPU.

    Who traces, transforms, counts or hooks PyTorch's operators and modules is to see these.
    """
    tensors = [x]
    for module in modules:
        names = ("weight", "bias", "running_mean", "running_var")
        tensors += [t for name in names if (t := getattr(module, name, None)) is not None]
    return HAS_EXTENSION and all(map(_is_plain, tensors)) and not _is_watched(modules)


def _is_plain(x: object) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"  # type: ignore[attr-defined]
        and x.dtype == torch.float32  # type: ignore[attr-defined]
    )


def _is_watched(modules: Sequence[nn.Module]) -> bool:
    """Return whether somebody looks at modules or operators while they run."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.nn.modules.module._has_any_global_hook()
        or any(map(_has_hooks, modules))
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def get_no_gradient(modules: Iterable[nn.Module]) -> bool:
    """Return whether modules are in evaluation mode, and what they hold gets no gradient."""
    modules = list(modules)
    if any(module.training for module in modules):
        return False
    tensors = (getattr(module, name, None) for module in modules for name in ("weight", "bias"))
    return not torch.is_grad_enabled() or not any(
        t is not None and t.requires_grad for t in tensors
    )


def is_plain_conv(conv: nn.Module) -> bool:
    """Return whether a convolution is PyTorch's, without groups or holes, in a rim of zeros."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
    )


def is_plain_norm(norm: nn.Module | None) -> bool:
    """Return whether a norm is a batch norm with all its numbers, or none at all."""
    if norm is None or type(norm) is nn.Identity:
        return True
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.num_batches_tracked is not None
    )


def _layers(blocks: nn.Sequential) -> list[tuple[nn.Conv2d, nn.Module | None]] | None:
    """Return convolution and norm of each block; None if one of them is not as it was built."""
    found: list[tuple[Any, nn.Module | None]] = []
    for block in blocks:
        parts: dict[str, Any] = dict(block.named_children())
        names = [name for name in parts if name != "norm"]
        if type(block) is not nn.Sequential or names != ["conv", "relu", "pool"]:
            return None
        conv, relu, pool, norm = parts["conv"], parts["relu"], parts["pool"], parts.get("norm")
        of_torch = type(relu) is nn.ReLU and type(pool) is nn.AvgPool2d
        if not (of_torch and is_plain_conv(conv) and is_plain_norm(norm)):
            return None
        as_built = (
            (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1)),
            (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (2, 2, 0, False),
            pool.divisor_override is None,
            norm is None or list(parts)[1] == "norm",
            not found or found[-1][0].out_channels == conv.in_channels,
        )
        if not all(as_built):
            return None
        found.append((conv, norm))
    return found or None


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return filters and bias of a convolution that does what it and a batch norm at rest do."""
    w = conv.weight.detach()
    bias = w.new_zeros(len(w)) if conv.bias is None else conv.bias.detach()
    if not isinstance(norm, nn.BatchNorm2d):
        return w, bias
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    return w * factor[:, None, None, None], norm.bias.detach() + (bias - norm.running_mean) * factor


def conv_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor | None:
    """Compute the last feature map [N, C', H', W'] of a ConvNet; None where that is not possible.

    Args:
        blocks: Each of them a `conv`, perhaps a `norm`, a ReLU and a 2x2 average.
        x: Images [N, C, H, W].
    """
    layers = _layers(blocks)
    if layers is None or x.numel() == 0 or min(x.shape[2:]) >> len(layers) == 0:
        return None
    convs, norms = [conv for conv, _ in layers], [norm for _, norm in layers]
    if x.shape[1] != convs[0].in_channels or not takes(x, *blocks.modules()):
        return None
    if get_no_gradient(blocks.modules()):
        filters = map(folded, convs, norms)
        needs_masks = torch.is_grad_enabled() and x.requires_grad
        return _AtRest.apply(x, needs_masks, *(tensor for pair in filters for tensor in pair))
    batch_norms = [norm for norm in norms if type(norm) is nn.BatchNorm2d and norm.training]
    if len(batch_norms) < len(convs) or any(conv.bias is not None for conv in convs):
        return None
    return trained(convs, batch_norms, x)


_CHUNK = 2**26
"""Bytes of the largest activations at a time: of more images at once only masks are kept."""


class _AtRest(torch.autograd.Function):
    """Features [N, C', H', W'] of images [N, C, H, W] by filters w and bias of one block after
    another; only the images get a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs_masks: bool, *filters: Tensor) -> Tensor:
        weights = filters[::2]
        pixels = [x[0, 0].numel() >> 2 * level for level in range(len(weights))]
        most = max(4 * p * max(w.shape[:2]) for p, w in zip(pixels, weights))
        ctx.chunk = max(1, _CHUNK // most)
        ctx.sizes = [tuple(side >> level for side in x.shape[2:]) for level in range(len(weights))]
        last = [side >> len(weights) for side in x.shape[2:]]
        out = x.new_empty(len(x), len(filters[-1]), *last)
        masks: list[Tensor] = []
        for part, to in zip(x.split(ctx.chunk), out.split(ctx.chunk)):
            part = part.permute(0, 2, 3, 1).contiguous()
            for w, bias in zip(weights, filters[1::2]):
                part, mask = OPS.conv_relu_pool(part, w, bias, needs_masks)
                masks += [mask] if needs_masks else []
            to.copy_(part.permute(0, 3, 1, 2))
        ctx.save_for_backward(*weights, *masks)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # Where the gradient is to be differentiated again, by plain operators.
        op: Any = OPS.conv_relu_pool_backward
        if torch.is_grad_enabled():
            op = reference.conv_relu_pool_backward
        depth = len(ctx.sizes)
        weights, masks = ctx.saved_tensors[:depth], iter(ctx.saved_tensors[depth:])
        parts: list[Tensor] = []
        d_x = d_out.new_empty(len(d_out), weights[0].shape[1], *ctx.sizes[0])
        for part, to in zip(d_out.split(ctx.chunk), d_x.split(ctx.chunk)):
            part = part.permute(0, 2, 3, 1).contiguous()
            levels = [(next(masks), w, size) for w, size in zip(weights, ctx.sizes)]
            for mask, w, size in reversed(levels):
                part = op(part, mask, w, *size)
            part = part.permute(0, 3, 1, 2)
            if torch.is_grad_enabled():
                parts.append(part)
            else:
                to.copy_(part)
        d_x = torch.cat(parts) if parts else d_x
        return d_x, *(None for _ in range(1 + 2 * depth))


def conv_norm_at_rest(
    conv: nn.Conv2d,
    norm: nn.Module | None,
    x: Tensor,
    *,
    shortcut: Tensor | None = None,
    relu: bool = True,
) -> Tensor:
    """Compute relu(norm(conv(x)) + shortcut) of a network at rest, without a graph.

    Args:
        conv: Of any size; 3x3 filters of stride 1 are run by the library's kernels.
        norm: A batch norm, or None.
        x: Images [N, H, W, C], contiguous.
        shortcut: What is added before the ReLU, of the shape of the result.
        relu: Whether there is one.

    Returns:
        [N, H', W', C'], contiguous.
    """
    w, bias = folded(conv, norm)
    if conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding in ((1, 1), (2, 2)):
        rim = int(conv.padding[0]) - 1
        x = F.pad(x, (0, 0, rim, rim, rim, rim)) if rim else x
        return OPS.conv3x3(x, w, bias, shortcut, relu)
    w = w.contiguous(memory_format=torch.channels_last)
    z = F.conv2d(x.permute(0, 3, 1, 2), w, bias, conv.stride, conv.padding)
    z = z.permute(0, 2, 3, 1).contiguous()
    z = z if shortcut is None else z.add_(shortcut)
    return z.relu_() if relu else z
