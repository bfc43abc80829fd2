"""The sets that an evaluation pre-trains on: distilled ones and rivals, and what they hold."""

from collections.abc import Mapping
from pathlib import Path

from krrst_fast.distill.distilled_set import DistilledSet, load_distilled
from krrst_fast.errors import DataError
from krrst_fast.evaluate.config import OURS, EvaluateConfig
from krrst_fast.exchange.labels import labels_in


def is_raw(distilled: DistilledSet) -> bool:
    """Return whether the images are pixels that their own networks saw beside normalised ones."""
    if is_imported(distilled):
        return False  # those of other projects are pixels, and so are the real ones beside them
    return set(distilled.mean) == {0.0} and set(distilled.std) == {1.0}


def open_sets(config: EvaluateConfig) -> dict[str, tuple[DistilledSet, ...]]:
    """Load the distilled sets and the rivals'; raise DataError unless those of a name are alike."""
    paths = {OURS: config.runs, **config.rival_paths}
    sets = {name: tuple(map(load_distilled, given)) for name, given in paths.items()}
    for name, given in paths.items():
        for path, one in zip(given, sets[name]):
            try:
                labels_in(one.targets, one.meta)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
    first = sets[OURS][0]
    for name, alike in sets.items():
        for path, one in zip(paths[name], alike):
            if one.images.shape[1:] != first.images.shape[1:]:
                raise DataError(
                    f"{path}: its images are {_shape(one)}, and those of {config.runs[0]} "
                    f"{_shape(first)}"
                )
            same = (one.images.shape, one.targets.shape) == (
                alike[0].images.shape,
                alike[0].targets.shape,
            ) and has_labels(one) == has_labels(alike[0])
            if not same:
                raise DataError(
                    f"{path}: the sets of {name} must be alike: it has {len(one)} images with "
                    f"{one.targets.shape[1]} targets, {paths[name][0]} {len(alike[0])} with "
                    f"{alike[0].targets.shape[1]}"
                )
            if has_labels(one) or has_labels(first):
                continue
            if one.targets.shape[1] != first.targets.shape[1] or _targets_differ(one, first):
                raise DataError(
                    f"{path}: its representations are of another target than those of "
                    f"{config.runs[0]}: {one.targets.shape[1]} and {first.targets.shape[1]} numbers"
                )
    return sets


def check_target(sets: Mapping[str, tuple[DistilledSet, ...]], identity: str, path: Path) -> None:
    """Raise DataError if a set of representations is known to be of another target than this one.

    Its networks would be trained on one target, and those on real images on another.
    """
    for name, alike in sets.items():
        for one in alike:
            made_by = one.meta.get("target")
            if made_by not in (None, identity) and not has_labels(one):
                raise DataError(
                    f"{path}: it is not the target that {name} was made with (it was trained or "
                    "changed since, or another --target is meant)"
                )


def _targets_differ(one: DistilledSet, other: DistilledSet) -> bool:
    """Return whether both are known to be of targets, and of different ones."""
    names = {given.meta.get("target") for given in (one, other)}
    return None not in names and len(names) > 1


def _shape(distilled: DistilledSet) -> str:
    return "x".join(map(str, distilled.images.shape[1:]))


def has_labels(distilled: DistilledSet) -> bool:
    """Return whether a set holds labels, or what another project learnt, and no target's outputs.

    Its networks are trained on them by mean squared error all the same.
    """
    kind = distilled.meta.get("label_kind", "representation")
    return kind != "representation" or is_imported(distilled)


def is_imported(distilled: DistilledSet) -> bool:
    """Return whether a set was learnt by another project."""
    return distilled.meta.get("method", "").startswith("imported from ")
