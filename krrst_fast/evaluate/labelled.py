"""The draw of the labelled images that probes and fine-tuning learn from."""

import torch
from torch import Tensor

from krrst_fast.errors import DataError
from krrst_fast.evaluate.config import Labels
from krrst_fast.runs.seeding import generator


def draw_labelled(labels: Tensor, classes: int, wanted: Labels, *, seed: int, where: str) -> Tensor:
    """Return positions of random images of each class, in ascending order.

    Of one seed, fewer images are among more of them.

    Args:
        labels: [N] in 0..classes-1.
        classes: Number of classes.
        wanted: A number of each class; a share of each class as "5%", rounded, and at least one
            image; or "all".
        seed: Seed of the draw.
        where: Name of the data for the error.

    Returns:
        Indices into `labels`, int64.

    Raises:
        DataError: A class has fewer images than asked, or none of which to take a share.
    """
    if wanted == "all":
        return torch.arange(len(labels))
    least = 1 if isinstance(wanted, str) else wanted
    counts = torch.bincount(labels, minlength=classes)
    short = (counts < least).nonzero().flatten().tolist()
    if short:
        asked = "at least one" if isinstance(wanted, str) else str(wanted)
        others = f" (and {len(short) - 1} other classes too few)" if len(short) > 1 else ""
        raise DataError(
            f"{where}: class {short[0]} has only {int(counts[short[0]])} labelled training images"
            f"{others}, and labels {wanted} needs {asked} of each class"
        )
    draw = generator(seed, "labels")
    picks = []
    for label in range(classes):
        members = (labels == label).nonzero().flatten()
        if isinstance(wanted, str):
            count = max(1, round(len(members) * float(wanted.removesuffix("%")) / 100))
        else:
            count = wanted
        picks.append(members[torch.randperm(len(members), generator=draw)[:count]])
    return torch.cat(picks).sort().values
