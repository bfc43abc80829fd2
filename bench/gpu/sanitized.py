"""Calls of every kernel of ours at awkward sizes, for compute-sanitizer to watch.

python -m bench.gpu.sanitized DEVICE cholesky|all

Tensor cores' asynchronous copies, which Triton orders by barriers, racecheck does not follow: it is
for the Cholesky alone. memcheck sees what is read beyond an allocation if each tensor has one of
its own: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common import refusal, solving
from krrst_fast import krr_mse

Call = partial[Any]


def cholesky(device: str) -> Iterator[Call]:
    """Yield factors and solves of sizes around the tiles of 32 and 64."""
    ops = torch.ops.krrst_fast
    for m in (1, 33, 64, 65, 150):
        x = torch.randn(3, m, m + 2, device=device)
        k, ridge = x @ x.mT, torch.full((3,), 0.1, device=device)
        y = torch.randn(3, m, 70, device=device)
        yield partial(ops.cholesky, k[0], ridge[0], y[0], False)
        yield partial(ops.cholesky, k[0], ridge[0], y[0], True)
        yield partial(_solved, k, ridge, y)


def _solved(k: Tensor, ridge: Tensor, y: Tensor) -> Tensor:
    factor, _ = torch.ops.krrst_fast.batched_cholesky(k, ridge)
    return torch.ops.krrst_fast.batched_cholesky_solve(y, factor)


SHAPES = ((67, 131, 33, 5), (131, 67, 70, 73), (1, 1, 1, 1))
"""M, D, B, P: rows, features and targets that no block divides."""


def krr(device: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Iterator[Call]:
    """Yield the loss with its gradients, in every closed form."""
    for m, d, b, p in shapes:
        f_syn, y_syn, f_real, y_real = (
            torch.randn(*size, device=device) for size in ((m, d), (m, p), (b, d), (b, p))
        )
        leaves = f_syn.requires_grad_(), y_syn.requires_grad_()
        for backend in ("cpp", "triton", "torch"):
            if refusal(backend, f_syn.detach()) is not None:
                continue
            for precision in (None, "fast"):
                for form in ("k", "w", "primal"):
                    how = solving(backend, precision=precision, form=form, check="flag")
                    yield partial(_gradients, how, *leaves, f_real, y_real)


def _gradients(how: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    loss = krr_mse(*tensors, **how, ridge=0.1, bias=1.0)
    return torch.autograd.grad(loss, tensors[:2])


def views(device: str) -> Iterator[Call]:
    """Yield views with crops beyond every edge."""
    if device == "cpu" or importlib.util.find_spec("triton") is None:
        return
    from krrst_fast.kernels.views import views as kernel

    images = torch.randint(256, (5, 3, 13, 17), dtype=torch.uint8, device=device)
    index, flip = torch.arange(5, device=device), torch.arange(5, device=device) % 2 == 0
    offset = torch.tensor([[0, 0], [6, 6], [0, 6], [3, 3], [6, 0]], device=device)
    yield partial(kernel, images, index, offset, flip, 3, (0.5,) * 3, (0.2,) * 3)


def main(argv: list[str]) -> int:
    """Make the calls, and print how many there were."""
    device, what = argv
    count = 0
    for part in (cholesky,) if what == "cholesky" else (cholesky, krr, views):
        for call in part(device):
            call()
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
