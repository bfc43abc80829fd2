"""Tests on a GPU run by several processes: one that crashes, or loses its device, costs itself."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("xdist")
ROOT = Path(__file__).resolve().parent.parent

# A device that is played: what a wild access leaves behind is an error at every later wait.
PLAYED = """
import sys
from types import ModuleType, SimpleNamespace

from tests.lost_device import pytest_runtest_makereport

class Device:
    lost = False

    @classmethod
    def wait(cls):
        if cls.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch = sys.modules["torch"] = ModuleType("torch")
torch.cuda = SimpleNamespace(synchronize=Device.wait, is_initialized=lambda: True)
"""
TESTS = """
import os
import pytest
import torch
from conftest import Device

@pytest.mark.parametrize("i", range(12))
def test_right(i):
    torch.cuda.synchronize()

def test_wild():
    Device.lost = True
    torch.cuda.synchronize()

def test_crash():
    os.kill(os.getpid(), 9)

@pytest.mark.parametrize("i", range(12))
def test_right_too(i):
    torch.cuda.synchronize()

def test_wrong():
    assert 1 + 1 == 3
"""


def test_a_lost_device_and_a_crash_take_no_other_test_with_them(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(PLAYED)
    (tmp_path / "test_played.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", "-v"),
            *("-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    failed = set(re.findall(r"^FAILED test_played.py::(\w+)", done.stdout, re.MULTILINE))
    assert failed == {"test_wild", "test_crash", "test_wrong"}, done.stdout
    assert "24 passed" in done.stdout and "3 failed" in done.stdout
    assert "an illegal memory access was encountered" in done.stdout + done.stderr
