"""Each kernel is called like its twin in `reference`, which is known without importing triton."""

import ast
import inspect
from pathlib import Path

import pytest

from krrst_fast import reference

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
TWINS = {
    path.stem: [
        node
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and hasattr(reference, node.name)
    ]
    for path in sorted(KERNELS.glob("*.py"))
}
FUNCTIONS = [(module, node) for module, nodes in TWINS.items() for node in nodes]


@pytest.mark.parametrize("module, node", FUNCTIONS, ids=[node.name for _, node in FUNCTIONS])
def test_parameters_are_those_of_the_reference(module: str, node: ast.FunctionDef) -> None:
    twin = inspect.signature(getattr(reference, node.name)).parameters
    assert [argument.arg for argument in node.args.args] == list(twin)
    assert {argument.arg for argument in node.args.kwonlyargs} <= {"input_precision"}


def test_every_file_named_like_an_operator_has_it() -> None:
    helpers = {"__init__", "common", "tiles", "absmax", "closing_terms"}
    files = [path.stem for path in KERNELS.glob("*.py") if path.stem not in helpers]
    assert sorted(files) == ["closing_matmul", "gram", "residual_mse", "thin_matmul", "views"]
    for name in files:
        assert any(node.name.endswith(name) for node in TWINS[name])
