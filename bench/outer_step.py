"""The outer step on a CPU beside the released one: python -m bench.outer_step [--page FILE]

The networks of the paper's CIFAR-100 setting, with an eighth of its synthetic and real images. The
released step is written as its authors write it: images through a DataLoader without workers, crops
by kornia (where it is installed), the target at every step, features with a column of ones, a full
Gram, LU, autograd. Ours are `outer_step` with the target at every step, and with its outputs looked
up. All take turns in one process; times are medians.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from bench.common import THREADS, medians
from bench.gpu import images
from bench.gpu.released import RIDGE, ReleasedStep, released_mse
from bench.gpu.step import RATE, SGD, Marks, Step, our_step
from bench.markdown import cells, head, rewrite
from krrst_fast.data.augment import ViewConfig, draw_among, kept_views
from krrst_fast.distill.cache import TargetCache
from krrst_fast.distill.step import outer_step
from krrst_fast.models.convnet import ConvNet
from krrst_fast.ops.views import views
from krrst_fast.runs.environment import describe

BEGIN = "<!-- bench.outer_step: from here to the end mark is written by a program -->"
END = "<!-- bench.outer_step: end -->"
SCALE = images.FULL._replace(m=images.FULL.m // 8, b=images.FULL.b // 8)
FLOORS = {"target at every step": 1.6, "looked up": 2.8}
COUNT = 256
VIEWS = 2


class Pictures(Dataset):
    """Images one by one, as torchvision's ToTensor and Normalize give them."""

    def __init__(self, given: images.Images) -> None:
        self._pixels = given.pixels
        self._mean, self._std = (torch.tensor(x).view(-1, 1, 1) for x in (given.mean, given.std))

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Tensor:
        return (self._pixels[index].float().div(255) - self._mean) / self._std


def crops() -> tuple[Callable[[Tensor], Tensor], str]:
    """Return random crops and flips of a batch, and what makes them."""
    try:
        import kornia.augmentation as kornia
    except ImportError:
        return _plain_crops, "slices"
    size = (SCALE.size, SCALE.size)
    flip = kornia.RandomHorizontalFlip()
    return nn.Sequential(kornia.RandomCrop(size, padding=4), flip), "kornia"


def _plain_crops(batch: Tensor) -> Tensor:
    padded = nn.functional.pad(batch, (4,) * 4)
    out = torch.empty_like(batch)
    for i, (y, x, flip) in enumerate(torch.randint(0, 9, (len(batch), 3)).tolist()):
        view = padded[i, :, y : y + SCALE.size, x : x + SCALE.size]
        out[i] = view.flip(-1) if flip % 2 else view
    return out


def by_modules(network: Any) -> Any:
    """Return a copy that PyTorch's modules run, in the layout that they are made in."""
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    if isinstance(plain, ConvNet):
        plain.__dict__["_features"] = plain.blocks.forward
    else:
        plain.__dict__["_is_without_graph"] = lambda x: False
    return plain


class Runs:
    """Our distillations, and the released one."""

    def __init__(self) -> None:
        pixels = images.noise(SCALE.size, COUNT)
        make = partial(images.make, SCALE, pixels, "cpu", slots=1, online_steps=10**9)
        self.live, self.cached, theirs = make(), make(), make()
        kept = kept_views(ViewConfig(), VIEWS)
        outputs = TargetCache(self.cached.target, pixels.pixels, ViewConfig(), kept=kept)
        source = images.source(SCALE, self.cached.images, outputs)
        self.cached = self.cached._replace(source=replace(source, kept=kept))
        network, target = map(by_modules, (theirs.state.pool.slots[0].network, theirs.target.model))
        state = theirs.state
        self.theirs = ReleasedStep(network, target, state.x_syn, state.y_syn, RATE.start, SGD)
        loader = DataLoader(Pictures(pixels), batch_size=SCALE.b, shuffle=True, num_workers=0)
        self._crop, self.cropped_by = crops()
        self._batches = _forever(loader)

    def their_views(self) -> Tensor:
        """Load and crop a batch as the released code does."""
        return self._crop(next(self._batches))

    def released(self) -> Step:
        """Return the released step as its operations."""
        theirs = self.theirs
        return Step(
            *(self.their_views, theirs.target, theirs.network.embed, theirs.x_syn, theirs.y_syn),
            zero=theirs.outer.zero_grad,
            loss=released_mse,
            update=theirs.outer.step,
            train=theirs.fit,
        )

    def ours(self) -> Step:
        """Return our step, with the target at every step, as its operations."""
        generator = torch.Generator().manual_seed(0)
        every, given = kept_views(ViewConfig(), VIEWS), self.live.images

        def draw() -> dict[str, Any]:
            index = torch.randint(COUNT, (SCALE.b,), generator=generator)
            options = {"images": given.pixels, "padding": ViewConfig().padding}
            options |= {"mean": given.mean, "std": given.std}
            return draw_among(index, every, generator)._asdict() | options

        return our_step(self.live, draw)._replace(views=lambda: views(**draw()))


def _forever(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        yield from loader


class Part(NamedTuple):
    """A part of the steps: its milliseconds in both, and its arithmetic, where that is counted."""

    name: str
    released: float
    ours: float
    flops: float


def whole(runs: Runs, seconds: float) -> dict[str, float]:
    """Return the milliseconds of whole steps in turn."""
    released = runs.released()

    def ours(made: images.Distillation) -> tuple[Tensor, ...]:
        outer_step(made.state, made.source, RATE, ridge=RIDGE, ridge_of="trace")
        return ()

    def theirs() -> tuple[Tensor, ...]:
        released(Marks("cpu"))
        return ()

    calls = theirs, partial(ours, runs.live), partial(ours, runs.cached)
    for call in calls:
        call()
    found = medians(*calls, seconds=seconds, at_least=5)
    return dict(zip(("released", *FLOORS), (1e3 * one for one in found)))


def parts(runs: Runs, steps: int) -> list[Part]:
    """Return the parts of the released step and of ours, with the target at every step."""
    taken: list[list[dict[str, float]]] = [[], []]
    pair = runs.released(), runs.ours()
    for _ in range(steps + 1):
        for step, times in zip(pair, taken):
            mark = Marks("cpu")
            step(mark)
            times.append(mark.milliseconds())
    counts = arithmetic(runs)
    return [
        Part(
            name, *(median(one[name] for one in times[1:]) for times in taken), counts.get(name, 0)
        )
        for name in taken[0][0]
    ]


def arithmetic(runs: Runs) -> dict[str, float]:
    """Count the arithmetic of the networks' parts, as plain convolutions need it."""
    x_real, network = torch.zeros(SCALE.b, 3, SCALE.size, SCALE.size), runs.theirs.network

    def count(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(x)
        return counter.get_total_flops()

    synthetic = count(network.embed, runs.theirs.x_syn)
    return {
        "target forward": count(runs.theirs.target, x_real),
        "features of the synthetic images": synthetic,
        "features of the real images": count(network.embed, x_real),
        "network backward": synthetic,
        "SGD step of the network": 3 * synthetic,
    }


def peak() -> float:
    """Return the GFLOP/s of a matrix product on this machine."""
    a = torch.randn(2048, 2048)
    (seconds,) = medians(lambda: (a @ a,), seconds=1.0, at_least=5)
    return 2 * 2048**3 / seconds / 1e9


def page(seconds: float, steps: int) -> tuple[str, dict[str, float]]:
    """Measure; return the tables and the ratios."""
    runs = Runs()
    times = whole(runs, seconds)
    ratios = {name: times["released"] / times[name] for name in FLOORS}
    lines = [*head("step", "ms", "times as fast as the released one")]
    lines += [cells("released", f"{times['released']:,.0f}", "")]
    lines += [
        cells(f"krrst_fast, {name}", f"{times[name]:,.0f}", f"**{ratios[name]:.2f}**")
        for name in FLOORS
    ]
    lines += ["", *head("part", "released ms", "krrst_fast ms", "times", "GFLOP/s", "krrst_fast's")]
    for part in parts(runs, steps):
        rates = [f"{part.flops / ms / 1e6:,.0f}" for ms in (part.released, part.ours)]
        lines += [
            cells(
                *(part.name, f"{part.released:,.1f}", f"{part.ours:,.1f}"),
                f"{part.released / part.ours:.2f}",
                *(rates if part.flops else ("", "")),
            )
        ]
    lines += ["", _told(runs)]
    return "\n".join(lines), ratios


def _told(runs: Runs) -> str:
    made = describe()
    return (
        f"M {SCALE.m}, B {SCALE.b}, ConvNet {'-'.join(map(str, SCALE.widths))}, target ResNet-18, "
        f"crops by {runs.cropped_by}; GFLOP/s are those that plain convolutions would need, a "
        f"matrix product has {peak():,.0f}. {made['cpu'] or 'An unnamed processor'}, "
        f"{THREADS} threads, torch {made['torch']}: `python -m bench.outer_step`."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this file")
    parser.add_argument("--check", action="store_true", help="fail where a ratio is too low")
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--steps", type=int, default=5, help="that are taken apart")
    given = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    text, ratios = page(given.seconds, given.steps)
    print(text)
    if given.page:
        rewrite(given.page, text.splitlines(), BEGIN, END)
    low = {name: ratio for name, ratio in ratios.items() if ratio < FLOORS[name]}
    for name, ratio in low.items():
        print(f"{name}: {ratio:.2f} times as fast, {FLOORS[name]} is needed", file=sys.stderr)
    return 1 if low and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
