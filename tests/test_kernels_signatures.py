"""Each kernel is called like its twin in `reference`, which is known without importing triton."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from krrst_fast import reference
from krrst_fast.reference import kernels as functions


def _twin(name: str) -> Any:
    return getattr(reference, name, None) or getattr(functions, name, None)


KERNELS = Path(__file__).resolve().parent.parent / "kernels"
TWINS = {
    path.stem: [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and _twin(node.name) is not None
    ]
    for path in sorted(KERNELS.glob("*.py"))
}
FUNCTIONS = [(module, node) for module, nodes in TWINS.items() for node in nodes]


@pytest.mark.parametrize("module, node", FUNCTIONS, ids=[node.name for _, node in FUNCTIONS])
def test_parameters_are_those_of_the_reference(module: str, node: ast.FunctionDef) -> None:
    twin = inspect.signature(_twin(node.name)).parameters
    assert [argument.arg for argument in node.args.args] == list(twin)
    assert {argument.arg for argument in node.args.kwonlyargs} <= {"input_precision"}


def test_every_file_named_like_an_operator_has_it() -> None:
    # The last one has the two functions of `reference.kernels`.
    helpers = {"__init__", "common", "tiles", "absmax", "closing_terms", "kernel_functions"}
    found = {node.name for node in TWINS["kernel_functions"]}
    assert found == {"kernel_values", "kernel_slopes"}
    files = [path.stem for path in KERNELS.glob("*.py") if path.stem not in helpers]
    assert sorted(files) == ["closing_matmul", "gram", "residual_mse", "thin_matmul", "views"]
    for name in files:
        assert any(node.name.endswith(name) for node in TWINS[name])
