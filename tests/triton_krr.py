"""The operators by the backend "triton", under Triton's interpreter, in a process of their own.

Run as a program with TRITON_INTERPRET=1, as `tests/test_krr_triton.py` does; prints JSON.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from krrst_fast import Solver, backends, gram, krr_fit, krr_mse, krr_predict, reference
from tests.helpers import neighbour, problem

# More rows than a block, primes, one column, M > D.
SHAPES = ((35, 70, 17, 3), (67, 31, 20, 1))
NEIGHBOURS = 16
KERNEL: dict[str, Any] = {"bias": 0.5, "scale": 2.0, "ridge_of": "mean_diagonal"}


def results(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The value and its gradients to all tensors."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad(value, leaves, weights)]


def wrong(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative errors; one that is not a number is 1."""
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
    return [error if error < 1 else 1.0 for error in errors]


def learnt(op: Callable[..., Any], *tensors: Tensor, **options: Any) -> Tensor:
    """The last tensor is the ridge."""
    return op(*tensors[:-1], ridge=tensors[-1], **KERNEL, **options)


def regression(
    op: Callable[..., Any], form: str, tensors: list[Tensor], backend: str, **options: Any
) -> list[Tensor]:
    """The value and all gradients by one backend."""
    solver = Solver(form=form, backend=backend, **options)
    return results(partial(learnt, op, detach_ridge=False, solver=solver), tensors)


def only_gram(tensors: list[Tensor], backend: str) -> list[Tensor]:
    """The gram of what is first."""
    return [gram(tensors[0], scale=2.0, bias=0.5, solver=Solver(backend=backend))]


def allowed(how: Callable[..., Any], tensors: list[Tensor], precision: str | None) -> list[float]:
    """Twice the largest error of plain PyTorch over problems beside this one, for each result.

    A norm of many errors is much the same in every draw. A single number, as the loss and the
    gradient of the ridge are, is luck: four times.
    """
    largest = [0.0] * 9
    for seed in range(NEIGHBOURS):
        moved = seen(neighbour(tensors, seed), precision)
        exact, plain = how([x.double() for x in moved], "reference"), how(moved, "torch")
        largest = [max(pair) for pair in zip(largest, wrong(plain, exact))]
        times = [2 if x.numel() > 1 else 4 for x in exact]
    return [n * error + 2.0**-21 for n, error in zip(times, largest)]


def seen(tensors: list[Tensor], precision: str | None) -> list[Tensor]:
    """The problem that is solved: "fast" rounds features, which come first and third."""
    tensors = list(tensors)
    if precision == "fast":
        tensors[0], tensors[2] = reference.round_features(tensors[0], tensors[2])
    return tensors


def calls() -> Iterator[tuple[str, list[float], list[float]]]:
    """Each call with the errors of the kernels, and what is allowed."""
    for shape in SHAPES:
        single = [*(x.float() for x in problem(*shape)), torch.tensor(0.01)]
        for precision in (None, "fast"):
            for op, pick in ((krr_mse, slice(0, 5)), (krr_predict, (0, 1, 2, 4))):
                tensors = single[pick] if isinstance(pick, slice) else [single[i] for i in pick]
                # A prediction differs from the loss in its readout alone.
                for form in ("k", "w", "primal") if op is krr_mse else ("w",):
                    how = partial(regression, op, form)
                    exact = how([x.double() for x in seen(tensors, precision)], "reference")
                    got = wrong(how(tensors, "triton", precision=precision), exact)
                    name = f"{op.__name__} {shape} {form} {precision}"
                    yield name, got, allowed(how, tensors, precision)
        exact = only_gram([x.double() for x in single], "reference")
        got = wrong(only_gram(single, "triton"), exact)
        yield f"gram {shape}", got, allowed(only_gram, single, None)


def mapped() -> dict[str, float]:
    """vmap and batched gradients, each with its error against a loop, or the gradients one by one.

    The features of the problems differ by more than float16 holds.
    """
    many = [torch.stack(x).float() for x in zip(*(problem(7, 13, 5, 2, seed=i) for i in range(3)))]
    many[0], many[2] = (f * torch.tensor([1.0, 1e8, 1e-8])[:, None, None] for f in many[::2])
    worst = {}
    for precision in (None, "fast"):
        solver = Solver(backend="triton", precision=precision)
        flagged = replace(solver, check="flag")
        loss = partial(krr_mse, **{**KERNEL, "bias": 0.0}, ridge=0.01, solver=flagged)
        looped = torch.stack([loss(*one) for one in zip(*many)]).double()
        worst[f"vmap {precision}"] = wrong([torch.func.vmap(loss)(*many)], [looped])[0]
        for form in ("k", "w", "primal"):
            leaf = many[0][0].clone().requires_grad_()
            out = krr_predict(
                *(leaf, many[1][0], many[2][0]),
                solver=replace(solver, form=form),
                ridge=0.01,
                detach_ridge=False,
                **KERNEL,
            )
            basis = torch.eye(out.numel()).reshape(-1, *out.shape)

            def back(v: Tensor, out: Tensor = out, leaf: Tensor = leaf) -> Tensor:
                return torch.autograd.grad(out, leaf, v, retain_graph=True)[0]

            exact = torch.stack([back(v) for v in basis]).double()
            (rows,) = torch.autograd.grad(
                out, leaf, basis, is_grads_batched=True, retain_graph=True
            )
            got = max(wrong([rows], [exact]) + wrong([torch.func.vmap(back)(basis)], [exact]))
            worst[f"gradients {form} {precision}"] = got
    return worst


def far_bias() -> list[float]:
    """Scale and bias of the units of the features, however large: float16 has its own."""
    errors = []
    for size in (1e-14, 1.0, 1e12):
        f_syn, y_syn, f_real, _ = (x.float() for x in problem(*SHAPES[1]))
        how = partial(krr_predict, ridge=0.01, bias=size**2)
        primal = Solver(form="primal")
        fast = replace(primal, backend="triton", precision="fast")
        tensors = [size * f_syn, y_syn, size * f_real]
        rounded = reference.round_features(tensors[0], tensors[2])
        exact = how(rounded[0].double(), y_syn.double(), rounded[1].double(), solver=primal)
        errors += wrong([how(*tensors, solver=fast)], [exact])
    return errors


def stays_itself() -> dict[str, Any]:
    """What is no comparison of numbers."""
    f_syn, y_syn, f_real, y_real = (x.float().requires_grad_() for x in problem(*SHAPES[0]))
    call = partial(krr_mse, f_syn, y_syn, f_real, y_real)
    fast = Solver(backend="triton", precision="fast")
    loss, info = call(return_info=True, solver=replace(fast, check="flag"))
    node = loss.grad_fn
    while node is not None and "Direct" not in node.name():
        node = node.next_functions[0][0]
    halves = [x.dtype for x in node.saved_tensors if x is not None and x.ndim == 2]
    (first,) = torch.autograd.grad(loss, f_syn, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y_syn)
    plain = [x.detach().double().requires_grad_() for x in (f_syn, y_syn, f_real, y_real)]
    (first,) = torch.autograd.grad(krr_mse(*plain), plain[0], create_graph=True)
    (exact,) = torch.autograd.grad(first.sum(), plain[1])
    fit = krr_fit(f_syn, y_syn, solver=Solver(backend="triton", precision="fast"))
    many = torch.stack((f_syn, 2 * f_syn))
    batch = krr_predict(many, y_syn, f_real, solver=Solver(backend="triton", precision="fast"))
    alone = krr_predict(many[1], y_syn, f_real, solver=Solver(backend="triton", precision="fast"))
    again = [call(solver=fast).item() for _ in range(2)]
    refusals = {name: x.refuses(f_syn) for name, x in backends.BACKENDS.items()}
    refusals["tuned"] = backends.tuned.refuses(f_syn)
    with FakeTensorMode():
        refusals["fake"] = backends.triton.refuses(torch.empty(1, 1))
    try:
        call(solver=Solver(backend="triton", precision="float64"))
        refused = "no error"
    except ValueError as error:
        refused = str(error)
    return {
        "info": [info.backend, info.retries.item(), bool(info.failed)],
        "halves": sum(dtype == torch.float16 for dtype in halves),
        "second": wrong([second], [exact])[0],
        "fit": wrong([fit.predict(f_real)], [krr_predict(f_syn, y_syn, f_real).double()])[0],
        "batch": wrong([batch[1]], [alone.double()])[0],
        "mapped": mapped(),
        "far bias": far_bias(),
        "same bits": again[0] == again[1],
        "refusals": refusals,
        "float64": refused,
    }


def main() -> None:
    torch.use_deterministic_algorithms(True)
    compared = [{"call": name, "got": a, "allowed": b} for name, a, b in calls()]
    json.dump({"compared": compared, **stays_itself()}, sys.stdout)


if __name__ == "__main__":
    main()
