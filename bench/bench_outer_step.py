"""The outer step of a distillation, with the KRR loss of krrst_fast and of the reference."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import flops
from bench.common import solving
from bench.suite import EVERYWHERE, Case, Comparison, Setting
from krrst_fast import Solver, krr_mse
from krrst_fast.data.augment import View, ViewConfig
from krrst_fast.distill import step
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Epochs, Source
from krrst_fast.models import ModelConfig
from krrst_fast.runs.seeding import generator

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


def reference_mse(*tensors: Tensor, return_info: bool, solver: Solver, **options: Any) -> Any:
    """Compute `krr_mse` by the reference, which has no info to return."""
    return krr_mse(*tensors, **options, **solving("reference")), None


class _Rows:
    """The target's outputs as rows of a table (a `Represent` function)."""

    def __init__(self, outputs: Tensor) -> None:
        self._outputs = outputs

    def find(self, view: View) -> Tensor:
        """Return the images."""
        return view.index

    def __call__(self, found: Tensor, batch: Tensor) -> Tensor:
        """Return the outputs of the images."""
        return self._outputs[found]


class Run:
    """A distillation at its first step."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        draw = generator(0, "images")
        size = (3, shape.size, shape.size)
        outputs = torch.randn(IMAGES, shape.p, generator=draw).to(device)
        images = torch.randint(256, (IMAGES, *size), generator=draw, dtype=torch.uint8)
        self.shape, self.device = shape, device
        self.source = Source(
            images=images.to(device),
            mean=(0.5,) * 3,
            std=(0.3,) * 3,
            view=ViewConfig(),
            represent=_Rows(outputs),
            epochs=Epochs(IMAGES, seed=0),
            batch_size=shape.b,
            dtype=dtype,
        )
        pool = Pool(
            # No network is renewed during the measurement: every step is the same work.
            PoolConfig(size=2, online_steps=10**9, lr=0.01, model=ModelConfig(widths=shape.widths)),
            image_size=shape.size,
            num_outputs=shape.p,
            device=torch.device(device),
            dtype=dtype,
        )
        x_syn = torch.randn((shape.m, *size), generator=draw).to(device, dtype)
        y_syn = torch.randn((shape.m, shape.p), generator=draw).to(device, dtype)
        self.state = step.State(x_syn, y_syn, pool, generator(0, "steps"))

    def advance(self, loss: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Take a step; return its gradients [M, 3, H, W] and [M, P]."""
        with mock.patch.object(step, "krr_mse", loss):
            step.outer_step(self.state, self.source, RATE, ridge=1e-6, ridge_of="trace")
        d_x, d_y = self.state.x_syn.grad, self.state.y_syn.grad
        assert d_x is not None and d_y is not None
        return d_x, d_y

    def next_exactly(self) -> tuple[Tensor, Tensor]:
        """Compute in float64 what the next `advance` will return, without advancing."""
        exact = Run(self.shape, self.device, torch.float64)
        exact.state.load_state_dict(copy.deepcopy(self.state.state_dict()))
        return exact.advance(reference_mse)

    def flops(self) -> float:
        """Take a step; count the arithmetic of its convolutions and of the KRR loss."""
        with FlopCounterMode(display=False) as counter:
            self.advance(reference_mse)
        counts = counter.get_flop_counts()["Global"]
        convolutions = sum(count for op, count in counts.items() if "convolution" in str(op))
        d = self.state.pool.slots[0].network.feature_dim
        return convolutions + flops.krr(self.shape.m, self.shape.b, d, self.shape.p)


class OuterStep(Comparison):
    """Views, features, loss, AdamW, and one SGD step of a network of the pool."""

    against = "the same step with the formula, by LU and autograd"
    params = (
        (
            Shape("digits", 30, 64, 256, 16, (32, 64, 128)),
            Shape("cifar", 100, 512, 256, 32, (32, 64, 128)),
        ),
        EVERYWHERE,
        ("float32",),
    )

    def case(self, shape: Shape, how: Setting) -> Case:
        ours, plain, counted = (Run(shape, how.device, how.dtype) for _ in range(3))
        return Case(
            ours=partial(ours.advance, partial(krr_mse, **how.keywords)),
            reference=partial(plain.advance, reference_mse),
            exact=ours.next_exactly,
            exact_reference=plain.next_exactly,
            flops=counted.flops(),
        )
