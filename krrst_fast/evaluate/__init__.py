"""Pre-train on a distilled set or a rival, then measure how well the network transfers."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from krrst_fast.runs.lazy import lazy_names

if TYPE_CHECKING:
    from krrst_fast.evaluate.config import (
        METHODS,
        EvaluateConfig,
        FinetuneConfig,
        KDConfig,
        Method,
        PretrainConfig,
        ProbeConfig,
    )
    from krrst_fast.evaluate.run import (
        evaluate,
    )
    from krrst_fast.evaluate.table import (
        Evaluation,
        Row,
        Sample,
        Summary,
    )

__all__ = [
    "METHODS",
    "Evaluation",
    "EvaluateConfig",
    "FinetuneConfig",
    "KDConfig",
    "Method",
    "PretrainConfig",
    "ProbeConfig",
    "Row",
    "Sample",
    "Summary",
    "evaluate",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "krrst_fast.evaluate.config": (
            "METHODS",
            "EvaluateConfig",
            "FinetuneConfig",
            "KDConfig",
            "Method",
            "PretrainConfig",
            "ProbeConfig",
        ),
        "krrst_fast.evaluate.run": ("evaluate",),
        "krrst_fast.evaluate.table": (
            "Evaluation",
            "Row",
            "Sample",
            "Summary",
        ),
    },
)


class _Callable(ModuleType):
    """A package that is called: importing it puts it where `krrst_fast.evaluate` is looked up."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module("krrst_fast.evaluate.run").evaluate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
