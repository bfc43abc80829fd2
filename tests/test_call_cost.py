"""A call of krr_mse goes through few Python functions, and its signature says what it takes."""

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import krrst_fast
from krrst_fast import (
    gram,
    krr_fit,
    krr_mse,
    krr_path,
    krr_predict,
    krr_predict_from_gram,
    operators,
    ridge_solve,
)

PACKAGE = str(Path(krrst_fast.__file__).parent)


def calls_in(function: Callable[[], Any]) -> Counter[str]:
    """Python calls of the library during function(), by file."""
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found[frame.f_code.co_filename] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
def test_calls_and_files_of_one_step() -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = ((10, 128), (10, 5), (50, 128), (50, 5))
    tensors = [torch.randn(*size, generator=draw) for size in sizes]
    for x in tensors[:2]:
        x.requires_grad_()
    losses = []

    def forward() -> None:
        losses.append(krr_mse(*tensors, ridge=1e-6, bias=1.0))

    forward()  # the first call imports and fills caches
    losses[0].backward()
    found = calls_in(forward)
    assert sum(found.values()) <= 30 and len(found) <= 7, found
    with torch.autograd.set_multithreading_enabled(False):  # else another thread runs it
        found = calls_in(lambda: losses[1].backward())
    assert 5 < sum(found.values()) <= 20, found


@pytest.mark.parametrize(
    "function", [krr_mse, krr_predict, krr_fit, krr_path, krr_predict_from_gram, ridge_solve, gram]
)
def test_the_signature_is_explicit_and_described(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert function is krr_path or "solver" in parameters
    page = inspect.getdoc(function)
    assert page is not None
    described = page.split("Args:\n")[1].split("Returns:\n")[0]
    for name in parameters:
        assert f"    {name}: " in described, name
