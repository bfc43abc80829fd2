"""Distil a folder of images: python examples/distill_a_folder.py FOLDER OUT [--steps 20000]."""

import argparse
from pathlib import Path

from krrst_fast import DistillConfig, PrepareConfig, TargetConfig, distill, prepare, train_target
from krrst_fast.distill import PoolConfig
from krrst_fast.models import ModelConfig

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--images", type=int, default=100)
parser.add_argument("--steps", type=int, default=20_000)
parser.add_argument("--batch_size", type=int, default=256)
parser.add_argument("--pool", type=int, default=10, help="networks that are alive at once")
parser.add_argument("--online_steps", type=int, default=1000, help="training of each of them")
parser.add_argument("--widths", type=int, nargs="+", default=[128, 128, 128])
args = parser.parse_args()

store, target, run = args.out / "store", args.out / "target", args.out / "run"
print(prepare(PrepareConfig(source=str(args.folder), out=store, size=args.size)))
model = ModelConfig(kind="convnet", widths=tuple(args.widths))
train_target(
    TargetConfig(
        store=store,
        out=target,
        model=model,
        steps=args.steps,
        batch_size=args.batch_size,
        warmup_steps=args.steps // 20,
    )
)
distilled = distill(
    DistillConfig(
        store=store,
        target=target,
        out=run,
        num_images=args.images,
        steps=args.steps,
        batch_size=args.batch_size,
        pool=PoolConfig(size=args.pool, online_steps=args.online_steps, model=model),
    )
)
print(distilled)
