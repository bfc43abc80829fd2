"""Folders inside of class folders, links inside of tars, and what lies beside an image set."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from krrst_fast.data import ImageStore, PrepareConfig, prepare
from krrst_fast.data.formats import tars
from krrst_fast.errors import DataError


def png(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level,) * 3).save(file, "png")
    return file.getvalue()


def images(*places: str) -> Callable[[Path], None]:
    """Make two images in each folder; TEXT=... makes a file of text instead."""

    def make(root: Path) -> None:
        for place in places:
            name, is_text, text = place.partition("=")
            if is_text:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
                continue
            (root / name).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                (root / name / f"{i}.png").write_bytes(png(i))

    return make


def store(source: Path, out: Path, **settings) -> ImageStore:
    return prepare(PrepareConfig(source=str(source), out=out, size=4, **settings))


# folder -> the words of the refusal, its flag, and the classes that the flag gives
AMBIGUOUS = {
    "splits two levels below": (
        images("A/data/train", "A/data/test", "B/data/train", "B/data/test"),
        "would A be one class? .*A/data holds a folder called t.*, like a split; name .*A/data",
        "classes",
        ("A", "B"),
    ),
    "one split below a class": (
        images("A/x/y/val", "B"),
        "would A be one class? .*A/x/y holds a folder called val, like a split; name .*A/x/y if",
        "classes",
        ("A", "B"),
    ),
    "splits that are called nearly so": (
        images("A/x/train2017", "A/x/val2017", "B"),
        "A/x holds 2 folders of images, such as train2017 and val2017",
        "classes",
        ("A", "B"),
    ),
    "classes beside a class": (
        images("PetImages/Cat", "PetImages/Dog", "other"),
        "would PetImages be one class? .*PetImages holds 2 folders of images, such as Cat and Dog",
        "classes",
        ("PetImages", "other"),
    ),
    "classes of classes": (
        images("dogs/beagle", "dogs/pug", "cats/siamese"),
        "would dogs be one class? .*dogs holds 2 folders of images, such as beagle and pug",
        "classes",
        ("cats", "dogs"),
    ),
    "classes of classes in a split": (
        images("train/dogs/beagle", "train/dogs/pug", "test/dogs/pug"),
        "dogs holds 2 folders of images, such as beagle and pug; .* --layout splits takes",
        "splits",
        ("dogs",),
    ),
    "a split in a class of a split": (
        images("train/dogs/test", "test/dogs"),
        "root/train/dogs holds a folder called test, like a split",
        "splits",
        ("dogs",),
    ),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_class_that_seems_to_hold_a_set_is_refused_with_the_flag(tmp_path, name):
    make, message, flag, classes = AMBIGUOUS[name]
    make(tmp_path / "root")
    with pytest.raises(DataError, match=message.replace("?", r"\?")) as caught:
        store(tmp_path / "root", tmp_path / "out")
    assert f"--layout {flag} takes each folder of" in str(caught.value)
    assert store(tmp_path / "root", tmp_path / "out", layout=flag).classes == classes


# folder -> images of each split, classes, and what is left out
UNDERSTOOD = {
    "ImageNet as TinyImageNet has it": (
        images("n01440764/images", "n02124075/images"),
        {"train": 4},
        ("n01440764", "n02124075"),
        {},
    ),
    "the same in splits": (
        images("train/a/images", "train/b/images", "val/a/images"),
        {"train": 4, "test": 2},
        ("a", "b"),
        {},
    ),
    "more of a class in a folder of its own": (
        images("a", "a/more", "a/most", "b"),
        {"train": 8},
        ("a", "b"),
        {},
    ),
    "a class called like a split": (
        images("train/train", "train/b", "test/train"),
        {"train": 4, "test": 2},
        ("b", "train"),
        {},
    ),
    "an unpacked zip of class folders": (
        images("PetImages/Cat", "PetImages/Dog", "readme.txt=x", "more.zip=x"),
        {"train": 4},
        ("Cat", "Dog"),
        {
            ".txt is no image": 1,
            ".zip is not read: unpack it (unzip FILE -d FOLDER) and prepare that folder": 1,
        },
    ),
    "the same two levels below": (images("x/y/Cat", "x/y/Dog"), {"train": 4}, ("Cat", "Dog"), {}),
    "an unpacked zip of splits": (
        images("i/train/a", "i/val/a", "licence.txt=x", ".git/a"),
        {"train": 2, "test": 2},
        ("a",),
        {".txt is no image": 1, "a hidden folder": 1},
    ),
    "one class": (images("x/y"), {"train": 2}, ("x",), {}),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_says_what_it_is_is_read(tmp_path, name):
    make, counts, classes, left_out = UNDERSTOOD[name]
    make(tmp_path / "root")
    found = store(tmp_path / "root", tmp_path / "out")
    assert {split: found.count(split) for split in found.splits} == counts
    assert (found.classes, found.left_out) == (classes, left_out)


def test_several_archives_are_counted(tmp_path):
    images("root/a.zip=x", "root/b.zip=x", "root/c.txt=x")(tmp_path)
    with pytest.raises(DataError, match="only .*/a.zip and 1 more like it; unpack it .unzip FILE"):
        store(tmp_path / "root", tmp_path / "out")


@pytest.fixture(params=["native", "tarfile"])
def either_index(request, monkeypatch):
    """With the extension's index of a tar, and without."""
    if request.param == "native":
        pytest.importorskip("krrst_fast._native", reason="the extension is not built")
    else:
        monkeypatch.setattr(tars, "_entries", tars.entries_by_tarfile)


def write_tar(path: Path, *rows: tuple[str, bytes | str], links: bytes = tarfile.SYMTYPE) -> Path:
    """A tar of files (name, bytes) and links (name, target)."""
    with tarfile.open(path, "w") as tar:
        for name, content in rows:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = links, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_links_in_a_tar_are_the_files_that_they_lead_to(tmp_path, either_index):
    first = [("d/a.png", png(1)), ("d/a.cls", b"3"), ("c.png", png(2)), ("c.cls", b"0")]
    hard = write_tar(
        tmp_path / "hard.tar", *first, ("./b.png", "d/a.png"), ("b.cls", "./d/a.cls"),
        links=tarfile.LNKTYPE,
    )  # fmt: skip
    soft = write_tar(
        tmp_path / "soft.tar", ("d/b.png", "again.png"), ("d/again.png", "../d/./a.png"),
        ("d/b.cls", "a.cls"), ("d/again.cls", "b.cls"), *first, ("e.png", "c.png"),
        ("e.cls", "c.cls"),
    )  # fmt: skip
    for path, levels, labels in (
        (hard, [1, 2, 1], [3, 0, 3]),
        (soft, [1, 1, 1, 2, 2], [3, 3, 3, 0, 0]),
    ):
        found = store(path, tmp_path / path.stem)
        assert found.images("train")[:, 0, 0, 0].tolist() == levels
        assert found.labels("train").tolist() == labels and found.left_out == {}


def test_links_that_lead_to_no_file_of_the_tar_are_counted(tmp_path, either_index):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(7))
    path = write_tar(
        tmp_path / "train.tar",
        ("a.png", png(1)), ("gone.png", "none.png"), ("out.png", str(outside)),
        ("up.png", "../outside.png"), ("x.png", "y.png"), ("y.png", "x.png"), ("z.png", "z.png"),
    )  # fmt: skip
    with tarfile.open(path, "a") as tar:
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        tar.addfile(pipe)
    found = store(path, tmp_path / "out")
    assert found.count("train") == 1
    assert found.left_out == {"a link that leads to no file of its tar": 6, "no regular file": 1}
    with pytest.raises(DataError, match="7 files would be left out, which --strict refuses; .*gon"):
        store(path, tmp_path / "strict", strict=True)
