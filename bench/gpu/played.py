"""What the stages launch, found by making their own calls on a simulated GPU, without values.

A stage whose calls are missing here finds its kernels not compiled ahead: slower, not wrong.
"""

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu import krr, parts, sanitized
from krrst_fast import gpu, krr_mse, library, measured, selftest_checks
from krrst_fast.data.augment import ViewConfig, draw_views

Call = Callable[[], Any]
TRITON_BACKENDS = ("triton", "cuda", "tuned")
"""Those of `backends.py` that launch Triton kernels."""


def bare(x: Tensor) -> Tensor:
    """A tensor like x without values, as it lies in memory."""
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return empty.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def played_gpu(arch: int, note: Callable[[Any], None]) -> Iterator[None]:
    """Tensors without values count as being on a GPU; what is launched there is noted, not run.

    The backend "tuned" computes residuals by torch and all else by Triton: whatever a table of
    measurements says, it launches what this or "triton" does.
    """

    def noted(launches: Sequence[Any], on: Tensor) -> None:
        for launch in launches:
            note(launch)

    package = importlib.import_module("krrst_fast.kernels")
    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            for name, played in (("run", noted), ("architecture", lambda x: arch)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, played))
        for module, name, played in (
            (gpu, "_place_refuses", lambda x: None if x.is_meta else "it is played"),
            (measured, "tables", lambda: {"meta": {"rows": []}}),
            (gpu, "_wins", lambda part, x, *size: x.ndim == 2 and part != "mse"),
            (library, "has_cuda_extension", lambda: True),
        ):
            stack.enter_context(mock.patch.object(module, name, played))
        yield


def of_krr(toy: bool) -> Iterator[tuple[str, Call]]:
    """The calls of the table of KRR losses."""
    for shape in krr.TOY if toy else krr.FULL:
        with FakeTensorMode():
            drawn = krr.inputs(shape, "cpu")
        for way in krr.alternatives(shape, "cuda"):
            if way.backend in TRITON_BACKENDS and way.precision != "float64":
                yield f"krr {shape.m}x{shape.p} {way.name}", way.call([bare(x) for x in drawn])


def of_parts(toy: bool) -> Iterator[tuple[str, Call]]:
    """The calls of the parts that Triton has."""
    for part, (make, sizes) in (parts.TOY if toy else parts.FULL).items():
        for precision, those in sizes.items():
            for size in those:
                call = make(size, precision, "meta").calls.get("triton")
                if call is not None:
                    yield f"{part} {precision} {'x'.join(map(str, size))}", call


def of_step(toy: bool) -> Iterator[tuple[str, Call]]:
    """The views of an outer step; its KRR loss is among those above."""
    images = torch.empty(100, 3, 32, 32, dtype=torch.uint8, device="meta")
    config = ViewConfig()
    drawn = draw_views(100, config, torch.Generator())
    draw = (torch.empty(100, dtype=torch.int64, device="meta"), *map(bare, drawn))
    views = importlib.import_module("krrst_fast.kernels.views").views
    yield "views", partial(views, images, *draw, config.padding, (0.5,) * 3, (0.5,) * 3)


def of_selftest(toy: bool) -> Iterator[tuple[str, Call]]:
    """The calls of the self-test's checks, without the formulas they are compared with."""
    if toy:
        return
    calls: list[tuple[str, Call]] = []

    def run(
        check: str, backend: str, got: Any, formula: Any, problems: Any, precision: Any
    ) -> selftest_checks.Result:
        if backend in TRITON_BACKENDS and precision.plain != torch.float64:
            for problem in problems:
                call = partial(selftest_checks._evaluate, got, problem, precision.dtype)
                calls.append((f"selftest {check} {backend} {precision.name}", call))
        return selftest_checks.Result(check, backend, "", 0.0, 0.0, 0.0)

    def timed(check: str, backend: str, precision: str, work: Any) -> selftest_checks.Result:
        return selftest_checks.Result(check, backend, "", 0.0, 0.0, 0.0)

    with mock.patch.multiple(selftest_checks, run=run, timed=timed):
        for _ in selftest_checks.checks("meta"):
            pass
    yield from calls


def of_tests(toy: bool) -> Iterator[tuple[str, Call]]:
    """The calls of `tests/test_gpu_krr.py`, whose shapes are read there."""
    if toy:
        return
    tests = importlib.import_module("tests.test_gpu_krr")
    # Those of its tests of something else than numbers.
    others = [(777, 1500, 300, 33), (600, 1024, 256, 64), (600, 64, 40, 3), (600, 700, 40, 3)]
    for m, d, b, p in [*tests.SHAPES, *others]:
        sizes = ((m, d), (m, p), (b, d), (b, p))
        leaves = [torch.empty(*size, device="meta", requires_grad=True) for size in sizes]
        for backend in TRITON_BACKENDS:
            for precision in (None, "fast"):
                for form in ("k", "w", *(("primal",) if m > d else ())):
                    how = {**tests.FLAG, "backend": backend, "precision": precision, "form": form}
                    loss = partial(krr_mse, **how)
                    name = f"test {m}x{d}x{b}x{p} {backend} {precision} {form}"
                    yield name, partial(tests.results, loss, leaves)
    for backend in TRITON_BACKENDS:
        many = [torch.empty(6, *size, device="meta") for size in ((25, 64), (25, 5), (15, 64))]
        many += [torch.empty(6, 15, 5, device="meta"), torch.empty(6, device="meta")]

        def loss(*leaves: Tensor, backend: str = backend) -> Tensor:
            options = {**tests.OPTIONS, "ridge": leaves[-1], "backend": backend}
            return krr_mse(*leaves[:-1], **options).sum()

        yield f"test of a batch {backend}", partial(tests.results, loss, many)


def of_sanitized(toy: bool) -> Iterator[tuple[str, Call]]:
    """The calls that compute-sanitizer watches: nothing is to be compiled under it."""
    for call in () if toy else sanitized.krr("meta"):
        if call.args[0]["backend"] in TRITON_BACKENDS:
            yield "sanitized", call


GROUPS = (of_sanitized, of_krr, of_parts, of_step, of_selftest, of_tests)
