"""A hook for tests on a GPU that several processes run: one that has lost its device ends."""

import os
import sys
from collections.abc import Iterator

import pytest

LOST = 70


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """End a process whose device a test has lost; pytest-xdist replaces it.

    After an illegal access the process can compute nothing more, and every later test of it would
    fail for nothing. The test that did it is reported as the one that the process crashed in.
    """
    report = yield
    if report.failed and hasattr(item.config, "workerinput") and _device_is_lost():
        print(f"{item.nodeid} lost the device:\n{report.longreprtext}", file=sys.stderr, flush=True)
        os._exit(LOST)
    return report


def _device_is_lost() -> bool:
    cuda = sys.modules["torch"].cuda
    if not cuda.is_initialized():
        return False
    try:
        cuda.synchronize()
    except RuntimeError:
        return True
    return False
