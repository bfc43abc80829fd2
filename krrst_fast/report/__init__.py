"""One page about a run."""

from krrst_fast.report.page import write_report

__all__ = ["write_report"]
