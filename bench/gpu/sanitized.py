"""Calls of every kernel of ours at awkward sizes, for compute-sanitizer to watch.

python -m bench.gpu.sanitized DEVICE cholesky|all

Tensor cores' asynchronous copies, which Triton orders by barriers, racecheck does not follow: it is
for the Cholesky alone. memcheck sees what is read beyond an allocation if each tensor has one of
its own: PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from krrst_fast import krr_mse
from krrst_fast.backends import BACKENDS

Call = partial[Any]


def cholesky(device: str) -> Iterator[Call]:
    """Factors and solves round the tiles of 32 and 64; on a CPU the operators' fallback."""
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


def krr(device: str) -> Iterator[Call]:
    """The loss with its gradients: rows, features and targets that no block divides."""
    for m, d, b, p in ((67, 131, 33, 5), (131, 67, 70, 73), (1, 1, 1, 1)):
        f_syn, y_syn, f_real, y_real = (
            torch.randn(*size, device=device) for size in ((m, d), (m, p), (b, d), (b, p))
        )
        leaves = f_syn.requires_grad_(), y_syn.requires_grad_()
        for backend in BACKENDS:
            if backend.name == "tuned" or backend.refuses(f_syn.detach()) is not None:
                continue
            for precision in (None, "fast"):
                for form in ("k", "w", "primal"):
                    how = {"backend": backend.name, "precision": precision, "form": form}
                    yield partial(_gradients, how, *leaves, f_real, y_real)


def _gradients(how: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, ...]:
    loss = krr_mse(*tensors, **how, ridge=0.1, bias=1.0, check="flag")
    return torch.autograd.grad(loss, tensors[:2])


def views(device: str) -> Iterator[Call]:
    """Crops beyond every edge."""
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
