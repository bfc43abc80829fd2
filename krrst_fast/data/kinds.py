"""Which files are images that can be read here, and what to say of those that are not."""

from contextlib import suppress
from pathlib import Path

from PIL import Image

from krrst_fast.data.source import LeftOut

# A file may be of one of these whatever its name says: Ghostscript would run what an EPS file
# says, WMF is drawn on Windows only, and the others are names that Pillow knows without a decoder.
_NEVER = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"))


def _readable() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the formats that are decoded, and the suffixes that name them."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    formats = tuple(name for name in Image.ID if name not in _NEVER)
    suffixes = Image.registered_extensions().items()
    return formats, frozenset(suffix for suffix, name in suffixes if name in formats)


FORMATS, IMAGE_SUFFIXES = _readable()
"""What the installed Pillow decodes, with pillow-heif where that is installed."""

_UNREAD_IMAGES = {
    **dict.fromkeys((".heic", ".heif"), "pip install pillow-heif to read it"),
    **dict.fromkeys((".avif", ".avifs"), "this Pillow is built without it"),
    **dict.fromkeys(
        (".jxl", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
        "Pillow does not read it; save it as PNG or JPEG",
    ),
}

_TAR = "unpack it (tar -xf FILE -C FOLDER) and prepare that folder"
_TABLE = (
    "save its images as files first (with the package datasets: row['image'].save(PATH), a folder "
    "for each class)"
)
_ARRAYS = "save uint8 images [N, H, W, C] and labels with numpy.savez as train.npz"
_CONTAINERS = {
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst"), _TAR),
    ".zip": "unpack it (unzip FILE -d FOLDER) and prepare that folder",
    **dict.fromkeys((".7z", ".rar"), "unpack it and prepare that folder"),
    **dict.fromkeys((".feather", ".orc"), _TABLE),
    **dict.fromkeys((".npy", ".mat", ".h5", ".hdf5"), _ARRAYS),
    **dict.fromkeys((".tfrecord", ".tfrecords", ".lmdb", ".mdb"), "save its images as files first"),
}


def left_out(path: Path) -> LeftOut:
    """Say of a file that is not read why not."""
    suffix = path.suffix.lower()
    # The reason is printed, and a name may hold any bytes.
    shown = ascii(suffix)[1:-1] if suffix else "a file without a suffix"
    if suffix in _UNREAD_IMAGES:
        reason = f"{shown} is not read: {_UNREAD_IMAGES[suffix]}"
    elif suffix in _CONTAINERS:
        reason = f"{shown} is not read: {_CONTAINERS[suffix]}"
    elif suffix in (".tar", ".npz", ".pth", ".parquet", ".arrow"):
        reason = f"{shown} does not belong to the format found here"
    else:
        reason = f"{shown} is no image"
    return LeftOut(str(path), reason)


def way_in(path: Path) -> str | None:
    """Return what to do with a file that holds images in a form that is not read, if it does."""
    return (_CONTAINERS | _UNREAD_IMAGES).get(path.suffix.lower())
