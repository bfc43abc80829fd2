"""What `krrst_fast.selftest` says of the choice among implementations, and why each was made."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from krrst_fast import backends, gpu
from krrst_fast.backends import Backend, choose
from krrst_fast.planner import plan

# A shape, and whether it is stored by columns.
Layout = tuple[tuple[int, ...], bool]

GRAMS = ((30, 512), (100, 2048), (1000, 8192))
PRODUCTS = ((8192, 1000, 10), (8192, 1000, 100), (8192, 1000, 512), (1024, 8192, 10))
BATCHES = ((16, 25, 1600), (64, 100, 512))
PROBLEMS = (
    {"m": 10, "b": 256, "d": 25088, "p": 2048},
    {"m": 100, "b": 256, "d": 2048, "p": 64},
    {"m": 1000, "b": 1024, "d": 8192, "p": 10},
    {"m": 1000, "b": 1024, "d": 8192, "p": 512},
    {"m": 5000, "b": 1024, "d": 512, "p": 512},
)


class _Calls(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def choices(device: str) -> list[str]:
    """One line for each representative size: who takes it, with which operator, and why."""
    here = torch.empty(1, 1, device=device)
    first = choose("auto", here, "selftest")
    lines = [f"backend on {device}: {first.name}"]
    for backend in backends.BACKENDS:
        reason = backend.refuses(here)
        if backend.name != first.name:
            why = f"can, but {first.name} comes first"
            if reason or backend.on_request:
                why = f"refuses: {reason}" if reason else "can, on request only"
            lines.append(f"  {backend.name} {why}")
    lines += _measured(here) if device == "cuda" else _by_calls(first)
    for problem in PROBLEMS:
        planned = plan(**problem)
        shape = ", ".join(f"{letter.upper()} {size}" for letter, size in problem.items())
        lines.append(f"krr_mse {shape}: form {planned.form}; {planned.reason}")
    return lines


def _measured(here: Tensor) -> list[str]:
    """Who computes the parts of each problem on a GPU, and what was measured."""
    lines = []
    for problem in PROBLEMS:
        m, b, d, p = (problem[letter] for letter in "mbdp")
        parts = {
            f"gram [{m}, {d}]": ("gram", (m, d)),
            f"[{b}, {d}] by rows times [{d}, {p}]": ("matmul", (b, d, p)),
            f"[{d}, {m}] by columns times [{m}, {p}]": ("matmul_t", (d, m, p)),
            f"prediction and MSE [{b}, {p}]": ("mse", (b, d, p)),
            f"last product of the gradient [{m}, {d}]": ("closing", (m, d, p)),
        }
        for dtype in (torch.float32, torch.float16):
            for what, (part, size) in parts.items():
                if part == "closing" and dtype == torch.float16:
                    continue
                chosen = gpu.choice(part, here.to(dtype), *size)
                word = "fast" if dtype == torch.float16 else "float32"
                lines.append(f"{what}, {word}: {chosen.name}; {chosen.why}")
        how = gpu.solver_choice(here, m, p)
        lines.append(f"factor and solves [{m}, {m}], {p} columns: {how.name}; {how.why}")
    for count, m, _ in BATCHES:
        how = gpu.solver_choice(here, count, m, 5)
        lines.append(f"{count} of them [{m}, {m}], 5 columns: {how.name}; {how.why}")
    return list(dict.fromkeys(lines))


def _by_calls(first: Backend) -> list[str]:
    """Who computes each representative call on the CPU, from what is called."""
    # `backends.py` has the limits and what was measured; "torch" has no operators of its own.
    why = "" if first.name == "torch" else ": outside the sizes its own operator is taken for"
    lines = []
    for what, part, sizes in _calls(first):
        who = {
            str(dtype).removeprefix("torch."): _who(part, sizes, dtype, why)
            for dtype in (torch.float32, torch.float64)
        }
        if len(set(who.values())) == 1:
            who = {"float32 and float64": who["float32"]}
        lines += [f"{what}, {dtype}: {name}" for dtype, name in who.items()]
    return lines


def _calls(backend: Backend) -> Iterator[tuple[str, Callable[..., Tensor], list[Layout]]]:
    """Representative calls: in words, the function, and the shapes (and layouts) of its tensors."""

    def gram(x: Tensor) -> Tensor:
        return backend.gram(x, 1.0, 1.0)

    for n, d in GRAMS:
        yield f"gram [{n}, {d}]", gram, [((n, d), False)]
    for count, m, d in BATCHES:
        yield f"gram of {count} problems [{m}, {d}]", gram, [((count, m, d), False)]
    for n, k, p in PRODUCTS:
        for word, by_columns in (("rows", False), ("columns", True)):
            what = f"[{n}, {k}] by {word} times [{k}, {p}]"
            yield what, backend.matmul, [((n, k), by_columns), ((k, p), False)]


def _who(
    function: Callable[..., Tensor], layouts: list[Layout], dtype: torch.dtype, why: str
) -> str:
    """The operator that does the work: on tensors without values, which cost nothing."""
    tensors = []
    for shape, by_columns in layouts:
        stored = torch.empty(shape[::-1] if by_columns else shape, dtype=dtype, device="meta")
        tensors.append(stored.mT if by_columns else stored)
    try:
        with _Calls() as calls:
            function(*tensors)
    except Exception as error:
        return f"raises {type(error).__name__}: {error}".splitlines()[0]
    for name in calls.names:
        if name.startswith("krrst_fast::") and not name.endswith("::matmul"):
            return f"{name}, its own operator"
    product = next((n for n in calls.names if n.endswith(("mm", "matmul"))), calls.names[0])
    return f"{product}, torch's BLAS{why}"
