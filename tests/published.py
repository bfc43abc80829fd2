"""Small sets in exactly the layouts in which their authors publish them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def photo(path: Path, level: int, size: tuple[int, int] = (12, 10)) -> None:
    """Write an image whose pixels are `level`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path, quality=95)


def cells(*texts: str) -> np.ndarray:
    """Return a cell array [N, 1] of texts."""
    made = np.empty((len(texts), 1), object)
    made[:, 0] = texts
    return made


def records(**columns: list) -> np.ndarray:
    """Return a struct array [1, N]."""
    rows = np.empty((1, len(next(iter(columns.values())))), [(name, object) for name in columns])
    for name, values in columns.items():
        for i, value in enumerate(values):
            rows[name][0, i] = value
    return rows


def aircraft(root: Path) -> None:
    """Variants with spaces and slashes, test images before train images."""
    data = root / "fgvc-aircraft-2013b" / "data"
    variants = ["707-320", "F/A-18", "Falcon 900"]
    for name, first in (("trainval", 100), ("test", 0)):
        rows = [f"{first + i:07d} {variants[i % 3]}" for i in range(6)]
        for i in range(6):
            photo(data / "images" / f"{first + i:07d}.jpg", 40 * (i % 3))
        (data / f"images_variant_{name}.txt").write_text("\n".join(rows) + "\n")
    for name in ("train", "val"):
        (data / f"images_variant_{name}.txt").write_text("0000100 707-320\n")
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    (data / "images_box.txt").write_text("0000100 1 1 2 2\n")
    (data.parent / "README.md").write_text("FGVC-Aircraft Benchmark")


def birds(root: Path) -> None:
    """Attributes lie beside the set's own folder."""
    place = root / "CUB_200_2011"
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]
    images = [f"{classes[i % 3]}/{classes[i % 3][4:]}_{i:04d}.jpg" for i in range(12)]
    for i, image in enumerate(images):
        photo(place / "images" / image, 40 * (i % 3))

    def write(name: str, values: list[object]) -> None:
        lines = [f"{i + 1} {value}" for i, value in enumerate(values)]
        (place / name).write_text("\n".join(lines) + "\n")

    write("images.txt", list(images))
    write("image_class_labels.txt", [i % 3 + 1 for i in range(12)])
    write("train_test_split.txt", [int(i < 6) for i in range(12)])
    write("classes.txt", list(classes))
    write("bounding_boxes.txt", ["1.0 2.0 3.0 4.0"] * 12)
    (root / "attributes.txt").write_text("1 has_bill_shape::curved\n")


CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012")


def _car_list(path: Path, count: int, labelled: bool = True) -> None:
    columns: dict[str, list] = {f"bbox_{at}": [1] * count for at in ("x1", "y1", "x2", "y2")}
    if labelled:
        columns["class"] = [i % 3 + 1 for i in range(count)]
    columns["fname"] = [f"{i + 1:05d}.jpg" for i in range(count)]
    savemat(path, {"annotations": records(**columns)})


def cars(root: Path, labelled: bool = True) -> None:
    """The devkit's lists; labels of the test images come in a file of their own."""
    (root / "devkit").mkdir(parents=True)
    for split in ("train", "test"):
        for i in range(6):
            photo(root / f"cars_{split}" / f"{i + 1:05d}.jpg", 40 * (i % 3))
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": cells(*CARS).T})
    _car_list(root / "devkit" / "cars_train_annos.mat", 6)
    _car_list(root / "devkit" / "cars_test_annos.mat", 6, labelled=False)
    if labelled:
        _car_list(root / "cars_test_annos_withlabels.mat", 6)


def cars_in_one(root: Path) -> None:
    """All images in car_ims/, and one list."""
    names = [f"car_ims/{i + 1:06d}.jpg" for i in range(12)]
    for i, name in enumerate(names):
        photo(root / name, 40 * (i % 3))
    labels, test = [i % 3 + 1 for i in range(12)], [int(i >= 6) for i in range(12)]
    columns = {"relative_im_path": names, "class": labels, "test": test}
    rows = records(**columns)
    savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": cells(*CARS).T})


def dogs(root: Path) -> None:
    """lists.tar is unpacked beside images.tar and annotation.tar."""
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02085936-Maltese_dog"]
    for split, first in (("train", 0), ("test", 6)):
        names = [f"{breeds[i % 3]}/{breeds[i % 3][:9]}_{i + first}.jpg" for i in range(6)]
        for i, name in enumerate(names):
            photo(root / "Images" / name, 40 * (i % 3))
        notes = root / "Annotation" / breeds[0]
        notes.mkdir(parents=True, exist_ok=True)
        (notes / f"n02085620_{first}").write_text("<annotation/>")
        labels = np.array([[i % 3 + 1] for i in range(6)], np.uint8)
        lists = {"file_list": cells(*names), "annotation_list": cells(*names), "labels": labels}
        savemat(root / f"{split}_list.mat", lists)
    savemat(root / "file_list.mat", {"file_list": cells("x")})


def flowers(root: Path) -> None:
    """Labels of all images in one row, and three lists of their numbers."""
    for i in range(12):
        photo(root / "jpg" / f"image_{i + 1:05d}.jpg", 40 * (i % 3))
    savemat(root / "imagelabels.mat", {"labels": np.array([[i % 3 + 1 for i in range(12)]], "u1")})
    ids = {"trnid": [[1, 2, 3]], "valid": [[4, 5, 6]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    savemat(root / "setid.mat", {name: np.array(value, "u2") for name, value in ids.items()})


def svhn(root: Path) -> None:
    """X has the images last; the digit 0 is called 10."""
    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        digit = np.array([i % 3 for i in range(6)])
        images = np.zeros((32, 32, 3, 6), np.uint8) + 40 * digit.astype(np.uint8)
        savemat(
            root / f"{split}_32x32.mat", {"X": images, "y": np.where(digit, digit, 10)[:, None]}
        )
    (root / "extra_32x32.mat").write_bytes(b"too large for most")


def stl10(root: Path) -> None:
    """Bytes of images in column order, and of labels from 1."""
    place = root / "stl10_binary"
    place.mkdir(parents=True)
    for split in ("train", "test"):
        images = np.zeros((6, 3, 96, 96), np.uint8)
        images[:] = 40 * (np.arange(6) % 3)[:, None, None, None]
        images[:, :, :48, :] += 5  # the first columns, which are the left half
        images.tofile(place / f"{split}_X.bin")
        (np.arange(6) % 3 + 1).astype(np.uint8).tofile(place / f"{split}_y.bin")
    np.zeros((2, 3, 96, 96), np.uint8).tofile(place / "unlabeled_X.bin")
    (place / "class_names.txt").write_text("airplane\nbird\ncar\n")
    (place / "fold_indices.txt").write_text("0 1 2\n")


SETS: dict[str, Callable[[Path], None]] = {
    "FGVC-Aircraft": aircraft,
    "CUB-200-2011": birds,
    "Stanford Cars": cars,
    "Stanford Cars in one": cars_in_one,
    "Stanford Dogs": dogs,
    "Flowers-102": flowers,
    "SVHN": svhn,
    "STL-10": stl10,
}
