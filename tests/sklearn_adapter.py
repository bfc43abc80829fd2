"""A plugin of pytest: scikit-learn's own tests of KernelRidge test ours."""

from typing import Any

import sklearn.kernel_ridge

from krrst_fast import KernelRidge

_made: list[str] = []


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell how many estimators were ours: a test that uses none of them would pass as well."""
    terminalreporter.write_line(f"KernelRidge of {KernelRidge.__module__}: {len(_made)} made")


def _with_names_of_scikit_learn(alpha: float = 1, *, kernel: str = "linear", **numbers: Any) -> Any:
    _made.append(kernel)
    return KernelRidge(alpha, kernel=kernel, **numbers)


sklearn.kernel_ridge.KernelRidge = _with_names_of_scikit_learn
