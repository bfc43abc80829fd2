"""The outer step with many synthetic images on a CPU: python -m bench.many_images 1000 20000 [...]

Seconds of a step and the memory that it takes beside what is there before it: the images, their
optimiser's state, the networks. All allocations by torch count. The target is a small network, so
that the step is what the synthetic images make of it. Times are of the fastest of a few steps.
"""

import argparse
import time
from collections.abc import Iterator

import torch

from bench.common import peak_bytes
from bench.gpu import images
from bench.gpu.step import RATE, RIDGE
from bench.markdown import cells, head
from krrst_fast.distill.step import outer_step
from krrst_fast.models import ModelConfig

TARGET = ModelConfig(widths=(4,))


def rows(counts: list[int], widths: tuple[int, ...], batch: int, steps: int) -> Iterator[str]:
    """Measure each number of images, and yield the rows of a table."""
    yield from head(
        *("images", "seconds a step", "peak MB", "kB an image"),
        *("of it gradient, features and theirs", "beyond them"),
    )
    for count in counts:
        scale = images.FULL._replace(m=count, b=batch, widths=widths, target=TARGET)
        noise = images.noise(scale.size)
        made = images.make(scale, noise, "cpu", slots=1, online_steps=10**9)

        def step(made: images.Distillation = made) -> None:
            outer_step(made.state, made.source, RATE, ridge=RIDGE, ridge_of="trace")

        step()
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        peak = peak_bytes(step)
        network = made.state.pool.slots[0].network
        known = 4 * (made.state.x_syn[0].numel() + 2 * network.feature_dim)
        yield cells(
            *(f"{count:,}", f"{min(times):.1f}", f"{peak / 1e6:,.0f}"),
            *(f"{peak / count / 1e3:.1f}", f"{known / 1e3:.1f}"),
            f"{peak / count / 1e3 - known / 1e3:.1f}",
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", type=int, nargs="+", metavar="IMAGES")
    parser.add_argument("--widths", default="128,256,512", help="of the ConvNet")
    parser.add_argument("--batch", type=int, default=1024, help="real images")
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    widths = tuple(map(int, args.widths.split(",")))
    for row in rows(args.counts, widths, args.batch, args.steps):
        print(row, flush=True)
    print(f"\n{torch.get_num_threads()} threads, ConvNet {args.widths}, {args.batch} real images")


if __name__ == "__main__":
    main()
