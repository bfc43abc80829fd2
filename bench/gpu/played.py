"""The launches of all stages, found by making their calls on a simulated GPU, without values.

A call that is missing here costs time, as its kernels are then compiled when the stage makes it.
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
from krrst_fast import operators
from krrst_fast.backends import triton, tuned
from krrst_fast.data.augment import ViewConfig, draw_views

Call = Callable[[], Any]


def bare(x: Tensor) -> Tensor:
    """Return a tensor with the shape and strides of x, without values."""
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return empty.requires_grad_(x.requires_grad)


@contextlib.contextmanager
def played_gpu(arch: int, note: Callable[[Any], None]) -> Iterator[None]:
    """Take tensors without values for tensors on a GPU, and pass their launches to `note`.

    The backend "auto" then computes residuals by torch and everything else by Triton. Together with
    the backend "triton" it launches every kernel that any table of measurements could choose.
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
            (triton, "refuses_device", lambda x: None if x.is_meta else "it is played"),
            (tuned, "tables", lambda: {"meta": {"rows": []}}),
            (tuned, "_by_triton", lambda part, x, *size: x.ndim == 2 and part != "mse"),
            (operators, "HAS_CUDA_EXTENSION", True),
        ):
            stack.enter_context(mock.patch.object(module, name, played))
        yield


def calls(toy: bool) -> Iterator[tuple[str, Call]]:
    """Yield the calls of the stages that launch kernels, by name."""
    for shape in krr.TOY if toy else krr.FULL:
        with FakeTensorMode():
            drawn = krr.inputs(shape, "cpu")
        for way in krr.alternatives():
            if way.backend != "torch":
                yield f"krr {shape.m}x{shape.p} {way.name}", way.call([bare(x) for x in drawn])
    for part, (make, sizes) in (parts.TOY if toy else parts.FULL).items():
        for precision, size in ((x, size) for x in sizes for size in sizes[x]):
            call = make(size, precision, "meta").calls.get("triton")
            if call is not None:
                yield f"{part} {precision} {'x'.join(map(str, size))}", call
    images = torch.empty(100, 3, 32, 32, dtype=torch.uint8, device="meta")
    config, index = ViewConfig(), torch.zeros(100, dtype=torch.int64)
    draw = map(bare, draw_views(index, config, torch.Generator()))
    views = importlib.import_module("krrst_fast.kernels.views").views
    yield "views", partial(views, images, *draw, config.padding, (0.5,) * 3, (0.5,) * 3)
    if not toy:
        shapes = importlib.import_module("tests.test_gpu_krr").SHAPES
        for call in sanitized.krr("meta", [*sanitized.SHAPES, *shapes]):
            yield "test", call
