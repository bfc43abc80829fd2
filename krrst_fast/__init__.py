"""Fast kernel ridge regression on network features, and dataset distillation with it (KRR-ST).

>>> from krrst_fast import krr_mse
>>> loss = krr_mse(f_syn, y_syn, f_real, y_real, ridge=1e-6, bias=1.0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from krrst_fast import distill, evaluate
    from krrst_fast.data.prepare import PrepareConfig, prepare
    from krrst_fast.data.store import ImageStore, open_store
    from krrst_fast.distill import DistillConfig
    from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
    from krrst_fast.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        KrrstError,
        NonFiniteError,
        NotPositiveDefiniteError,
    )
    from krrst_fast.estimator.ridge import KernelRidge
    from krrst_fast.estimator.ridge_cv import KernelRidgeCV
    from krrst_fast.evaluate import EvaluateConfig
    from krrst_fast.exchange import export_set, import_set
    from krrst_fast.head import RidgeHead
    from krrst_fast.ops.fit import krr_fit
    from krrst_fast.ops.fitted import KRRFit
    from krrst_fast.ops.from_gram import krr_predict_from_gram
    from krrst_fast.ops.gram import gram
    from krrst_fast.ops.info import SolveInfo
    from krrst_fast.ops.kernel import Kernel
    from krrst_fast.ops.krr import krr_mse, krr_predict
    from krrst_fast.ops.path import KRRPath, krr_path
    from krrst_fast.ops.path_fit import PathFit
    from krrst_fast.ops.ridge_solve import ridge_solve
    from krrst_fast.ops.solver import Solver
    from krrst_fast.ops.views import views
    from krrst_fast.planner import Plan, plan
    from krrst_fast.targets import FrozenTarget, TargetConfig, load_target, train_target

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistillConfig",
    "DistilledSet",
    "EvaluateConfig",
    "FrozenTarget",
    "ImageStore",
    "KRRFit",
    "KRRPath",
    "Kernel",
    "KernelRidge",
    "KernelRidgeCV",
    "KrrstError",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "PathFit",
    "Plan",
    "PrepareConfig",
    "RidgeHead",
    "SolveInfo",
    "Solver",
    "TargetConfig",
    "distill",
    "evaluate",
    "export_set",
    "gram",
    "import_set",
    "krr_fit",
    "krr_mse",
    "krr_path",
    "krr_predict",
    "krr_predict_from_gram",
    "load_distilled",
    "load_target",
    "open_store",
    "plan",
    "prepare",
    "ridge_solve",
    "train_target",
    "views",
]

# Packages that are called like the one function they are for; see `_Callable` in each.
_CALLED = ("distill", "evaluate")
_HOMES = {
    "krrst_fast.estimator.ridge": ("KernelRidge",),
    "krrst_fast.estimator.ridge_cv": ("KernelRidgeCV",),
    "krrst_fast.head": ("RidgeHead",),
    "krrst_fast.ops.fit": ("krr_fit",),
    "krrst_fast.ops.fitted": ("KRRFit",),
    "krrst_fast.ops.gram": ("gram",),
    "krrst_fast.ops.from_gram": ("krr_predict_from_gram",),
    "krrst_fast.ops.info": ("SolveInfo",),
    "krrst_fast.ops.kernel": ("Kernel",),
    "krrst_fast.ops.krr": ("krr_mse", "krr_predict"),
    "krrst_fast.ops.ridge_solve": ("ridge_solve",),
    "krrst_fast.ops.solver": ("Solver",),
    "krrst_fast.ops.views": ("views",),
    "krrst_fast.ops.path": ("KRRPath", "krr_path"),
    "krrst_fast.ops.path_fit": ("PathFit",),
    "krrst_fast.planner": ("Plan", "plan"),
    "krrst_fast.data": ("ImageStore", "PrepareConfig", "open_store", "prepare"),
    "krrst_fast.targets": ("FrozenTarget", "TargetConfig", "load_target", "train_target"),
    "krrst_fast.distill": ("DistillConfig",),
    "krrst_fast.distill.distilled_set": ("DistilledSet", "load_distilled"),
    "krrst_fast.evaluate": ("EvaluateConfig",),
    "krrst_fast.exchange": ("export_set", "import_set"),
}


def __getattr__(name: str) -> Any:
    # Lazily: data workers import `krrst_fast._native`, and the command line prints its help,
    # without paying for torch.
    if name == "__version__":
        return import_module("krrst_fast.runs.version").version()
    if name not in __all__:
        raise AttributeError(f"module 'krrst_fast' has no attribute {name!r}")
    if name in _CALLED:
        return import_module(f"krrst_fast.{name}")
    home = next((home for home, names in _HOMES.items() if name in names), "krrst_fast.errors")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
