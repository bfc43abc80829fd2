"""The closed form for a shape, from counted operations and memory; nothing is measured."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from krrst_fast.planner.limits import free_memory
from krrst_fast.planner.peaks import peak_bytes
from krrst_fast.planner.sizes import Form, suits_whole

__all__ = ["FORMS", "Form", "Plan", "cached_cheapest", "cheapest", "plan"]

FORMS: tuple[Form, ...] = ("k", "w", "primal")


@dataclass(frozen=True)
class Plan:
    """The form that is chosen for a shape, and the cost of each form.

    Attributes:
        form: "k" | "w" | "primal".
        flops: Floating-point operations of forward and backward pass, by form.
        bytes: Peak memory of forward and backward pass beyond the inputs, by form: saved tensors,
            temporaries and gradients, those of the C++ operators and of LAPACK included.
        reason: One sentence.
        peak: `bytes` of the chosen form.
        inputs: Bytes of F_s, Y_s, F_r and Y_r.
        memory: The limit in bytes, or None where none was asked for or none holds.
        fits: Whether inputs and peak are within the limit, or None without one.
        chunk: None where the call fits. Otherwise the largest number of rows of F_r and Y_r such
            that so many, or fewer, at a time fit in this form, beside a sum of the gradients to F_s
            and Y_s; 0 where not even one does. Loss and gradients are the sums over the chunks of
            those of a chunk, times its rows / B. Only the rows of a chunk count as inputs.
    """

    form: Form
    flops: dict[Form, float]
    bytes: dict[Form, int]
    reason: str
    peak: int
    inputs: int
    memory: int | None = None
    fits: bool | None = None
    chunk: int | None = None


def plan(
    *,
    m: int,
    b: int,
    d: int,
    p: int,
    problems: int = 1,
    itemsize: int = 4,
    memory: int | str | None = None,
    device: str = "cpu",
) -> Plan:
    """Choose the closed form for M synthetic and B real images, D features and P target features.

    Counted are one forward pass and the gradients to `f_syn` and `y_syn`; a Gram counts half of the
    full product, a multiply-add counts two. "k" keeps K_rs [B, M]; "w" goes through W = F_s^T alpha
    [D, P] and never multiplies M x M by D; "primal" solves in D x D and is taken only when M > D.

    With `memory` the cheapest form is taken of those that fit into it, and where none does, of
    those that fit in chunks of B. `krr_mse` chooses by operations alone: pass it
    `Solver(form=plan.form)`.

    The peak is that of the compiled extension on a CPU with AVX-512, in one thread or two, right to
    within 10 %, or 0.1 MB where it is below 1 MB. With narrower vectors, problems that are computed
    by one operator take 30 % less to 13 % more; a batch takes about what its problems would
    together, or less; the primal form with a bias and D = 512 in float32 takes 30 % less. Not
    counted: what libraries take once and keep (buffers of MKL, some MB); gradients to F_r or to the
    ridge; float64, in which the primal form computes for rows of uneven norms. On a GPU the peak
    was not measured.

    Args:
        m, b, d, p: The sizes.
        problems: The number of problems in the batch (leading dimensions).
        itemsize: Bytes of a number of the inputs: 2, 4 or 8. Half precision is copied to float32.
        memory: What inputs and peak have to fit into: bytes; "auto" for what this process can still
            take on the device, before there are inputs; None to ask nothing. "auto" is on the CPU
            the least of what the limits of its cgroups, /proc/meminfo (MemAvailable), RLIMIT_AS and
            RLIMIT_DATA leave; on a GPU what the driver has left and torch's allocator holds unused.
        device: "cpu", "cuda" or "cuda:i".

    Raises:
        ValueError: A size or the memory is negative, memory is another string, or the device is
            another one, or for "auto" a GPU that torch does not see.
        TypeError: The memory is neither a whole number, a string nor None.
    """
    sizes = {"m": m, "b": b, "d": d, "p": p, "problems": problems, "itemsize": itemsize}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"plan: {name} must not be negative, got {size}")
    kind, _, index = str(device).partition(":")
    if str(device) not in ("cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError(f"plan: device must be 'cpu', 'cuda' or 'cuda:i', got {device!r}")
    shape = _Shape(m, b, d, p, problems, itemsize, kind == "cpu")
    limit = _limit(memory, str(device))
    form = cheapest(m, b, d, p)
    reasons: dict[Form, str] = {
        "primal": f"M = {m} > D = {d}: the D x D system is the smaller one",
        "w": f"P = {p}: products with W [D, P] cost less than K_rs [B, M]",
        "k": f"P = {p} is large: products with W [D, P] cost more than K_rs [B, M]",
    }
    reason, fits, chunk = reasons[form], None, None
    if limit is not None:
        best, chunk = _that_fits(shape, form, limit)
        fits = chunk is None
        reason += _in_words(shape, form, best, chunk, limit)
        form = best
    return Plan(
        form=form,
        flops={name: problems * count for name, count in _flops(m, b, d, p).items()},
        bytes={name: shape.peak(name, b) for name in FORMS},
        reason=reason,
        peak=shape.peak(form, b),
        inputs=shape.inputs(b),
        memory=limit,
        fits=fits,
        chunk=chunk,
    )


def cheapest(m: int, b: int, d: int, p: int) -> Form:
    """Return the form that `plan` chooses; it only compares, so that sizes may be symbolic."""
    if m == 0 or d == 0:
        return "w"  # nothing to solve, or nothing to solve it with
    flops = _flops(m, b, d, p)
    if m > d and flops["primal"] < flops["k"] and flops["primal"] < flops["w"]:
        return "primal"
    return "w" if flops["w"] <= flops["k"] else "k"


cached_cheapest = lru_cache(maxsize=4096)(cheapest)
"""`cheapest` for sizes that are numbers."""


def _flops(m: int, b: int, d: int, p: int) -> dict[Form, float]:
    return {"k": _k(m, b, d, p), "w": _w(m, b, d, p), "primal": _primal(m, b, d, p)}


def _dual_solve(m: int, p: int) -> float:
    return m**3 / 3 + 4 * m * m * p


def _k(m: int, b: int, d: int, p: int) -> float:
    predict = m * m * d + 2 * b * m * d + 2 * b * m * p
    backward = 4 * b * m * p + 2 * m * m * p + 2 * m * (b + m) * d
    return _dual_solve(m, p) + predict + backward


def _w(m: int, b: int, d: int, p: int) -> float:
    predict = m * m * d + 2 * m * d * p + 2 * b * d * p
    backward = 2 * b * d * p + 4 * m * d * p + 4 * m * p * d
    return _dual_solve(m, p) + predict + backward


def _primal(m: int, b: int, d: int, p: int) -> float:
    predict = m * d * d + d**3 / 3 + 2 * m * d * p + 2 * d * d * p + 2 * b * d * p
    backward = 2 * b * d * p + 2 * d * d * p + 4 * m * d * p + 4 * m * p * d
    return predict + backward


@dataclass(frozen=True)
class _Shape:
    """The sizes of a call; how many rows of F_r there are is asked for."""

    m: int
    b: int
    d: int
    p: int
    problems: int
    itemsize: int
    on_cpu: bool

    def inputs(self, rows: int) -> int:
        """Return the bytes of the inputs with so many rows of F_r and Y_r."""
        return self.problems * (self.m + rows) * (self.d + self.p) * self.itemsize

    def peak(self, form: Form, rows: int) -> int:
        """Return the peak beyond the inputs in bytes."""
        size = max(4, self.itemsize)  # of a number of the computation
        whole = self._whole(form, rows)
        one = peak_bytes(form, self.m, rows, self.d, self.p, size, whole)
        if self.itemsize < size:
            one += (self.m + rows) * (self.d + self.p) * size
        return self.problems * one

    def largest_chunk(self, form: Form, limit: int) -> int:
        """Return the largest number of rows, less than B, for which it and all smaller ones fit."""
        # One operator for each pass may take more than the steps of a larger problem.
        turn = bisect_left(range(1, self.b), True, key=lambda rows: not self._whole(form, rows))
        summed = self.problems * self.m * (self.d + self.p) * self.itemsize

        def exceeds(rows: int) -> bool:
            needs = (self.inputs(x) + self.peak(form, x) for x in (rows, min(rows, turn)) if x)
            return max(needs) + summed > limit

        return bisect_left(range(1, self.b), True, key=exceeds)

    def _whole(self, form: Form, rows: int) -> bool:
        return self.on_cpu and suits_whole(form, self.problems, self.m, self.d, rows, self.p)


def _limit(memory: Any, device: str) -> int | None:
    """Check what `plan` was given as memory, and return the limit in bytes."""
    if memory is None:
        return None
    if isinstance(memory, str):
        if memory != "auto":
            raise ValueError(f"plan: memory must be a number of bytes or 'auto', got {memory!r}")
        return free_memory(device)
    if isinstance(memory, bool) or not hasattr(memory, "__index__"):
        raise TypeError(f"plan: memory must be a whole number, 'auto' or None, got {memory!r}")
    limit = int(memory)
    if limit < 0:
        raise ValueError(f"plan: memory must not be negative, got {limit}")
    return limit


def _that_fits(shape: _Shape, form: Form, limit: int) -> tuple[Form, int | None]:
    """Return the cheapest form that fits, and its chunk: None where all rows fit at once.

    form: What is cheapest without a limit.
    """
    m, b, d, p = shape.m, shape.b, shape.d, shape.p
    flops = _flops(m, b, d, p)
    others = [x for x in FORMS if x != form and (x != "primal" or m > d)]
    # Without rows or features there is nothing to choose from.
    forms = [form, *sorted(others, key=lambda x: flops[x])] if m and d else [form]
    for name in forms:
        if shape.inputs(b) + shape.peak(name, b) <= limit:
            return name, None
    chunks = {name: shape.largest_chunk(name, limit) for name in forms}
    possible = [name for name in forms if chunks[name]]
    if not possible:
        return form, 0
    # Each chunk factors and solves anew.
    best = min(possible, key=lambda x: -(-b // chunks[x]) * _flops(m, chunks[x], d, p)[x])
    return best, chunks[best]


def _in_words(shape: _Shape, form: Form, best: Form, chunk: int | None, limit: int) -> str:
    """Return the end of the reason: how the chosen form is within the limit."""

    def needs(name: Form) -> str:
        return f"{_size(shape.inputs(shape.b))} of inputs and {_size(shape.peak(name, shape.b))}"

    within = f"the {_size(limit)} of memory"
    if chunk is None:
        instead = f'; "{form}" does not fit and "{best}" is taken' if best != form else ""
        return f"{instead}; {needs(best)} beyond them fit into {within}"
    text = f"; {needs(form)} beyond them do not fit into {within}"
    if chunk == 0:
        return f"{text}, nor does one row of F_r at a time"
    instead = f' in form "{best}"' if best != form else ""
    return f"{text}: at most {chunk} of B = {shape.b} rows of F_r at a time do{instead}"


def _size(count: int) -> str:
    """Return bytes in words, with three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"
