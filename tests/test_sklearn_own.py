"""The tests of scikit-learn's KernelRidge that its package ships, run on ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn.tests.test_kernel_ridge")
ROOT = Path(__file__).resolve().parent.parent


def test_scikit_learns_own_tests_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.sklearn_adapter", "-p"]
    command += ["no:cacheprovider", "--pyargs", "sklearn.tests.test_kernel_ridge"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout and "skipped" not in done.stdout, done.stdout
    made = re.search(r"KernelRidge of krrst_fast\.\S+: (\d+) made", done.stdout)
    assert made is not None and int(made[1]) > 10, done.stdout
