"""Estimators: `KernelRidge`, and `KernelRidgeCV`, which chooses its ridge."""
