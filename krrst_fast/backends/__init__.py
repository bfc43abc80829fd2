"""The implementations of the steps that a closed form is made of, one module each.

Every module has the functions `gram`, `matmul`, `predicted_residual_mse` and `closing_matmul` with
the signatures of `krrst_fast.reference`, for one problem [., .] or a batch [N, ., .], and:

    NAME                        what `SolveInfo.backend` reports
    refuses(x)                  why it cannot compute on a tensor like x, or None
    cholesky_method(k, columns) how a Gram is factored and solved with so many right-hand sides
    as_operands(f_syn, f_real)  the rounded features of precision="fast"
    kernel_values, kernel_slopes  kernels as functions of inner products, and their derivatives,
                                as in `krrst_fast.reference.kernels`
"""

from types import ModuleType

from torch import _C, Tensor
from torch.compiler import is_compiling

from krrst_fast.backends import cpp, torch, traced, triton, tuned

# In this file `torch` is the backend, not the package.
__all__ = ["AUTO", "BACKENDS", "Backend", "choose", "for_backward"]

Backend = ModuleType

AUTO: tuple[Backend, ...] = (cpp, tuned, torch)
"""The modules that "auto" tries, fastest first."""

BACKENDS: dict[str, Backend] = {"cpp": cpp, "triton": triton, "torch": torch}
"""The modules that can be named."""

# By name: torch.compile cannot compare modules.
_TRACEABLE: dict[str, Backend] = {"cpp": traced, "torch": torch}


def choose(name: str, x: Tensor, op: str) -> Backend:
    """Return the backend called `name`, or for "auto" the first that takes tensors like `x`.

    Raises:
        ValueError: The backend refuses; the message has its reason.
    """
    tracing = is_compiling()
    candidates = AUTO if name == "auto" else (BACKENDS[name],)
    for backend in candidates:
        # Tested before `refuses`, which reads what is installed and measured: that has no trace.
        if tracing and backend.NAME not in _TRACEABLE:
            reason = "torch.compile cannot trace it"
        else:
            reason = backend.refuses(x)
        if reason is None:
            return _TRACEABLE[backend.NAME] if tracing else backend
    raise ValueError(f"{op}: backend {name!r} cannot compute this: {reason}")


def for_backward(backend: Backend, grad: Tensor) -> Backend:
    """Return the backend of a backward pass from `grad` after a forward pass by `backend`.

    It is torch where `grad` has no memory that a kernel could read: under is_grads_batched=True,
    and where torch.compile traces the backward pass of a call that it has not traced.
    """
    tracing = is_compiling()
    if backend.NAME in _TRACEABLE:
        return _TRACEABLE[backend.NAME] if tracing else backend
    unreadable = tracing or _C._functorch.is_legacy_batchedtensor(grad)
    return torch if unreadable else backend
