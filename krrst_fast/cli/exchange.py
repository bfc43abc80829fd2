"""`krrst export` and `krrst import`."""

from collections.abc import Sequence
from pathlib import Path

from krrst_fast.cli.settings import Parser
from krrst_fast.errors import ConfigError

# The names of the formats are listed here too, so that --help does not import torch.
TO = ("ddranking", "dcbench", "datm", "lgm", "imagefolder", "npz")
FROM = ("dc", "dsa", "dm", "mtt", "mkdt", "frepo", *TO)
_LABELS = ".npy of [M] whole numbers or [M, K] floats, or a text of one whole number a line"


def run_export(argv: Sequence[str], about: str) -> None:
    """Write a distilled set as another project reads it."""
    parser = Parser(prog="krrst export", description=about, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run folder, a distilled set, or digits-30")
    parser.add_argument("--to", choices=TO, required=True, help="the format")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--labels", type=Path, help=f"labels of the images: {_LABELS}")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    given = parser.parse_args(argv)
    from krrst_fast.distill.distilled_set import load_distilled
    from krrst_fast.exchange import EXPORTS, export_set
    from krrst_fast.exchange.initial import initial_labels
    from krrst_fast.exchange.labels import labels_in, read_labels

    distilled = load_distilled(given.run)
    labels = None if given.labels is None else read_labels(given.labels, len(distilled))
    kinds = EXPORTS[given.to].kinds
    unlabelled = labels_in(distilled.targets, distilled.meta).kind == "representation"
    if labels is None and unlabelled and "representation" not in kinds and "class" in kinds:
        labels = initial_labels(given.run, distilled)
        print(f"labels: those of {labels.origin}; --labels gives others")
    export_set(distilled, given.out, to=given.to, labels=labels, overwrite=given.overwrite)
    exact = "exact" if EXPORTS[given.to].exact else f"not exact: {EXPORTS[given.to].image_range}"
    print(f"wrote {given.out}: {len(distilled)} images for {given.to} ({exact})")


def run_import(argv: Sequence[str], about: str) -> None:
    """Read what another project wrote, as a distilled set."""
    parser = Parser(prog="krrst import", description=about, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="the file, or the folder of the files")
    parser.add_argument(
        "--from", dest="source", choices=FROM, help="the format, where the files do not tell"
    )
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}", help="what the images were normalised by, as 0.5,0.5,0.5, a channel each"
        )
    parser.add_argument(
        "--labels",
        type=Path,
        help=f"instead of the file's: {_LABELS}; of image files in the order of their paths",
    )
    parser.add_argument("--classes", type=Path, help="names of the classes, one a line, in order")
    given = parser.parse_args(argv)
    if given.out.suffix != ".safetensors":
        raise ConfigError(f"--out must be a .safetensors file, got {given.out}")
    if given.out.exists():
        raise ConfigError(f"--out {given.out}: exists already")
    from krrst_fast.exchange import import_set
    from krrst_fast.exchange.labels import read_classes, read_labels

    read = import_set(
        given.path,
        source=given.source,
        mean=_numbers("mean", given.mean),
        std=_numbers("std", given.std),
        labels=None if given.labels is None else read_labels(given.labels),
        classes=() if given.classes is None else read_classes(given.classes),
    )
    if read.why:
        print(f"took {given.path} for {read.source}: {read.why}")
    if given.labels is not None and read.names:
        first, last = read.names[0], read.names[-1]
        print(f"labels of {given.labels}: the first is of {first}, the last of {last}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    read.distilled.save(given.out)
    print(f"wrote {given.out}: {read.distilled!r}")
    print(f"its targets are {_TARGETS[read.distilled.meta.get('label_kind', 'representation')]}")
    for what in read.left_out:
        print(f"left out: {what}")


_TARGETS = {
    "class": "classes, one-hot",
    "soft": "soft labels of classes",
    "representation": "representations",
}
"""What the targets of an imported set are, by its label_kind."""


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.strip("[]").removesuffix(",").split(","))
    except ValueError:
        raise ConfigError(f"--{name} must be numbers like 0.5,0.5,0.5, got {text!r}") from None
