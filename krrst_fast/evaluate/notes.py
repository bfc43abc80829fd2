"""What the labelled images of an evaluation are fit to tell, said before any training starts."""

import warnings
from pathlib import Path

from krrst_fast.data.splits import ClassGaps, class_gaps, repeated, some
from krrst_fast.data.store import ImageStore, open_store
from krrst_fast.errors import DataError


def check_classes(store: ImageStore, split: str) -> ClassGaps | None:
    """Return what of the classes of `split` and train differs, with a warning; None if nothing.

    Raises:
        DataError: The accuracy would be no figure: train has images of one class only, or none of
            any class of `split`.
    """
    trained = store.labels("train").unique().tolist()
    if len(trained) < 2:
        raise DataError(
            f"{store.path}: an evaluation needs labelled training images of two classes or more, "
            f"got {store.count('train')} of {store.classes[trained[0]]}"
        )
    gaps = class_gaps(store, split)
    if gaps is None:
        return None
    if gaps.images == gaps.total:
        raise DataError(
            f"{store.path}: train and {split} have no class in common: train has "
            f"{some([store.classes[label] for label in trained])}, {split} {some(gaps.untrained)}"
        )
    warnings.warn(f"evaluate: {store.path}: {_in_words(gaps)}", stacklevel=2)
    return gaps


def data_notes(store: ImageStore, split: str, source: Path | None) -> tuple[str, ...]:
    """Return a line for each thing in the data that the accuracies are to be read with.

    Images of `split` that stand in train, or among those that were distilled; and classes that only
    one of the two has.

    Args:
        store: The labelled images.
        split: The split that accuracy is measured on.
        source: The store of the images that were distilled; None if it is not known.

    Raises:
        DataError: As `check_classes`.
    """
    tests = store.images(split)
    places, notes, unknown = [("train", store)], list[str](), list[str]()
    if source is None or source.resolve() != store.path.resolve():
        try:
            if source is None:
                raise DataError("it is not known")
            places.append((f"the distilled source {source.name}", open_store(source)))
        except DataError as error:
            unknown.append(f"{split} images are not looked for in the distilled source: {error}")
    found = [
        (len(repeated(tests, place.images("train"))), name)
        for name, place in places
        if "train" in place.splits
    ]
    if any(count for count, _ in found):
        told = ", ".join(f"{count} in {name}" for count, name in found if count)
        notes.append(f"of {len(tests)} {split} images, these stand elsewhere too: {told}")
    gaps = check_classes(store, split)
    return (*notes, *([] if gaps is None else [_in_words(gaps)]), *unknown)


def _in_words(gaps: ClassGaps) -> str:
    cap = 100 * (1 - gaps.images / gaps.total)
    limit = f"; accuracy is at most {cap:.1f} per cent" if gaps.images else ""
    return f"{gaps}{limit}"
