"""Functions compiled by `torch.compile`, or called plainly where that fails."""

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_MOST_VARIANTS = 64
"""Of a function's code, which all that are made of it share."""


class Compiled:
    """A function (state, *tensors) -> tensor, compiled for each combination of shapes.

    The first call with a combination compiles forward and backward pass on copies of the arguments.
    Where that fails the function itself is called from then on, and a warning says why.

    Args:
        function: Has no other result than its value and changes in the buffers of the state. What
            it is a method of must not change.
        what: Its name in the warning.
    """

    def __init__(self, function: Callable[..., Tensor], what: str) -> None:
        self._function, self._what = function, what
        # By the shapes of the arguments alone, so that a resumed run makes the same choices. No
        # kernel is chosen by timing it, which could choose another one in a resumed run.
        options: Any = {"deterministic": True} if _can_be_deterministic() else None
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, options=options)
        self._works: dict[Any, bool] = {}

    def __call__(self, state: Mapping[str, Tensor], *tensors: Tensor) -> Tensor:
        """Call it."""
        grad = torch.is_grad_enabled()
        key = (grad, *((x.shape, x.stride(), x.dtype, x.requires_grad) for x in tensors))
        if key not in self._works:
            self._works[key] = self._try(state, tensors)
        return (self._compiled if self._works[key] else self._function)(state, *tensors)

    def _try(self, state: Mapping[str, Tensor], tensors: tuple[Tensor, ...]) -> bool:
        copied = {
            name: copy.deepcopy(x) if x.is_leaf else x.detach().clone() for name, x in state.items()
        }
        # Views of leaves, or the compiler would see another kind of tensor at the next call.
        inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        inputs = [new if old.is_leaf else new.view_as(new) for old, new in zip(tensors, inputs)]
        try:
            with (
                warnings.catch_warnings(),
                torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS),
            ):
                warnings.simplefilter("ignore")  # advice on TF32 and the like
                result = self._compiled(copied, *inputs)
                if result.requires_grad:
                    result.sum().backward()
            if result.device.type == "cuda":
                torch.cuda.synchronize(result.device)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"{self._what}: torch.compile failed, so it runs as plain PyTorch ({reason})",
                stacklevel=2,
            )
            return False
        return True


def _can_be_deterministic() -> bool:
    from torch._inductor import config

    return hasattr(config, "deterministic")
