"""A plugin of pytest: scikit-learn's own tests of KernelRidge test ours."""

from typing import Any

import sklearn.kernel_ridge

from krrst_fast import KernelRidge


def _with_names_of_scikit_learn(alpha: float = 1, *, kernel: str = "linear", **numbers: Any) -> Any:
    return KernelRidge(alpha, kernel=kernel, **numbers)


sklearn.kernel_ridge.KernelRidge = _with_names_of_scikit_learn
