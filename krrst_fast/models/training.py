"""Blocks of a ConvNet in training mode, by the library's kernels: batch norm over all images.

The gradient of a batch norm needs sums over all images, and so does the next block's. Where the
activations of all images take too much memory, they are computed anew, chunk by chunk, for each of
these sums: the same gradients, in about three times the time.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krrst_fast.convolutions import OPS

_WHOLE = 2**32
"""Bytes of activations that are kept; with more, and so with many images, they are recomputed."""
_CHUNK = 2**28
"""Bytes of the activations of the images that are then computed at a time."""


def trained(convs: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d], x: Tensor) -> Tensor:
    """Compute the last feature map [N, C', H', W'], and move the running statistics of the norms.

    Args:
        convs: 3x3 convolutions without bias, each followed by its norm, ReLU and a 2x2 average.
        norms: Batch norms in training mode.
        x: Images [N, C, H, W].
    """
    parameters = [p for c, n in zip(convs, norms) for p in (c.weight, n.weight, n.bias)]
    out, *moments = _InTraining.apply(x, tuple(norm.eps for norm in norms), *parameters)
    with torch.no_grad():
        for level, (norm, mean, variance) in enumerate(zip(norms, moments[::2], moments[1::2])):
            pixels = len(x) * (x.shape[2] >> level) * (x.shape[3] >> level)
            _move(norm, mean, variance * (pixels / max(pixels - 1, 1)))
    return out


def _move(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics of a batch norm as torch does."""
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.float(), share)
    norm.running_var.lerp_(variance.float(), share)


class _Norm(NamedTuple):
    """A batch norm over all images: what its outputs and gradients are computed from, [C'] each."""

    gain: Tensor
    shift: Tensor
    mean: Tensor
    scale: Tensor
    """1 / deviation."""

    def pooled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the averages of the ReLU of the normalised z, and the mask."""
        factor = self.gain * self.scale
        return OPS.scale_relu_pool(z, factor, self.shift - self.mean * factor)


class _Level(NamedTuple):
    """Of some images: inputs of a block [N, H, W, C], outputs of its convolution, its mask."""

    x: Tensor
    z: Tensor
    mask: Tensor


class _Moments:
    """Mean and variance of outputs that come chunk by chunk, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, z: Tensor) -> None:
        """Take in more outputs [N, H, W, C']."""
        mean, squares = OPS.channel_moments(z)
        more = z[..., 0].numel()
        off, before = mean - self.mean, self.count
        self.count += more
        self.mean = self.mean + off * (more / self.count)
        self._squares = self._squares + squares + off.square() * (before * more / self.count)

    @property
    def variance(self) -> Tensor:
        """Divided by the number of pixels."""
        return torch.as_tensor(self._squares / self.count)

    def norm(self, gain: Tensor, shift: Tensor, eps: float) -> _Norm:
        """Return the batch norm by these moments."""
        scale = torch.rsqrt(self.variance + eps)
        return _Norm(gain, shift, torch.as_tensor(self.mean).to(gain), scale.to(gain))


def _levels(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[_Norm]
) -> tuple[list[_Level], Tensor]:
    """Compute the blocks whose norms are known; return them, and what the last one puts out."""
    levels = []
    for w, norm in zip(weights, norms):
        z = OPS.conv3x3(x, w, None, None, False)
        out, mask = norm.pooled(z)
        levels.append(_Level(x, z, mask))
        x = out
    return levels, x


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


class _InTraining(torch.autograd.Function):
    """Feature maps of images [N, C, H, W] by w, gain and shift of one block after another, and mean
    and variance at each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: tuple[float, ...], *parameters: Tensor) -> Any:
        weights, gains, shifts = parameters[::3], parameters[1::3], parameters[2::3]
        each = _bytes_of_an_image(x, weights)
        ctx.chunk = len(x) if each * len(x) <= _WHOLE else max(1, _CHUNK // each)
        whole = ctx.chunk == len(x)
        norms: list[_Norm] = []
        levels: list[_Level] = []
        found: list[Tensor] = []
        inputs = _last(x) if whole else x
        for w, gain, shift, tiny in zip(weights, gains, shifts, eps):
            moments = _Moments()
            if whole:
                z = OPS.conv3x3(inputs, w, None, None, False)
                moments.add(z)
            else:
                for part in x.split(ctx.chunk):
                    _, before = _levels(_last(part), weights, norms)
                    moments.add(OPS.conv3x3(before, w, None, None, False))
            norms.append(moments.norm(gain, shift, tiny))
            found += [torch.as_tensor(moments.mean), moments.variance]
            if whole:
                out, mask = norms[-1].pooled(z)
                levels.append(_Level(inputs, z, mask))
                inputs = out
        if whole:
            out = inputs.permute(0, 3, 1, 2).contiguous()
        else:
            parts = x.split(ctx.chunk)
            out = torch.cat(
                [_levels(_last(part), weights, norms)[1].permute(0, 3, 1, 2) for part in parts]
            )
        ctx.eps = eps
        kept = [tensor for level in levels for tensor in level]
        statistics = [tensor for norm in norms for tensor in (norm.mean, norm.scale)]
        ctx.save_for_backward(x, *parameters, *statistics, *kept)
        ctx.mark_non_differentiable(*found)
        return out, *found

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        depth = len(ctx.eps)
        x, *saved = ctx.saved_tensors
        parameters, saved = saved[: 3 * depth], saved[3 * depth :]
        if torch.is_grad_enabled():
            return _twice_differentiable(ctx, x, parameters, d_out)
        weights = parameters[::3]
        norms = [
            _Norm(*pair, *statistics)
            for pair, statistics in zip(
                zip(parameters[1::3], parameters[2::3]), zip(saved[0 : 2 * depth : 2], saved[1::2])
            )
        ]
        kept = saved[2 * depth :]
        levels = [_Level(*kept[i : i + 3]) for i in range(0, len(kept), 3)]
        back = _Back(x, d_out, weights, norms, levels, ctx.chunk)
        needs_d_x = ctx.needs_input_grad[0]
        d_x, gradients = back.whole(needs_d_x) if levels else back.in_chunks(needs_d_x)
        return d_x, None, *gradients


def _bytes_of_an_image(x: Tensor, weights: Sequence[Tensor]) -> int:
    """Return the bytes of the inputs and outputs of all convolutions for an image."""
    pixels = [x[0, 0].numel() >> 2 * level for level in range(len(weights))]
    return 4 * sum(p * (w.shape[0] + w.shape[1]) for p, w in zip(pixels, weights))


class _Back:
    """The backward pass; its results are d_x, and gradients of w, gain and shift block by block."""

    def __init__(
        self,
        x: Tensor,
        d_out: Tensor,
        weights: Sequence[Tensor],
        norms: Sequence[_Norm],
        levels: Sequence[_Level],
        chunk: int,
    ) -> None:
        self.x, self.d_out, self.weights, self.norms = x, d_out, weights, norms
        self.levels, self.chunk = levels, chunk
        self.means: dict[int, Tensor] = {}
        """By block: the sums of the gradient, divided by the pixels of all images."""
        self.gradients: list[Tensor] = []

    def whole(self, needs_d_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Go back through activations that were kept."""
        d = _last(self.d_out)
        for number in reversed(range(len(self.weights))):
            level = self.levels[number]
            self._settle(number, self._sums(number, d, level))
            d, d_w = self._step(number, d, level, number > 0 or needs_d_x)
            self.gradients.insert(0, d_w)
        return d.permute(0, 3, 1, 2) if needs_d_x else None, self.gradients

    def in_chunks(self, needs_d_x: bool) -> tuple[Tensor | None, list[Tensor]]:
        """Go back through activations that are computed anew."""
        depth = len(self.weights)
        for number in reversed(range(depth)):
            sums: Tensor | float = 0.0
            for levels, d in self._parts():
                for above in reversed(range(number + 1, depth)):
                    d, _ = self._step(above, d, levels[above], True, needs_d_w=False)
                sums = sums + self._sums(number, d, levels[number])
            self._settle(number, torch.as_tensor(sums))
        d_w: list[Tensor | float] = [0.0] * depth
        d_x = torch.empty_like(self.x) if needs_d_x else None
        ends = d_x.split(self.chunk) if d_x is not None else ()
        for which, (levels, d) in enumerate(self._parts()):
            for number in reversed(range(depth)):
                d, more = self._step(number, d, levels[number], number > 0 or needs_d_x)
                d_w[number] = d_w[number] + more
            if d_x is not None:
                ends[which].copy_(d.permute(0, 3, 1, 2))
        for number, total in enumerate(d_w):
            self.gradients.insert(3 * number, torch.as_tensor(total))
        return d_x, self.gradients

    def _parts(self) -> Iterator[tuple[list[_Level], Tensor]]:
        """Yield the activations and the gradient by the outputs of some images after another."""
        for part, d in zip(self.x.split(self.chunk), self.d_out.split(self.chunk)):
            yield _levels(_last(part), self.weights, self.norms)[0], _last(d)

    def _sums(self, number: int, d: Tensor, level: _Level) -> Tensor:
        norm = self.norms[number]
        return OPS.norm_relu_pool_sums(d, level.mask, level.z, norm.mean, norm.scale)

    def _settle(self, number: int, sums: Tensor) -> None:
        """Note the sums of a block over all images, which are the gradients of shift and gain."""
        pixels = len(self.x) * (self.x.shape[2] >> number) * (self.x.shape[3] >> number)
        self.means[number] = (sums / pixels).to(self.x)
        self.gradients[:0] = [sums[1].to(self.x), sums[0].to(self.x)]

    def _step(
        self, number: int, d: Tensor, level: _Level, needs_d_x: bool, *, needs_d_w: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients by the inputs of a block and by its filters."""
        x, z, mask = level
        gain, _, mean, scale = self.norms[number]
        w, means = self.weights[number], self.means[number]
        return OPS.conv_norm_backward(
            *(d, mask, x, w, z, mean, scale, gain, means), needs_d_x, needs_d_w
        )


def _twice_differentiable(
    ctx: Any, x: Tensor, parameters: Sequence[Tensor], d_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients so that they can be differentiated again: in plain PyTorch."""
    # Views, of which the gradients are taken: the images may depend on the parameters.
    x, *parameters = (tensor.view_as(tensor) for tensor in (x, *parameters))
    out = x
    for w, gain, shift, eps in zip(parameters[::3], parameters[1::3], parameters[2::3], ctx.eps):
        z = F.conv2d(out, w, padding=1)
        z = F.batch_norm(z, None, None, gain, shift, training=True, eps=eps)
        out = F.avg_pool2d(z.relu(), 2)
    inputs = [x, *parameters]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
    asked = [tensor for tensor, needed in zip(inputs, needs) if needed]
    found = iter(torch.autograd.grad(out, asked, d_out, create_graph=True))
    d_x, *gradients = (next(found) if needed else None for needed in needs)
    return d_x, None, *gradients
