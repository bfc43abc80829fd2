"""Distil a folder of images with an encoder of your own as the target.

python examples/your_encoder.py FOLDER OUT, where FOLDER holds images. `make` below is the encoder:
any torch module that turns images [B, C, H, W] into features [B, D], of timm, transformers or
yourself. On the command line it is `krrst target --encoder examples/your_encoder.py:make`.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from krrst_fast import DistillConfig, PrepareConfig, TargetConfig, distill, prepare, train_target
from krrst_fast.data import ViewConfig
from krrst_fast.distill import PoolConfig
from krrst_fast.models import ModelConfig


def make() -> nn.Module:
    """Return the encoder, with the size, mean and std of the images that it was trained on."""
    torch.manual_seed(0)
    # Yours goes here: timm.create_model("resnet18", pretrained=True, num_classes=0), say.
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    )
    encoder.input_size = 64  # type: ignore[assignment]
    encoder.mean, encoder.std = (0.5,) * 3, (0.25,) * 3  # type: ignore[assignment]
    return encoder


def main() -> None:
    """Prepare, take the encoder as the target, distil."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--outputs", type=int, default=64, help="principal components to keep")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--pool", type=int, default=10, help="networks that are alive at once")
    parser.add_argument("--online_steps", type=int, default=1000, help="training of each of them")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 128, 128])
    args = parser.parse_args()

    store, target = args.out / "store", args.out / "target"
    prepare(PrepareConfig(source=str(args.folder), out=store, size=args.size))
    train_target(
        TargetConfig(store=store, out=target, encoder=f"{__file__}:make", num_outputs=args.outputs)
    )
    made = distill(
        DistillConfig(
            store=store,
            target=target,
            out=args.out / "run",
            num_images=args.images,
            steps=args.steps,
            batch_size=args.batch_size,
            # The encoder runs once on each image and its mirror image, and never on crops.
            views=ViewConfig(padding=0),
            pool=PoolConfig(
                size=args.pool,
                online_steps=args.online_steps,
                model=ModelConfig(widths=tuple(args.widths)),
            ),
        )
    )
    print(made)


if __name__ == "__main__":
    main()
