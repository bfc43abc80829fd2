"""The distillation: `distill(DistillConfig(...))` runs it, `outer_step` is one step of it."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.distill.config import (
        DistillConfig,
        PoolConfig,
    )
    from krrst_fast.distill.loop import (
        distill,
    )
    from krrst_fast.distill.step import (
        outer_step,
    )

__all__ = ["DistillConfig", "PoolConfig", "distill", "outer_step"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.distill.config": (
            "DistillConfig",
            "PoolConfig",
        ),
        "krrst_fast.distill.loop": ("distill",),
        "krrst_fast.distill.step": ("outer_step",),
    },
)


class _Callable(ModuleType):
    """A package that is called: importing it puts it where `krrst_fast.distill` is looked up."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("krrst_fast.distill.loop").distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
