"""Pre-train on a distilled set or a rival, then measure how well the network transfers."""

from krrst_fast.evaluate.config import (
    METHODS,
    EvaluateConfig,
    FinetuneConfig,
    Method,
    PretrainConfig,
    ProbeConfig,
)
from krrst_fast.evaluate.run import evaluate
from krrst_fast.evaluate.table import Difference, Evaluation, Row, Summary, paired_difference

__all__ = [
    "METHODS",
    "Difference",
    "Evaluation",
    "EvaluateConfig",
    "FinetuneConfig",
    "Method",
    "PretrainConfig",
    "ProbeConfig",
    "Row",
    "Summary",
    "evaluate",
    "paired_difference",
]
