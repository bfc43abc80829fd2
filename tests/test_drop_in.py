"""docs/drop-in.md: its own code blocks are run, and each "after" must equal its "before".

The page's conventions: a pair is an "Inputs:" line, an optional block of definitions for both
sides, a heading "### Before" with a block that defines `before`, and a heading "### After" with a
block that defines `after`. A heading of its own above the inputs names the pair.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, krr_mse

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "drop-in.md").read_text(encoding="utf-8")
METHODS = [
    "1. KRR-ST",
    "2. FRePo",
    "RFAD with Platt scaling",
    "RFAD with the squared error",
    "4. RCIG",
    "5. A given Gram: KIP and other neural tangent kernels",
    "R2-D2 with krr_predict",
    "R2-D2 with RidgeHead",
    "7. MetaOptNet's head",
    "8. A closed-form probe on frozen features",
]
KINDS = (None, "heading", "inputs", "block")
SIZES = {"M": 20, "B": 15, "D": 48, "P": 4, "T": 3}


@dataclass(frozen=True)
class Pair:
    """One pair of blocks: the name of its section, its inputs, and the code of the two sides."""

    name: str
    inputs: dict[str, str]
    code: dict[str, str]

    def function(self, side: str) -> Callable[..., Tensor]:
        """What the block of that side defines, with the stated inputs as its arguments."""
        namespace: dict = {}
        exec(compile(self.code[side], f"docs/drop-in.md: {self.name}", "exec"), namespace)
        assert side in namespace, f"{self.name}: the block defines no {side}()"
        arguments = list(inspect.signature(namespace[side]).parameters)
        assert arguments == list(self.inputs), f"{self.name}: {side}() takes {arguments}"
        return namespace[side]


def pairs(page: str) -> list[Pair]:
    """The pairs of a page in its order; a block or line that is not where it must be raises."""
    found = []
    title, inputs, shared, before = "", None, "", None
    for kind, text in _parts(page):
        if kind == "heading" and text not in ("Before", "After"):
            assert before is None, f"{title}: a block Before has no block After"
            title, inputs, shared = text, None, ""
        elif kind == "inputs":
            inputs = dict(re.findall(r"`(\w+) (\[[^\]]*\][^`]*)`", text))
        elif kind == "Before":
            assert before is None, f"{title}: two blocks Before in a row"
            before = text
        elif kind == "After":
            assert before is not None, f"{title}: a block After has no block Before"
            assert inputs, f"{title}: no line of inputs"
            found.append(Pair(title, inputs, {"before": shared + before, "after": shared + text}))
            before = None
        elif kind == "block":
            shared = text
    assert before is None, f"{title}: a block Before has no block After"
    return found


def _parts(page: str) -> list[tuple[str, str]]:
    """Headings, lines of inputs and Python blocks, the last by the heading they stand under."""
    heading, inputs, block = r"^##+ (.+)$", r"^(Inputs: .+)$", r"^```python\n((?s:.*?))^```$"
    parts, under = [], ""
    for match in re.finditer(f"{heading}|{inputs}|{block}", page, re.MULTILINE):
        kind, text = KINDS[match.lastindex], match.group(match.lastindex)
        if kind == "heading":
            under = text
        elif kind == "block" and under in ("Before", "After"):
            kind = under
            under = f"{under}, a second block"  # which belongs to neither side
        else:
            assert not under.endswith("a second block"), f"what is this block? {text[:60]}"
        parts.append((kind, text))
    return parts


def values(inputs: dict[str, str], seed: int = 0) -> dict[str, Tensor]:
    """Float64 draws of the stated shapes; "[B] < P" are labels below P."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, text in inputs.items():
        sizes, _, below = text.partition("]")
        shape = [SIZES.get(s) or int(s) for s in re.findall(r"\w+", sizes)]
        if below:
            high = SIZES[below.strip(" <")]
            drawn[name] = torch.randint(high, shape, generator=generator)
        else:
            drawn[name] = torch.randn(shape, dtype=torch.float64, generator=generator)
    return drawn


def loss_and_gradients(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The loss, and its gradient to every floating input; one that gets none raises."""
    leaves = {
        name: x.to(dtype, copy=True).requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    loss = function(**leaves)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    assert wanted, "no input that could have a gradient"
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"loss": loss.detach(), **dict(zip(wanted, grads))}


PAIRS = pairs(PAGE)


def test_every_method_has_a_pair() -> None:
    assert [pair.name for pair in PAIRS] == METHODS


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("seed", range(3))
def test_after_equals_before(pair: Pair, seed: int) -> None:
    before, after = pair.function("before"), pair.function("after")
    inputs = values(pair.inputs, seed)
    exact = loss_and_gradients(before, inputs, torch.float64)
    assert all(x.norm() > 1e-8 for x in exact.values()), "a gradient of zeros compares nothing"
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        for function in (before, after):
            got = loss_and_gradients(function, inputs, dtype)
            for name, value in exact.items():
                error = (got[name].double() - value).abs().max() / value.abs().max()
                assert error <= tolerance, f"{name}, {dtype}: {error:.2e} > {tolerance}"


def test_both_sides_pick_the_same_ridge() -> None:
    """Targets that a regression can learn in part: the best ridge lies inside of the list."""
    pair = next(pair for pair in PAIRS if pair.name.startswith("8."))
    before, after = (pair.function(side).__globals__ for side in ("before", "after"))
    picked = set()
    for noise in (1.0, 10.0, 50.0):
        generator = torch.Generator().manual_seed(0)
        f_syn, w, y = (
            torch.randn(*shape, dtype=torch.float64, generator=generator)
            for shape in ((60, 768), (768, 4), (60, 4))
        )
        f_syn[:, 10:] *= 0.05
        y_syn = f_syn @ w + noise * y
        ridge = before["pick_ridge"](f_syn, y_syn)
        assert after["pick_ridge"](f_syn, y_syn).item() == ridge
        picked.add(ridge)
    assert len(picked - {before["RIDGES"][0], before["RIDGES"][-1]}) >= 2, picked


def test_rows_that_come_twice() -> None:
    """What the page says of FRePo's ridge on 500 rows, half of them copies: medians over draws."""
    before = next(pair for pair in PAIRS if pair.name == "2. FRePo").function("before")
    settings = {"ridge": 1e-6, "ridge_of": "mean_diagonal"}
    ways = (Solver(backend="reference"), Solver(), Solver(precision="float64"))
    errors = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        f_syn, f_real = (torch.randn(n, 2048, generator=generator) + 2 for n in (500, 64))
        f_syn[250:] = f_syn[:250]
        y_syn, y_real = (torch.randn(n, 10, generator=generator) for n in (500, 64))
        tensors = (f_syn, y_syn, f_real, y_real)
        losses = [5 * krr_mse(*tensors, **settings, solver=way) for way in ways]
        try:
            losses.append(before(*tensors))
        except torch.linalg.LinAlgError as error:
            assert "not positive-definite" in str(error)
            losses.append(torch.tensor(torch.inf))
        exact = before(*(x.double() for x in tensors))
        errors.append(torch.stack([x.double() / exact - 1 for x in losses]).abs())
    plain, default, wide, theirs = torch.stack(errors).median(0).values.tolist()
    assert plain > 1 and theirs > 1
    assert 1e-3 < default < 0.5 and wide < 2e-7


@pytest.mark.parametrize("missing", ["### Before", "### After", "Inputs: "])
def test_a_page_with_something_missing_fails(missing: str) -> None:
    for start in [match.start() for match in re.finditer(f"^{missing}", PAGE, re.MULTILINE)]:
        end = PAGE.index("\n", start)
        if missing.startswith("#"):
            end = PAGE.index("\n```\n", start) + 4
        with pytest.raises(AssertionError):
            assert len(pairs(PAGE[:start] + PAGE[end:])) == len(METHODS)


def test_a_pair_without_gradients_fails() -> None:
    code = "def {}(x):\n    return x.detach().square().sum()\n"
    block = "### {}\n\n```python\n{}```\n"
    page = "## A\n\nInputs: `x [M, D]`\n\n"
    for name in ("before", "after"):
        page += block.format(name.title(), code.format(name))
    (pair,) = pairs(page)
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss_and_gradients(pair.function("before"), values(pair.inputs), torch.float64)
