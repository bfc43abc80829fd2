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
from krrst_fast.evaluate.table import Evaluation, Row, Sample, Summary

__all__ = [
    "METHODS",
    "Evaluation",
    "EvaluateConfig",
    "FinetuneConfig",
    "Method",
    "PretrainConfig",
    "ProbeConfig",
    "Row",
    "Sample",
    "Summary",
    "evaluate",
]
