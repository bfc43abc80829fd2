"""What the folders of an image set are taken for, and that nothing in them vanishes unsaid."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from krrst_fast.data import PrepareConfig, kinds, prepare
from krrst_fast.errors import DataError
from krrst_fast.runs.files import read_json, write_json


def image(path: Path, level: int = 0) -> Path:
    """A 4 x 4 image whose pixels are `level`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (level,) * 3).save(path, "png")
    return path


def images(*patterns: str, count: int = 3) -> Callable[[Path], None]:
    """Make images 0.png, 1.png, ... in each folder; TEXT=... makes a file of text instead."""

    def make(root: Path) -> None:
        for place in patterns:
            name, is_text, text = place.partition("=")
            if is_text:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
            else:
                for i in range(count):
                    image(root / name / f"{i}.png", i)

    return make


def hundred(root: Path) -> None:
    for i in range(93):
        images(f"class{i:02d}", count=2)(root)
    images("train", count=2)(root)


def tiny(root: Path) -> None:
    for name in ("n01", "n02"):
        images(f"t/train/{name}/images", f"t/train/{name}/{name}_boxes.txt=0 0 1 1\n")(root)
    images("t/val/images", "t/test/images", "t/wnids.txt=n01\nn02\n")(root)
    rows = "".join(f"{i}.png\tn0{i % 2 + 1}\n" for i in range(3))
    (root / "t/val/val_annotations.txt").write_text(rows)


def linked(root: Path) -> None:
    images("pool/a", "pool/b")(root)
    (root / "set").mkdir()
    for name in ("a", "b"):
        (root / "set" / name).symlink_to(root / "pool" / name)


def circle(root: Path) -> None:
    images("set/a", "set/b")(root)
    (root / "set/a/up").symlink_to(root / "set")
    (root / "set/a/top").symlink_to(root.parent)
    (root / "set/b/again").symlink_to(root / "set/b")
    (root / "set/b/itself").symlink_to(root / "set/b/itself")


def suffixes(root: Path) -> None:
    names = ("jfif", "jpe", "jp2", "tga", "ico", "PNG")
    for i, suffix in enumerate(names):
        image(root / "a" / f"{i}.{suffix}")
    (root / "a" / "raw.nef").write_bytes(b"x")
    (root / "a" / ".hidden.png").write_bytes(b"x")


def add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    tar.addfile(info, io.BytesIO(body))


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(file, "png")
    return file.getvalue()


def tar_bytes(keys: range, *notes: tuple[str, str]) -> bytes:
    """A tar with an image for each key, and with notes (suffix, text); {} is the key."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key in keys:
            add(tar, f"{key:03d}.png", png(key))
            for suffix, text in notes:
                add(tar, f"{key:03d}.{suffix}", text.replace("{}", str(key)).encode())
    return file.getvalue()


def joined(root: Path) -> None:
    parts = (tar_bytes(range(3)), tar_bytes(range(3, 7)), tar_bytes(range(7, 8)))
    (root / "train.tar").write_bytes(b"".join(parts))


def json_labels(root: Path) -> None:
    body = tar_bytes(range(3), ("json", '{"label": {}, "caption": "a"}'), ("txt", "a"))
    (root / "train.tar").write_bytes(body)


def captions(root: Path) -> None:
    (root / "train.tar").write_bytes(tar_bytes(range(3), ("json", '{"caption": "a"}')))


def several(root: Path) -> None:
    body = tar_bytes(range(2), ("cls", "{}"), ("JSON", "{}"), ("seg.png", "x"))
    (root / "train.tar").write_bytes(body)


def beside_tars(root: Path) -> None:
    (root / "train.tar").write_bytes(tar_bytes(range(3)))
    images("more", "notes.md=x")(root)


def archives(root: Path) -> None:
    images("a")(root)
    (root / "b.zip").write_bytes(b"x")


Count = dict[str, int]

# folder -> images of each split, number of classes, and what is left out
TABLE: dict[str, tuple[Callable[[Path], None], str, Count, int, Count]] = {
    "{boat,plane,train}": (images("boat", "plane", "train"), "", {"train": 9}, 3, {}),
    "94 classes, one called train": (hundred, "", {"train": 188}, 94, {}),
    "{control,test}": (images("control", "test"), "", {"train": 6}, 2, {}),
    "{train,dev}/CLASS": (
        images("train/a", "train/b", "dev/a"),
        "",
        {"train": 6, "test": 3},
        2,
        {},
    ),
    "{train,test} beside a note": (
        images("train/a", "test/a", "README=x"),
        "",
        {"train": 3, "test": 3},
        1,
        {"a file without a suffix is no image": 1},
    ),
    "parent of TinyImageNet": (
        tiny,
        "",
        {"train": 6, "test": 3},
        2,
        {
            "an image that is of TinyImageNet's test split, which has no labels": 3,
            ".txt is no image": 3,
        },
    ),
    "parent of imagenette": (
        images("i/train/a", "i/train/b", "i/val/a", "i/val/b"),
        "",
        {"train": 6, "test": 6},
        2,
        {},
    ),
    "parent of a parent": (
        images("x/i/train/a", "x/i/val/a"),
        "",
        {"train": 3, "test": 3},
        1,
        {},
    ),
    "linked class folders": (linked, "set", {"train": 6}, 2, {}),
    "links in a circle": (
        circle,
        "set",
        {"train": 6},
        2,
        {"a file without a suffix is no image": 1, "a link to a folder that is read already": 3},
    ),
    "suffixes": (
        suffixes,
        "",
        {"train": 6},
        1,
        {
            ".nef is not read: Pillow does not read it; save it as PNG or JPEG": 1,
            "a hidden image": 1,
        },
    ),
    "a folder called x.jpg": (images("x.jpg", "b"), "", {"train": 6}, 2, {}),
    "a hidden folder": (
        images(".ipynb_checkpoints", "a"),
        "",
        {"train": 3},
        1,
        {"a hidden folder": 1},
    ),
    "an empty class": (
        images("a", "b/notes.txt=x"),
        "",
        {"train": 3},
        1,
        {".txt is no image": 1, "a folder without images": 1},
    ),
    "joined tars": (joined, "", {"train": 8}, 0, {}),
    "labels in .json": (json_labels, "", {"train": 3}, 3, {".txt is no image": 3}),
    "captions in .json": (
        captions,
        "",
        {"train": 3},
        0,
        {"a .json without an integer at cls or label": 3},
    ),
    "several notes a sample": (
        several,
        "",
        {"train": 2},
        2,
        {
            ".seg.png is no single suffix, as .png is": 2,
            "a .json without an integer at cls or label": 2,
        },
    ),
    "images beside tars": (
        beside_tars,
        "",
        {"train": 3},
        0,
        {"an image that lies beside the WebDataset tars": 3, ".md is no image": 1},
    ),
    "a zip beside images": (
        archives,
        "",
        {"train": 3},
        1,
        {
            ".zip is not read: unpack it (unzip FILE -d FOLDER) and prepare that folder": 1,
        },
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_an_odd_folder_is_read_whole_or_its_rest_is_counted(tmp_path, name):
    make, place, counts, classes, left_out = TABLE[name]
    root = tmp_path / "root"
    root.mkdir()
    make(root)

    def store(out: str, **settings):
        config = PrepareConfig(source=str(root / place), out=tmp_path / out, size=4, **settings)
        return prepare(config)

    found = store("out")
    assert {split: found.count(split) for split in found.splits} == counts
    assert len(found.classes) == classes
    assert found.left_out == left_out
    if left_out:
        with pytest.raises(DataError, match="would be left out, which --strict refuses; the f"):
            store("strict", strict=True)
        assert not (tmp_path / "strict").exists()
    else:
        assert store("strict", strict=True).splits == found.splits


AMBIGUOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "{train,test,extra}": (images("train", "test", "extra"), "beside extra; --layout classes or"),
    "{train/CLASS,extra}": (images("train/a", "extra"), "beside extra; --layout classes or"),
    "images beside train": (images("train/a", "."), "beside 0.png; --layout classes or"),
    "two sets": (
        images("a/train/x", "a/val/x", "b/train/x", "b/val/x"),
        "a is an image set of its own, and b lies beside it; name one of them, or --layout classes",
    ),
    "a set beside a class": (images("a/train/x", "b"), "a is an image set .* and b lies beside"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_folder_that_does_not_say_is_refused_with_the_flag(tmp_path, name):
    make, message = AMBIGUOUS[name]
    make(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig(source=str(tmp_path / "root"), out=tmp_path / "out", size=4))


def test_the_flag_decides_what_the_folders_are(tmp_path):
    root = tmp_path / "root"
    images("train", "test", "extra")(root)

    def store(layout: str):
        config = PrepareConfig(source=str(root), out=tmp_path / layout, size=4, layout=layout)
        return prepare(config)

    assert store("classes").classes == ("extra", "test", "train")
    split = store("splits")
    assert split.splits == {"train": (0, 3), "test": (3, 6)}
    assert split.left_out == {"an image that lies beside the splits": 3}
    for name in ("train", "test"):
        (root / name).rename(root / f"{name}_")
    with pytest.raises(DataError, match="--layout splits, and no folder train, val or test"):
        prepare(PrepareConfig(source=str(root), out=tmp_path / "o", size=4, layout="splits"))


def test_the_bytes_do_not_depend_on_the_order_of_the_file_system(tmp_path):
    """Names whose numbers are equal, made in two orders."""
    names = ["a/01.png", "a/1.png", "a/001.png", "b/1.png", "b/01.png", "b/x/1.png"]
    stores = []
    for run, order in enumerate((names, names[::-1])):
        root = tmp_path / str(run) / "root"
        for name in order:
            image(root / name, names.index(name))
        stores.append(prepare(PrepareConfig(source=str(root), out=tmp_path / f"s{run}", size=4)))
    first, second = ((store.path / "images.u8").read_bytes() for store in stores)
    assert first == second and len(set(first)) == len(names)
    assert stores[0].labels().tolist() == stores[1].labels().tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tar.gz", r"\.gz is not read; unpack it \(tar -xf FILE -C FOLDER\)"),
        ("a.tgz", r"\.tgz is not read; unpack it \(tar -xf"),
        ("a.zip", r"\.zip is not read; unpack it \(unzip FILE -d FOLDER\)"),
        ("a.feather", r"\.feather is not read; save its images as files first"),
        ("a.npy", r"\.npy is not read; save uint8 images .* with numpy.savez"),
        ("a.heic", r"heic is not read; pip install pillow-heif"),
    ],
)
def test_an_archive_or_a_folder_of_archives_says_what_to_do(tmp_path, name, message):
    if f".{name.rpartition('.')[2]}" in kinds.IMAGE_SUFFIXES:
        pytest.skip("it is read here")
    folder = tmp_path / "root"
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    hint = message.partition("; ")[2]
    for source, text in ((folder / name, message), (folder, f"no image, only .*{name}; {hint}")):
        with pytest.raises(DataError, match=text) as caught:
            prepare(PrepareConfig(source=str(source), out=tmp_path / "out", size=4))
        assert "\n" not in str(caught.value)


def test_an_image_that_only_a_newer_pillow_reads_is_named(tmp_path):
    assert {".jfif", ".jpe", ".jp2", ".png", ".webp"} <= kinds.IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".h5", ".wmf", ".mpg", ".pdf"} & kinds.IMAGE_SUFFIXES
    # Ghostscript is never run, whatever a file is called.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(eps)
    with pytest.raises(DataError, match="0.png: not a readable image .no image format"):
        prepare(PrepareConfig(source=str(tmp_path / "a"), out=tmp_path / "out", size=4))


def test_other_arrays_of_an_npz_are_counted(tmp_path):
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels, labels=[0, 1, 1], masks=pixels)
    store = prepare(PrepareConfig(source=str(tmp_path / "train.npz"), out=tmp_path / "o", size=4))
    assert store.left_out == {"an array of another name in an npz": 1}
    index = json.loads((store.path / "index.json").read_text())
    assert index["ignored"]["first"] == [f"{tmp_path / 'train.npz'}:masks"]


def test_a_store_without_the_newer_entries_is_still_read(tmp_path):
    image(tmp_path / "a" / "0.png")
    store = prepare(PrepareConfig(source=str(tmp_path / "a"), out=tmp_path / "out", size=4))
    path = store.path / "index.json"
    index = read_json(path)
    assert index["pixels"] == {"fit": "crop", "background": [255, 255, 255], "upright": True}
    older = {k: v for k, v in index.items() if k not in ("pixels", "left_out")}
    write_json(path, older, sealed=True)
    from krrst_fast.data import open_store

    assert open_store(store.path, verify=True).left_out == {}
