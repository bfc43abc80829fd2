"""The distillation: `distill(DistillConfig(...))` runs it, `outer_step` is one step of it."""

from typing import TYPE_CHECKING

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
