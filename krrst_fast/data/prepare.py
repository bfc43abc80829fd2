"""`krrst prepare`: decode an image set once into a packed store that the other commands read."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from krrst_fast.data.config import INDEX
from krrst_fast.data.source import DIGITS, MAX_PIXELS, Fit, Layout, hold_out
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.runs.config import require, settle
from krrst_fast.runs.files import atomic_folder, refuse_existing

if TYPE_CHECKING:
    from krrst_fast.data.store import ImageStore

MAX_SIZE = 4096


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One image set, one store."""

    source: str
    """A folder or file of images in any known format, or the word `digits`."""
    out: Path
    """Folder of the store."""
    size: int = 32
    """Height and width of the stored images."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """What to do about an image that cannot be decoded: stop, or leave it out and name it."""
    strict: bool = False
    """Stop, too, where a file that is not read lies in the source; else such files are counted."""
    layout: Layout = "auto"
    """What sub-folders called train, val, dev or test are. auto: splits, if nothing else that
    holds images lies beside them."""
    fit: Fit = "crop"
    """How an image becomes square, once it is turned as its EXIF orientation says: cropped to the
    centre, whole on the background, or squashed."""
    background: str = "white"
    """Colour behind transparent pixels and, with fit pad, beside the image: a name or #rrggbb."""
    max_pixels: int = MAX_PIXELS
    """Images that declare more pixels are not decoded: refused, or skipped, by name and size."""
    test_fraction: float = 0.0
    """Hold out this fraction of each class as a test split, where the source has none."""
    limit: int | None = None
    """Take the first images of each split only."""
    overwrite: bool = False
    """Replace a store that is at `out` already."""

    def __post_init__(self) -> None:
        settle(self)
        require(bool(self.source), self, "source", "a path, or digits")
        require(1 <= self.size <= MAX_SIZE, self, "size", f"from 1 to {MAX_SIZE}")
        require(self.max_pixels >= 1, self, "max_pixels", "at least 1")
        both = self.strict and self.on_error == "skip"
        require(not both, self, "on_error", "refuse where strict is true")
        require(0 <= self.test_fraction <= 0.9, self, "test_fraction", "from 0 to 0.9")
        require(self.limit is None or self.limit >= 1, self, "limit", "at least 1")


def prepare(config: PrepareConfig, *, progress: bool = False) -> "ImageStore":
    """Decode every image of the source and write the store, whole or not at all.

    Raises:
        DataError: The source is missing, empty or damaged.
        ConfigError: `out` exists, or what decodes images is not installed.
    """
    # Here, as these import torch, which the settings above do without.
    from krrst_fast.data.store import open_store

    refuse_output(config)
    try:
        # Pillow is needed to prepare a store, not to read one.
        from krrst_fast.data import decode, formats, pack
    except ImportError as error:
        raise ConfigError(
            f"prepare: {error}; pip install 'krrst-fast[data]' brings what decodes images"
        ) from None
    source = formats.open_source(config.source, config.size, config.layout)
    if config.strict and source.left_out:
        first = source.left_out[0]
        raise DataError(
            f"prepare: {config.source}: {len(source.left_out)} files would be left out, which "
            f"--strict refuses; the first, {first.name}: {first.reason}"
        )
    if config.test_fraction > 0:
        if [split.name for split in source.splits] != ["train"]:
            names = ", ".join(split.name for split in source.splits)
            raise ConfigError(
                f"prepare: test_fraction must be 0 where the source has splits already, and "
                f"{config.source} has {names}"
            )
        again = formats.open_source(config.source, config.size, config.layout)
        source = hold_out(source, again, config.test_fraction)
    decoder = decode.Decoder(
        size=config.size,
        fit=config.fit,
        background=decode.colour(config.background),
        max_pixels=config.max_pixels,
    )
    packer = pack.Packer(decoder, config.on_error, config.limit, progress)
    with atomic_folder(config.out, overwrite=config.overwrite, marker=INDEX) as folder:
        packer.pack(source, config.source, folder)
    store = open_store(config.out)
    if config.test_fraction > 0 and "test" not in store.splits:
        warnings.warn(
            f"prepare: test_fraction {config.test_fraction} of so few images is none of any class: "
            "there is no test split",
            stacklevel=2,
        )
    return store


def refuse_output(config: PrepareConfig) -> None:
    """Check that the output replaces a store, never the images that it is made from."""
    refuse_existing(config.out, overwrite=config.overwrite, marker=INDEX)
    if config.source == DIGITS:
        return
    source, out = Path(config.source).resolve(), config.out.resolve()
    if source == out or out in source.parents:
        raise ConfigError(f"{config.out}: the source {config.source} lies in the output folder")
