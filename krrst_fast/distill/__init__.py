"""The distillation: `distill(DistillConfig(...))` runs it, `outer_step` is one step of it."""

import sys
from types import ModuleType
from typing import Any

from krrst_fast.distill.config import DistillConfig, PoolConfig
from krrst_fast.distill.loop import distill
from krrst_fast.distill.step import outer_step

__all__ = ["DistillConfig", "PoolConfig", "distill", "outer_step"]


class _Callable(ModuleType):
    """A package that is called: importing it puts it where `krrst_fast.distill` is looked up."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return distill(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
