"""The paper's CIFAR-100 step, ready to run: images, a target network, a pool, a synthetic set.

python -m bench.gpu.images SOURCE STORE    a store of 32x32 images; where there is one, it is kept

SOURCE is whatever `krrst prepare` reads, or a pack: an npz with JPEG files end to end (`data`, with
`offsets`), which is what is small enough to be carried to a machine without a network.
"""

import io
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from krrst_fast.data.augment import ViewConfig, plain_views
from krrst_fast.data.store import open_store
from krrst_fast.distill.config import PoolConfig
from krrst_fast.distill.pool import Pool
from krrst_fast.distill.source import Epochs, Represent, Source
from krrst_fast.distill.step import State
from krrst_fast.errors import KrrstError
from krrst_fast.models import ModelConfig, build
from krrst_fast.seeding import generator
from krrst_fast.targets import FrozenTarget
from krrst_fast.targets.standardize import standardize_head

CHUNK = 256


class Scale(NamedTuple):
    """M synthetic and B real images, P target features, the networks, the size of images."""

    m: int
    b: int
    p: int
    widths: tuple[int, ...]
    target: ModelConfig
    size: int


FULL = Scale(1000, 1024, 512, (128, 256, 512), ModelConfig(kind="resnet18", stem="small"), 32)
TOY = Scale(6, 8, 4, (4, 8), ModelConfig(widths=(4,)), 8)


class Images(NamedTuple):
    """uint8 [N, C, H, W], what they are normalised by, and what they are."""

    pixels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def read(store: Path | None, size: int) -> Images:
    """The train split of a prepared store, or scikit-learn's 1,797 digits at this size."""
    if store is not None:
        found = open_store(store)
        return Images(found.images("train"), found.mean, found.std, store.name)
    from sklearn.datasets import load_digits

    grey = torch.from_numpy(load_digits().images)[:, None].float() * (255 / 16)
    grey = torch.nn.functional.interpolate(grey, (size, size), mode="bilinear")
    pixels = grey.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    scaled = pixels.float() / 255
    mean, std = (tuple(x.tolist()) for x in (scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))))
    return Images(pixels, mean, std, f"scikit-learn's digits at {size}x{size}")


def noise(size: int, count: int = 4096) -> Images:
    """As many images of nothing: what takes the time of a step is not what is on them."""
    shape = (count, 3, size, size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator(0, "images"))
    return Images(pixels, (0.5,) * 3, (0.3,) * 3, "noise")


def prepare(source: Path, out: Path) -> None:
    """Make a store of a source or of a pack of JPEG files; of a store, a link to it.

    Raises:
        KrrstError: the source is none, or is damaged.
    """
    from krrst_fast.data import PrepareConfig
    from krrst_fast.data import prepare as packed
    from krrst_fast.data.store import INDEX

    out.parent.mkdir(parents=True, exist_ok=True)
    if (source / INDEX).exists():
        out.symlink_to(source.resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        given = source
        if source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as pack:
                if "offsets" in pack:
                    given = Path(folder) / "train.tar"
                    write_tar(given, pack["data"], pack["offsets"], pack["labels"])
        packed(PrepareConfig(source=str(given), out=out, size=FULL.size))


def write_tar(path: Path, data: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> None:
    """Write JPEG files that lie end to end as a WebDataset tar."""
    files = data.tobytes()
    with tarfile.open(path, "w") as tar:
        for i, (begin, end, label) in enumerate(zip(offsets[:-1], offsets[1:], labels)):
            for ending, body in (("jpg", files[begin:end]), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i:06d}.{ending}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


class Distillation(NamedTuple):
    """All that `outer_step` takes, and the parts it is made of."""

    images: Images
    target: FrozenTarget
    source: Source
    state: State


def make(
    scale: Scale, images: Images, device: str, *, slots: int, online_steps: int, lr: float = 0.01
) -> Distillation:
    """A distillation before its first step; the target network is untrained, its outputs spread."""
    network = build(scale.target, image_size=images.pixels.shape[-1], num_outputs=scale.p, seed=0)
    target = FrozenTarget(
        model=network,
        config=scale.target,
        num_outputs=scale.p,
        mean=images.mean,
        std=images.std,
        image_size=images.pixels.shape[-1],
    ).to(device)
    on_device = images._replace(pixels=images.pixels.to(device))
    some = _first(on_device, scale.m)
    # Else all outputs of an untrained network are nearly the same.
    assert isinstance(network.fc, torch.nn.Linear)
    standardize_head(network.fc, torch.cat([target(chunk) for chunk in some.split(CHUNK)]))
    y_syn = torch.cat([target(chunk) for chunk in some.split(CHUNK)])
    pool = Pool(
        PoolConfig(
            size=slots, online_steps=online_steps, lr=lr, model=ModelConfig(widths=scale.widths)
        ),
        image_size=images.pixels.shape[-1],
        num_outputs=scale.p,
        device=torch.device(device),
    )
    state = State(some, y_syn, pool, generator(0, "steps"))
    return Distillation(
        on_device, target, source(scale, on_device, target, run_target(target)), state
    )


def _first(images: Images, count: int) -> Tensor:
    index = torch.arange(count, device=images.pixels.device) % len(images.pixels)
    return plain_views(images.pixels, index, images.mean, images.std)


def run_target(target: FrozenTarget) -> Represent:
    """The target on every batch."""
    represent: Callable[..., Tensor] = lambda index, offset, flip, batch: target(batch)  # noqa: E731
    return represent


def source(scale: Scale, images: Images, target: FrozenTarget, represent: Represent) -> Source:
    """Where the real batches come from."""
    return Source(
        images=images.pixels,
        mean=images.mean,
        std=images.std,
        view=ViewConfig(),
        represent=represent,
        epochs=Epochs(len(images.pixels), seed=0),
        batch_size=scale.b,
    )


def main(argv: list[str]) -> int:
    """Make the store; 2 if it cannot be made."""
    source, out = map(Path, argv)
    try:
        with warnings.catch_warnings():
            # There is no extension yet where this is called.
            warnings.simplefilter("ignore", RuntimeWarning)
            if not out.exists():
                prepare(source, out)
            print(f"{source.name}: {len(open_store(out).images('train'))} images in {out}")
    except (KrrstError, OSError, ValueError) as error:
        print(f"bench/gpu.sh: --images {source}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
