"""Is there anything to distil? A target's few-label probe beside that of an untrained network."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.errors import DataError
from krrst_fast.evaluate.pretrain import settle_norms
from krrst_fast.evaluate.probe import accuracy, ridge_scores
from krrst_fast.models import ModelConfig, build
from krrst_fast.ops.solver import DEFAULT
from krrst_fast.runs.seeding import derive, generator
from krrst_fast.targets import FrozenTarget

PER_CLASS = 5
CLASSES = 50
SCORED = 500
WIDTHS = (32, 64, 128)
RIDGE = 0.1
ENOUGH = 0.15
"""Share of the untrained network's errors that a target avoids: with 0.09 distilling gave hardly
any gain, with 0.3 a clear one (docs/results.md, CIFAR-100 and digits)."""
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """Accuracies in per cent of ridge probes with `labels_per_class` labels a class."""

    target: float
    untrained: float
    labels_per_class: int
    classes: int
    scored: int

    @property
    def avoided(self) -> float:
        """Share of the untrained network's errors that the target avoids; at most 1."""
        return (self.target - self.untrained) / max(100 - self.untrained, 1.0)

    @property
    def error(self) -> float:
        """Standard error of each accuracy, from the number of scored images alone."""
        shares = (self.target / 100, self.untrained / 100)
        return 100 * math.sqrt(max(*(x * (1 - x) for x in shares), 0.01) / self.scored)

    def __str__(self) -> str:
        return (
            f"a probe with {self.labels_per_class} labels a class: the target's outputs "
            f"{self.target:.0f} %, features of an untrained ConvNet {self.untrained:.0f} % "
            f"(+- {self.error:.0f}, {self.classes} classes)"
        )


def headroom(store: ImageStore, target: FrozenTarget, *, seed: int = 0) -> Headroom | None:
    """Compare probes on the target's outputs and on an untrained network, on the train split.

    A target whose probe is hardly better than the untrained network's has nothing to distil,
    however small the outer loss becomes. At most 50 classes are compared, with five labels each,
    on at most 500 other images; the outputs are computed on these images only.

    Args:
        store: The images that are to be distilled; without labels there is no answer.
        target: The target.
        seed: Seed of the draw of images and of the untrained network.

    Returns:
        None where images of the store have no labels, or fewer than two classes two images each.

    Raises:
        DataError: The target does not fit the store.
    """
    try:
        labels = store.labels("train")
    except DataError:  # some or all images have none
        return None
    parts = _drawn(labels, generator(seed, "headroom"))
    if parts is None or store.size < 2:
        return None
    fitted, scored, labels = parts
    index = torch.cat([fitted, scored])
    outputs = target.plain(store, index)
    features = _untrained(store, index, derive(seed, "untrained"))
    classes = int(labels.max()) + 1
    found = []
    for values in (outputs, features):
        known, asked = values[: len(fitted)], values[len(fitted) :]
        scores = ridge_scores(known, labels[: len(fitted)], asked, classes, RIDGE, DEFAULT)
        found.append(accuracy(scores, labels[len(fitted) :]))
    return Headroom(
        target=found[0],
        untrained=found[1],
        labels_per_class=len(fitted) // classes,
        classes=classes,
        scored=len(scored),
    )


def _drawn(labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return images to fit [F] and to score [S], and the labels of both [F + S], from 0 on."""
    order = torch.randperm(len(labels), generator=draw)
    members = [order[labels[order] == label] for label in labels.unique().tolist() if label >= 0]
    large = [rows for rows in members if len(rows) > PER_CLASS]
    members = (large if len(large) > 1 else [rows for rows in members if len(rows) > 1])[:CLASSES]
    if len(members) < 2:
        return None
    per_class = min(PER_CLASS, min(map(len, members)) - 1)
    fitted = torch.cat([rows[:per_class] for rows in members])
    rest = torch.cat([rows[per_class:] for rows in members])
    of = torch.cat([torch.full((len(rows) - per_class,), i) for i, rows in enumerate(members)])
    kept = torch.randperm(len(rest), generator=draw)[:SCORED]
    of_fitted = torch.arange(len(members)).repeat_interleave(per_class)
    return fitted, rest[kept], torch.cat([of_fitted, of[kept]])


def _untrained(store: ImageStore, index: Tensor, seed: int) -> Tensor:
    """Compute features of an untrained ConvNet on images `index`, its norms settled on them."""
    widths = WIDTHS[: min(len(WIDTHS), int(math.log2(store.size)))]
    net = build(
        ModelConfig(widths=widths),
        image_size=store.size,
        num_outputs=0,
        channels=store.channels,
        seed=seed,
    )
    images = plain_views(store.images("train"), index, store.mean, store.std)
    settle_norms(net, images[:_CHUNK])
    with torch.no_grad():
        return torch.cat([net.embed(chunk) for chunk in images.split(_CHUNK)])
