"""The fast path of built-in networks on a CPU: their 3x3 convolutions by the library's kernels.

A block of the ConvNet (convolution, batch norm, ReLU, 2x2 average) is one operator, forward and
backward. At rest the batch norm is folded into the filters, and the backward pass to the images
needs four bits for each pooled pixel instead of the activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast import operators
from krrst_fast.reference import conv as reference

_OPS = torch.ops.krrst_fast


def takes(x: Tensor, *modules: nn.Module) -> bool:
    """Return whether the kernels can run `modules` on x: float32 on a CPU, and nobody looks on.

    Who traces, transforms or counts the operators of PyTorch is to see these.
    """
    tensors = [x, *(p for module in modules for p in module.parameters())]
    return (
        operators.HAS_EXTENSION
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(_has_hooks(part) for module in modules for part in module.modules())
    )


def _has_hooks(module: nn.Module) -> bool:
    """Return whether someone looks at what goes through a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_at_rest(*modules: nn.Module) -> bool:
    """Return whether modules are in evaluation mode, and their parameters get no gradient."""
    if any(module.training for module in modules):
        return False
    return not torch.is_grad_enabled() or not any(
        p.requires_grad for module in modules for p in module.parameters()
    )


def folded(conv: nn.Conv2d, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """Return filters and bias of a convolution that does what it and a batch norm at rest do."""
    w = conv.weight.detach()
    bias = w.new_zeros(len(w)) if conv.bias is None else conv.bias.detach()
    if not isinstance(norm, nn.BatchNorm2d):
        return w, bias
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
    return w * factor[:, None, None, None], norm.bias.detach() + (bias - norm.running_mean) * factor


def is_plain_norm(norm: nn.Module | None) -> bool:
    """Return whether a norm is a batch norm with all its numbers, or none at all."""
    if norm is None or type(norm) is nn.Identity:
        return True
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats


def conv_blocks(blocks: nn.Sequential, x: Tensor) -> Tensor | None:
    """Compute the last feature map [N, C', H', W'] of a ConvNet; None where that is not possible.

    Args:
        blocks: Each of them a `conv`, perhaps a `norm`, a ReLU and a 2x2 average.
        x: Images [N, C, H, W].
    """
    convs: list[Any] = [block.conv for block in blocks]
    norms: list[Any] = [getattr(block, "norm", None) for block in blocks]
    if x.numel() == 0 or not all(map(is_plain_norm, norms)) or not takes(x, blocks):
        return None
    at_rest = is_at_rest(blocks)
    in_training = all(
        norm is not None and norm.training and type(norm) is nn.BatchNorm2d and conv.bias is None
        for conv, norm in zip(convs, norms)
    )
    if not (at_rest or in_training):
        return None
    if at_rest:
        filters = map(folded, convs, norms)
        needs_masks = torch.is_grad_enabled() and x.requires_grad
        return _AtRest.apply(x, needs_masks, *(tensor for pair in filters for tensor in pair))
    x = x.permute(0, 2, 3, 1).contiguous()
    for conv, norm in zip(convs, norms):
        x = _trained(x, conv.weight, norm)
    return x.permute(0, 3, 1, 2)


_CHUNK = 2**25
"""Bytes of the largest activations at a time: of more images at once only masks are kept."""


class _AtRest(torch.autograd.Function):
    """Features [N, C', H', W'] of images [N, C, H, W] by filters w and bias of one block after
    another; only the images get a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs_masks: bool, *filters: Tensor) -> Tensor:
        weights = filters[::2]
        ctx.chunk = max(1, _CHUNK // (x[0, 0].numel() * len(filters[0])))
        ctx.sizes = [tuple(side >> level for side in x.shape[2:]) for level in range(len(weights))]
        last = [side >> len(weights) for side in x.shape[2:]]
        out = x.new_empty(len(x), len(filters[-1]), *last)
        masks: list[Tensor] = []
        for part, to in zip(x.split(ctx.chunk), out.split(ctx.chunk)):
            part = part.permute(0, 2, 3, 1).contiguous()
            for w, bias in zip(weights, filters[1::2]):
                part, mask = _OPS.conv_relu_pool(part, w, bias, needs_masks)
                masks += [mask] if needs_masks else []
            to.copy_(part.permute(0, 3, 1, 2))
        ctx.save_for_backward(*weights, *masks)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        # Where the gradient is to be differentiated again, by plain operators.
        op: Any = _OPS.conv_relu_pool_backward
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


def _trained(x: Tensor, w: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Compute a block in training mode, and move the running statistics of its batch norm."""
    out, mean, variance = _InTraining.apply(x, w, norm.weight, norm.bias, norm.eps)
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        moved = norm.momentum
        share = 1 / norm.num_batches_tracked.float() if moved is None else moved
        pixels = x.shape[0] * x.shape[1] * x.shape[2]
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * (pixels / (pixels - 1)), share)
    return out


class _InTraining(torch.autograd.Function):
    """Averages of relu(norm(w * x)) with a batch norm in training mode."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, gain: Tensor, shift: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, z, mask, mean, variance, scale = _OPS.conv_norm_relu_pool(x, w, gain, shift, eps)
        ctx.save_for_backward(x, w, gain, shift, z, mask, mean, scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        x, w, gain, shift, z, mask, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _twice_differentiable(ctx, x, w, gain, shift, d_out)
        needs_d_x = ctx.needs_input_grad[0]
        d_x, d_w, d_gain, d_shift = _OPS.conv_norm_relu_pool_backward(
            d_out.contiguous(), x, w, gain, z, mask, mean, scale, needs_d_x
        )
        return d_x if needs_d_x else None, d_w, d_gain, d_shift, None


def _twice_differentiable(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients so that they can be differentiated again: in plain PyTorch."""
    *inputs, d_out = given
    x, w, gain, shift = inputs
    z = F.conv2d(x.permute(0, 3, 1, 2), w, padding=1)
    z = F.batch_norm(z, None, None, gain, shift, training=True, eps=ctx.eps)
    out = F.avg_pool2d(z.relu(), 2).permute(0, 2, 3, 1)
    asked = [i for i, needs in enumerate(ctx.needs_input_grad[:4]) if needs]
    found = torch.autograd.grad(out, [inputs[i] for i in asked], d_out, create_graph=True)
    gradients: list[Tensor | None] = [None] * 5
    for i, gradient in zip(asked, found):
        gradients[i] = gradient
    return tuple(gradients)


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
        return _OPS.conv_bias(x, w, bias, shortcut, relu)
    w = w.contiguous(memory_format=torch.channels_last)
    z = F.conv2d(x.permute(0, 3, 1, 2), w, bias, conv.stride, conv.padding)
    z = z.permute(0, 2, 3, 1).contiguous()
    z = z if shortcut is None else z.add_(shortcut)
    return z.relu_() if relu else z
