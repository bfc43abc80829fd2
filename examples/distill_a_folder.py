"""Distil a folder of images: python examples/distill_a_folder.py FOLDER OUT [--steps 20000]."""

import argparse
from pathlib import Path

from krrst_fast import DistillConfig, PrepareConfig, TargetConfig, distill, prepare, train_target

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--images", type=int, default=100)
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--batch_size", type=int, default=256)
args = parser.parse_args()

store, target, run = args.out / "store", args.out / "target", args.out / "run"
print(prepare(PrepareConfig(source=str(args.folder), out=store, size=args.size)))
train_target(TargetConfig(store=store, out=target, steps=args.steps, batch_size=args.batch_size))
distilled = distill(
    DistillConfig(
        store=store,
        target=target,
        out=run,
        num_images=args.images,
        steps=args.steps,
        batch_size=args.batch_size,
    )
)
print(distilled)
