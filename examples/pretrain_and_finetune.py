"""Pre-train a network of yours on a distilled set, then fine-tune it on a few labelled images.

python examples/pretrain_and_finetune.py RUN STORE, where RUN is a distilled set and STORE a
labelled store of `krrst prepare` whose images have the same size.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from krrst_fast import load_distilled, open_store
from krrst_fast.data import plain_views

parser = argparse.ArgumentParser()
parser.add_argument("run", type=Path)
parser.add_argument("store", type=Path)
parser.add_argument("--epochs", type=int, default=200)
args = parser.parse_args()

distilled, store = load_distilled(args.run), open_store(args.store)
channels, outputs = distilled.images.shape[1], distilled.targets.shape[1]
torch.manual_seed(0)
body = nn.Sequential(nn.Conv2d(channels, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def train(network: nn.Module, batches, loss_of) -> float:
    """Train with SGD; return the last loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(args.epochs):
        for images, wanted in batches:
            loss = loss_of(network(images), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


loader = distilled.loader(batch_size=64)
loss = train(nn.Sequential(body, nn.Linear(128, outputs)), loader, nn.functional.mse_loss)
print(f"pre-trained: loss {loss:.4f}")

# The same normalisation as the distilled images, or the network sees another kind of image.
index = torch.arange(min(store.count("train"), 256))
images = plain_views(store.images("train"), index, distilled.mean, distilled.std)
labels = torch.as_tensor(store.labels("train"))[index].long()
network = nn.Sequential(body, nn.Linear(128, len(store.classes)))
loss = train(network, [(images, labels)], nn.functional.cross_entropy)
right = (network(images).argmax(1) == labels).float().mean()
print(f"fine-tuned: loss {loss:.4f}, {right:.0%} of the training images right")
