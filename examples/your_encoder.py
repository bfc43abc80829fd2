"""Make targets with an encoder of your own: python examples/your_encoder.py FOLDER OUT.

The encoder is any torch module that turns images [B, C, H, W] into vectors [B, P]. Its outputs on
chosen images are a set that networks can be pre-trained on; nothing is optimised here.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from krrst_fast import DistilledSet, PrepareConfig, prepare
from krrst_fast.data import plain_views

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--images", type=int, default=100)
args = parser.parse_args()

store = prepare(PrepareConfig(source=str(args.folder), out=args.out / "store", size=args.size))
torch.manual_seed(0)
# Yours goes here.
encoder = nn.Sequential(nn.Conv2d(store.channels, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
encoder = nn.Sequential(encoder, nn.Flatten()).eval()

index = torch.randperm(store.count("train"))[: args.images]
images = plain_views(store.images("train"), index, store.mean, store.std)
with torch.no_grad():
    targets = encoder(images)
made = DistilledSet(
    images=images,
    targets=targets,
    mean=store.mean,
    std=store.std,
    meta={"method": "real images, outputs of an encoder"},
)
made.save(args.out / "set.safetensors")
print(made)
