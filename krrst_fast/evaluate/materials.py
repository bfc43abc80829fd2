"""Everything an evaluation reads, opened and checked before any training starts."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.baselines.coresets import require_kmeans
from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.data.verify import Verification
from krrst_fast.distill.cache_plan import beside_target
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, DataError, KrrstError
from krrst_fast.evaluate.config import OURS, USUAL, EvaluateConfig
from krrst_fast.evaluate.sets import check_target, has_labels, is_imported, is_raw, open_sets
from krrst_fast.models import check as check_network
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.environment import pick_device
from krrst_fast.runs.files import read_json
from krrst_fast.runs.rows import computed_rows
from krrst_fast.runs.version import version
from krrst_fast.targets import FrozenTarget, load_target
from krrst_fast.targets.encoder import EncoderInfo

TIMES: dict[str, int] = {"random_5x": 5, "random_20x": 20, "random_100x": 100}
"""Ceilings: how many times as many random real images."""
_REAL: frozenset[str] = frozenset(
    {"random_target", "random_early", "kmeans", "herding", "k_centre", *TIMES}
)
"""Real images with the target's outputs."""
_NEEDS_SOURCE = _REAL | {"none", "random_labels"}
_NEEDS_TARGET = _REAL | {"target"}
_NOT_OF_A_ROW = (
    *("run", "store", "source", "target", "name", "methods", "rivals", "seeds", "first_seed"),
    *("workers", "overwrite"),
)
"""Settings that no row depends on, or only through the data they name."""
CHUNK = 256
HELD_OUT = 2000
"""Images at most on which the outputs of networks are compared with the target's."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Labelled images of one split."""

    images: Tensor
    """uint8 [N, C, H, W], on the device."""
    labels: Tensor
    """int64 [N], on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Materials:
    """The inputs of an evaluation; `source` and `target` only where a method needs them."""

    config: EvaluateConfig
    sets: Mapping[str, tuple[DistilledSet, ...]]
    """The distilled sets, and those of each rival by its name."""
    store: ImageStore
    source: ImageStore | None
    target: FrozenTarget | None
    device: torch.device
    mean: tuple[float, ...]
    """What images of the source are normalised by for the networks that are pre-trained here."""
    std: tuple[float, ...]
    held_out_from: tuple[Path | None, Path | None]
    """Folders of the source and of the target with which outputs are compared, where known."""

    @cached_property
    def train(self) -> Split:
        """The labelled images that probes and fine-tuning learn from."""
        return self._split("train")

    @cached_property
    def test(self) -> Split:
        """The labelled images that accuracy is measured on."""
        return self._split(self.test_split)

    @property
    def test_split(self) -> str:
        """The name of the split that accuracy is measured on."""
        return _test_split(self.store)

    @cached_property
    def held_out(self) -> tuple[Tensor, Tensor] | None:
        """Images of the source that no method has seen, and the target's outputs on them.

        They are spread over its test or val split, normalised [N, C, H, W], and [N, P]. None, with
        a warning where something is amiss, if the distilled set does not stand for a target, or the
        source, such a split, or a target that is a network is missing.
        """
        if has_labels(self.distilled) or None in self.held_out_from:
            return None
        source_path, target_path = (Path(str(path)) for path in self.held_out_from)
        try:
            source, target = self.source or open_store(source_path), self.target
            Verification(source).finish()
            if target is None:
                target = load_target(target_path)
                check_target(self.sets, target.identity(), target_path)
                target.to(self.device)
            filled = [name for name in source.splits if source.count(name) > 0]
            name = next((name for name in ("test", "val") if name in filled), None)
            if name is None or target.table is not None:
                return None
            target.check_store(source)
            if target.dim != self.distilled.targets.shape[1]:
                return None
            images = source.images(name)
            index = torch.arange(len(images))[:: -(-len(images) // HELD_OUT)]
            seen = plain_views(images, index, target.mean, target.std).to(self.device)
            outputs = _outputs_on(seen, target, target_path, f"{source.identity()} {name}")
        except KrrstError as error:
            warnings.warn(f"evaluate: there is no held-out R2: {error}", stacklevel=2)
            return None
        return (seen, outputs) if float(outputs.var(0, correction=0).max()) > 0 else None

    def _split(self, name: str) -> Split:
        images = self.store.images(name).to(self.device)
        return Split(images=images, labels=self.store.labels(name))

    @property
    def classes(self) -> int:
        """Number of classes of the labelled images."""
        return len(self.store.classes)

    @property
    def distilled(self) -> DistilledSet:
        """The first distilled set."""
        return self.sets[OURS][0]

    def set_index(self, method: str, seed: int) -> int | None:
        """Return which of its sets a method takes with a seed; None if it has none of its own."""
        return seed % len(self.sets[method]) if method in self.sets else None

    def count(self, method: str) -> int:
        """Return how many real images a method takes."""
        return len(self.distilled) * TIMES.get(method, 1)

    def is_represented(self, method: str) -> bool:
        """Return whether networks of a method are trained to give the target's outputs."""
        return method in _REAL or (method in self.sets and not has_labels(self.sets[method][0]))

    def has_outputs(self, method: str) -> bool:
        """Return whether the outputs of the network of `method` stand for the target's."""
        if method == "target" and self.target is not None:
            return self.target.num_outputs > 0
        return self.is_represented(method)

    def mean_std(self, method: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation that normalise the labelled images for the network of `method`.

        They are those of the labelled images themselves, as in the paper's code, not those of the
        images that were distilled. An encoder undoes its own; the networks that are pre-trained on
        the scale of a set of another project see all images on that scale.
        """
        if method == "target" and self.target is not None:
            if isinstance(self.target.config, EncoderInfo):
                return self.target.mean, self.target.std
        elif method in self.sets:
            if is_imported(given := self.sets[method][0]):
                return given.mean, given.std
        elif method not in _REAL and is_imported(self.distilled):
            return self.mean, self.std
        return self.store.mean, self.store.std

    def fingerprint(self, method: str) -> str:
        """Return a digest of everything but the seed that a row of `method` depends on."""
        settings = to_dict(self.config)
        for key in _NOT_OF_A_ROW:
            del settings[key]
        parts: list[Any] = [settings, version(), method, self.mean_std(method)]
        if self.config.model.is_own:
            parts.append(self.config.model.identity())
        if self.config.kd.teacher.is_own:
            parts.append(self.config.kd.teacher.identity())
        parts += [self.digests["store"], self.digests[method if method in self.sets else OURS]]
        if self.is_represented(method):
            parts.append(self._held_out_identity)
        if method in _NEEDS_SOURCE:
            parts.append(self.digests["source"])
        if method in _NEEDS_TARGET:
            parts.append(self.digests["target"])
        return _digest(json.dumps(parts, sort_keys=True).encode())

    @cached_property
    def _held_out_identity(self) -> list[str]:
        """What the held-out R2 depends on; empty where source or target is not at hand."""
        source_path, target_path = self.held_out_from
        if source_path is None or target_path is None:
            return []
        try:
            target = self.target or load_target(target_path)
            return [open_store(source_path).identity(), target.identity()]
        except KrrstError:  # `held_out` says so
            return []

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the sets by method, and of store, source and target, as far as they are known."""
        digests = {
            name: _of_tensors([tensor for one in sets for tensor in (one.images, one.targets)])
            for name, sets in self.sets.items()
        }
        for name, store in (("store", self.store), ("source", self.source)):
            if store is not None:
                digests[name] = _digest((store.path / "index.json").read_bytes())
        if self.target is not None:
            # The head of an encoder alone does not tell it from another.
            encoder = isinstance(self.target.config, EncoderInfo)
            tensors = list(self.target.model.state_dict().values())
            digests["target"] = self.target.identity() if encoder else _of_tensors(tensors)
        return digests


def open_materials(config: EvaluateConfig) -> Materials:
    """Open and check what `config` names.

    Raises:
        DataError: Something is missing, unlabelled, of another image size, or too small.
        ConfigError: The source or the target of the random rivals is not known.
    """
    wanted, every = set(config.methods), config.methods == USUAL
    if "kmeans" in wanted:
        require_kmeans()
    sets = open_sets(config)
    distilled = sets[OURS][0]
    store = open_store(config.store)
    _check_labelled(store, distilled)
    source = target = None
    source_path = config.source or _from_run(config, "store", "source", wanted & _NEEDS_SOURCE)
    target_path = config.target or _from_run(
        config, "target", "target", wanted & _NEEDS_TARGET or is_raw(distilled)
    )
    held_out_from = (source_path, target_path)
    if source_path is not None and wanted & _NEEDS_SOURCE:
        source = open_store(source_path)
        if every and not source.has_labels:
            # Unlabelled images are what the method is for: the rival that needs labels is left out
            # unless it was asked for.
            kept = tuple(method for method in USUAL if method != "random_labels")
            config, wanted = replace(config, methods=kept), set(kept)
        most = max(TIMES.get(method, 1) for method in wanted & (_REAL | {"none", "random_labels"}))
        _check_source(source, distilled, most, "random_labels" in wanted)
    if target_path is not None and (wanted & _NEEDS_TARGET or is_raw(distilled)):
        target = load_target(target_path)
        check_target(sets, target.identity(), target_path)
        if target.table is not None and "target" in wanted:
            # It has no network that takes the labelled images.
            if not every:
                raise ConfigError(
                    "evaluate: the target is a table of features, and the method target needs a "
                    "network; leave it out of methods"
                )
            rest = tuple(method for method in config.methods if method != "target")
            config = replace(config, methods=rest)
        if target.table is not None and source is not None:
            target.check_store(source)
        if target.image_size != store.size:
            raise DataError(
                f"{store.path}: the images are {store.size} px, and the target network was "
                f"trained on {target.image_size} px"
            )
    # Networks are pre-trained on raw images as they are, and still see real ones normalised.
    scale = target if target is not None and is_raw(distilled) else distilled
    device = pick_device(config.device)
    for width in {one[0].targets.shape[1] for one in sets.values()}:
        check_network(
            config.model,
            image_size=store.size,
            num_outputs=width,
            channels=store.channels,
            device=device,
        )
    if config.kd.steps:
        check_network(
            config.kd.teacher,
            image_size=store.size,
            num_outputs=len(store.classes),
            channels=store.channels,
            device=device,
        )
    if target is not None:
        target = target.to(device)
    # The device the figures were made on, not the word "auto", belongs to their fingerprint.
    config = replace(config, device=device.type)
    return Materials(
        config=config,
        sets=sets,
        store=store,
        source=source,
        target=target,
        device=device,
        mean=scale.mean,
        std=scale.std,
        held_out_from=held_out_from,
    )


def _check_labelled(store: ImageStore, distilled: DistilledSet) -> None:
    size = distilled.images.shape[-1]
    if store.size != size:
        raise DataError(
            f"{store.path}: the images are {store.size} px, and those of the distilled set {size} "
            f"px; prepare the store with --size {size}"
        )
    if not store.has_labels:
        raise DataError(f"{store.path}: has no labels, and an evaluation needs them")
    _test_split(store)


def _test_split(store: ImageStore) -> str:
    """Return the split that accuracy is measured on."""
    filled = [name for name in store.splits if store.count(name) > 0]
    for name in ("test", "val"):
        if name in filled and "train" in filled:
            return name
    raise DataError(
        f"{store.path}: an evaluation needs images in a train split and in a test or val split, "
        f"got {', '.join(filled) or 'none'}; krrst prepare --test_fraction 0.2 makes one"
    )


def _check_source(
    source: ImageStore, distilled: DistilledSet, times: int, needs_labels: bool
) -> None:
    size = distilled.images.shape[-1]
    if source.size != size:
        raise DataError(
            f"{source.path}: the source images are {source.size} px, and those of the distilled "
            f"set {size} px"
        )
    if times * len(distilled) > source.count("train"):
        hint = f" (random_{times}x of {len(distilled)})" if times > 1 else ""
        raise DataError(
            f"{source.path}: a random subset needs {times * len(distilled)} images{hint}, and the "
            f"train split has {source.count('train')}"
        )
    if needs_labels and not source.has_labels:
        raise DataError(
            f"{source.path}: has no labels, which random_labels needs; leave that method out"
        )


def _from_run(config: EvaluateConfig, key: str, setting: str, needed: object) -> Path | None:
    """Return the path that the run's config.json names; None where none is, and none is needed."""
    run, file = config.runs[0], config.runs[0] / "config.json"
    if not needed and not file.exists():
        return None
    if not file.exists():
        raise ConfigError(
            f"evaluate: {run} has no config.json that names the {setting}; pass --{setting}"
        )
    values = read_json(file)
    if not needed and isinstance(values, dict) and values.get(key) is None:
        return None  # a learnt baseline has no target
    if not isinstance(values, dict) or not isinstance(values.get(key), str):
        raise ConfigError(f"evaluate: {file} does not name the {setting}; pass --{setting}")
    path = Path(values[key])
    return path if needed or path.exists() else None


def _outputs_on(seen: Tensor, target: FrozenTarget, path: Path, images: str) -> Tensor:
    """Return the target's outputs on held-out images; those of an encoder are kept beside it."""
    inputs = {
        "images": f"{len(seen)} spread over {images}",
        "target": target.identity(),
        "device": target.device.type,
    }
    folder = beside_target(path, inputs) if isinstance(target.config, EncoderInfo) else None

    def compute(rows: Tensor) -> Tensor:
        return target(seen[rows.to(seen.device)]).float()

    if folder is None:
        return torch.cat([compute(rows) for rows in torch.arange(len(seen)).split(CHUNK)])
    shape, what = (len(seen), target.dim), "held-out outputs"
    rows = computed_rows(folder, shape, inputs, compute, block=CHUNK, what=what)
    return rows.to(seen.device)


def _of_tensors(tensors: list[Tensor]) -> str:
    return _digest(b"".join(t.detach().cpu().contiguous().numpy().tobytes() for t in tensors))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
