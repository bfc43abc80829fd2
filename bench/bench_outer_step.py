"""The outer step of a distillation, with the library's KRR loss and with the reference's."""

import copy
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.common import Case, Comparison
from krrst_fast.backends import BackendName
from krrst_fast.data.augment import ViewConfig
from krrst_fast.distill import step
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Epochs, Source
from krrst_fast.models import ModelConfig
from krrst_fast.ops.krr import krr_mse
from krrst_fast.seeding import generator

IMAGES = 1024
RATE = step.LinearDecay(start=1e-4, final=1e-7, steps=160_000)


class Shape(NamedTuple):
    """M synthetic and B real images of `size` by `size` pixels, P target features, a ConvNet."""

    name: str
    m: int
    p: int
    b: int
    size: int
    widths: tuple[int, ...]


SHAPES = (
    Shape("digits", 30, 64, 256, 16, (32, 64, 128)),
    Shape("cifar", 100, 512, 256, 32, (32, 64, 128)),
)


def reference_mse(*tensors: Tensor, return_info: bool, **options: Any) -> tuple[Tensor, None]:
    """`krr_mse` by the reference, which has no info to return."""
    return krr_mse(*tensors, **options, backend="reference"), None


class Run:
    """A distillation at its first step."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        draw = generator(0, "images")
        size = (3, shape.size, shape.size)
        outputs = torch.randn(IMAGES, shape.p, generator=draw)
        self.source = Source(
            images=torch.randint(256, (IMAGES, *size), generator=draw, dtype=torch.uint8),
            mean=(0.5,) * 3,
            std=(0.3,) * 3,
            view=ViewConfig(),
            represent=lambda index, *_: outputs[index],
            epochs=Epochs(IMAGES, seed=0),
            batch_size=shape.b,
            dtype=dtype,
        )
        pool = Pool(
            # No network is renewed while it is measured: every step is the same work.
            PoolConfig(size=2, online_steps=10**9, lr=0.01, model=ModelConfig(widths=shape.widths)),
            image_size=shape.size,
            num_outputs=shape.p,
            device=torch.device("cpu"),
            dtype=dtype,
        )
        x_syn = torch.randn((shape.m, *size), generator=draw).to(dtype)
        y_syn = torch.randn((shape.m, shape.p), generator=draw).to(dtype)
        self.state = step.State(x_syn, y_syn, pool, generator(0, "steps"))

    def advance(self, loss: Any) -> tuple[Tensor, Tensor]:
        """One step; the gradients [M, 3, H, W] and [M, P] it went along."""
        with mock.patch.object(step, "krr_mse", loss):
            step.outer_step(self.state, self.source, RATE, ridge=1e-6, ridge_of="trace")
        d_x, d_y = self.state.x_syn.grad, self.state.y_syn.grad
        assert d_x is not None and d_y is not None
        return d_x, d_y

    def next_exactly(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """What `advance` is about to give, computed in float64 from the same state."""
        exact = Run(shape, torch.float64)
        exact.state.load_state_dict(copy.deepcopy(self.state.state_dict()))
        return exact.advance(reference_mse)


class OuterStep(Comparison):
    """Views, features, loss, AdamW, and one SGD step of a network of the pool."""

    params = (SHAPES, ("cpp", "torch"))

    def case(self, shape: Shape, backend: BackendName) -> Case:
        ours, plain = (Run(shape, torch.float32) for _ in range(2))
        return Case(
            ours=partial(ours.advance, partial(krr_mse, backend=backend)),
            reference=partial(plain.advance, reference_mse),
            exact=partial(ours.next_exactly, shape),
        )
