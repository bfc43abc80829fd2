"""MATLAB's .mat files, as the authors of image sets publish labels and splits in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from krrst_fast.errors import DataError


def read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read the variables `names` of a .mat file of version 4 to 7, as scipy returns them.

    Raises:
        DataError: scipy is not installed, or the file is missing, damaged, of version 7.3, or holds
            no variable of a name.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(
            f"prepare: {path}: reading .mat files needs scipy: pip install 'krrst-fast[data]'"
        ) from None
    if not path.is_file():
        raise DataError(f"prepare: {path}: there is no such file")
    try:
        found = loadmat(str(path), variable_names=list(names))
    except NotImplementedError:  # scipy's word for HDF5, which is what version 7.3 is
        raise DataError(
            f"prepare: {path}: is a .mat file of version 7.3; save it in MATLAB with -v7"
        ) from None
    except Exception as error:  # damaged bytes lead the reader to errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"prepare: {path}: not a readable .mat file ({reason})") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"prepare: {path}: holds no variable {missing[0]}")
    return {name: found[name] for name in names}


def integers(path: Path, name: str, value: Any) -> npt.NDArray[np.int64]:
    """Return a variable as a flat int64 array; DataError where it does not hold whole numbers."""
    try:
        flat = [np.asarray(one).item() for one in np.asarray(value).ravel()]
        exact = all(isinstance(x, int | float) and x == int(x) and abs(x) < 2**53 for x in flat)
    except (ValueError, TypeError, OverflowError):
        exact = False
    if not exact:
        raise DataError(f"prepare: {path}: {name} must hold whole numbers")
    return np.array([int(x) for x in flat], np.int64)


def texts(path: Path, name: str, value: Any) -> list[str]:
    """Return a cell array of texts as a list; DataError where it holds something else."""
    cells = [np.asarray(one) for one in np.asarray(value, dtype=object).ravel()]
    flat = [cell.ravel()[0] if cell.size == 1 else None for cell in cells]
    if not all(isinstance(text, str) for text in flat):
        raise DataError(f"prepare: {path}: {name} must be a cell array of texts")
    return [str(text) for text in flat]


def field(path: Path, name: str, value: Any, wanted: str) -> list[Any]:
    """Return a field of each element of a struct array; DataError where there is none."""
    names = getattr(value, "dtype", np.dtype(float)).names or ()
    if wanted not in names:
        raise DataError(f"prepare: {path}: {name} has no field {wanted}")
    return list(value[wanted].ravel())
