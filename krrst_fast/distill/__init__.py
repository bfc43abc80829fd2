"""The distillation: `distill(DistillConfig(...))` runs it, `outer_step` is one step of it."""

from krrst_fast.distill.config import DistillConfig, PoolConfig
from krrst_fast.distill.loop import distill
from krrst_fast.distill.step import outer_step

__all__ = ["DistillConfig", "PoolConfig", "distill", "outer_step"]
