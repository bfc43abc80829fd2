"""Classes of the real images that the synthetic images of a run began as."""

from pathlib import Path

import torch

from krrst_fast.data.store import LABELS, ImageStore, checksum, checksums, open_store
from krrst_fast.distill.config import DistillConfig
from krrst_fast.distill.distilled_set import (
    FILE_NAME,
    DistilledSet,
    load_distilled,
    require_its_run,
)
from krrst_fast.distill.start import initial_index
from krrst_fast.errors import DataError
from krrst_fast.exchange.labels import Labels
from krrst_fast.runs.config import from_dict
from krrst_fast.runs.files import read_json


def initial_labels(path: Path, distilled: DistilledSet) -> Labels:
    """Return the class of the real image that each synthetic one was made from, by the run's store.

    The distillation itself sees no labels, and may have moved an image away from its class.

    Args:
        path: The folder of the run, or the set in it.
        distilled: The set that was read from there.

    Raises:
        DataError: They cannot be known; the message says why, and names --labels.
    """
    try:
        return _found(path, distilled)
    except DataError as error:
        raise DataError(
            f"export: the set has representations and no labels, and those of the images it began "
            f"as are not known ({error}); give labels with --labels, or write imagefolder or npz"
        ) from None


def _found(path: Path, distilled: DistilledSet) -> Labels:
    run = path if path.is_dir() else path.parent
    if not all((run / name).exists() for name in (FILE_NAME, "config.json")):
        where = "is" if path.is_dir() else "lies in"
        raise DataError(f"{path} {where} no folder of a run")
    config = from_dict(DistillConfig, read_json(run / "config.json"))
    # Another set may lie there, or be named where the current directory is a run.
    require_its_run(run, distilled, path)
    if config.init_images != "real":
        raise DataError(f"the run began with {config.init_images}")
    store = open_store(config.store)
    if distilled.meta.get("store") != store.identity():
        raise DataError(f"{store.path} holds other images than the run's store did")
    labels = store.labels("train")
    if checksum(store.path / LABELS) != checksums(store.path)[LABELS]:
        raise DataError(f"{store.path / LABELS}: the checksum is wrong, the file is damaged")
    index = initial_index(config, store.count("train"))
    _require_begun_as(run / "initial.safetensors", store, index)
    origin = f"the real images of {store.path.name} that the images began as"
    return Labels("class", labels[index], classes=store.classes, origin=origin)


def _require_begun_as(path: Path, store: ImageStore, index: torch.Tensor) -> None:
    """Raise DataError unless the first images of the run are these of the store."""
    first = load_distilled(path).pixels().permute(0, 3, 1, 2)
    if not torch.equal(first, store.images("train")[index]):
        raise DataError(f"{path.name} does not hold the images that the seed draws")
