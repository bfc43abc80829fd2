"""Every format gives the same packed pixels for the same pictures."""

import io
import pickle
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare
from krrst_fast.errors import ConfigError

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 23, "test": 9}
SIDE = 6


@pytest.fixture(scope="module")
def pictures() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images [N, SIDE, SIDE, 3] and labels [N] of each split."""
    rng = np.random.default_rng(0)
    return {
        split: (rng.integers(0, 256, (n, SIDE, SIDE, 3), np.uint8), rng.integers(0, 3, n))
        for split, n in COUNTS.items()
    }


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_folder(pictures, out: Path, splits=("train", "test")) -> None:
    for split, name in zip(("train", "test"), splits):
        for i, (image, label) in enumerate(zip(*pictures[split])):
            path = out / name / CLASSES[label] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))


def write_tiny(pictures, out: Path) -> None:
    for i, (image, label) in enumerate(zip(*pictures["train"])):
        path = out / "train" / CLASSES[label] / "images" / f"{CLASSES[label]}_{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
        (out / "train" / CLASSES[label] / f"{CLASSES[label]}_boxes.txt").write_text("0 0 1 1\n")
    (out / "val" / "images").mkdir(parents=True)
    (out / "test" / "images").mkdir(parents=True)
    (out / "test" / "images" / "test_0.png").write_bytes(png(pictures["test"][0][0]))
    rows = []
    for i, (image, label) in enumerate(zip(*pictures["test"])):
        (out / "val" / "images" / f"val_{i}.png").write_bytes(png(image))
        rows.append(f"val_{i}.png\t{CLASSES[label]}\t0\t0\t5\t5\n")
    (out / "val" / "val_annotations.txt").write_text("".join(reversed(rows)))


def write_tars(pictures, out: Path, names=("train", "test"), shard: int = 10) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, name in zip(("train", "test"), names):
        images, labels = pictures[split]
        for start in range(0, len(images), shard):
            with tarfile.open(out / f"set-{name}-{start // shard:06d}.tar", "w") as tar:
                for i in range(start, min(start + shard, len(images))):
                    for suffix, body in (("png", png(images[i])), ("cls", b"%d" % labels[i])):
                        info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                        info.size = len(body)
                        tar.addfile(info, io.BytesIO(body))
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def write_npz(pictures, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in pictures.items():
        np.savez(out / f"{split}.npz", images=images, labels=labels, class_names=CLASSES)


def write_imagenet64(pictures, out: Path) -> None:
    """Flat planar rows, labels from 1, the train split in parts."""
    out.mkdir(parents=True, exist_ok=True)
    images, labels = pictures["train"]
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    for part, rows in enumerate(np.array_split(np.arange(len(images)), 11), 1):
        name = out / f"train_data_batch_{part}.npz"
        np.savez_compressed(name, data=flat[rows], labels=(labels[rows] + 1).tolist())
    images, labels = pictures["test"]
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    np.savez(out / "val_data.npz", data=flat, labels=labels + 1)


def cifar_batch(images, labels, key: bytes, protocol: int = 2) -> bytes:
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({b"data": rows, key: labels.tolist(), b"batch_label": b"x"}, protocol)


def write_cifar100(pictures, out: Path) -> None:
    folder = out / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, (images, labels) in pictures.items():
        (folder / split).write_bytes(cifar_batch(images, labels, b"fine_labels"))
    meta = {b"fine_label_names": [c.encode() for c in CLASSES], b"coarse_label_names": [b"all"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, 2))


def write_cifar10(pictures, out: Path) -> None:
    """As a newer Python would write it: str keys, and NumPy's newer module name."""
    out.mkdir(parents=True)
    images, labels = pictures["train"]
    for i, rows in enumerate(np.array_split(np.arange(len(images)), 5), 1):
        batch = pickle.loads(cifar_batch(images[rows], labels[rows], b"labels"))
        batch = {key.decode(): value for key, value in batch.items()}
        (out / f"data_batch_{i}").write_bytes(pickle.dumps(batch, 4))
    (out / "test_batch").write_bytes(cifar_batch(*pictures["test"], b"labels"))
    (out / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))


def write_released(pictures, out: Path) -> None:
    out.mkdir(parents=True)
    for split, (images, labels) in pictures.items():
        tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        torch.save(tensor.float() / 255, out / f"X_{split[:2]}_{SIDE}.pth")
        torch.save(torch.zeros(1, 3, 4, 4), out / f"X_{split[:2]}_4.pth")
        torch.save(torch.from_numpy(labels), out / f"Y_{split[:2]}_{SIDE}.pth")


WRITERS = {
    "folder": write_folder,
    "folder with val": lambda p, out: write_folder(p, out, ("train", "val")),
    "TinyImageNet": write_tiny,
    "tars": write_tars,
    "tars with val": lambda p, out: write_tars(p, out, ("train", "val")),
    "npz": write_npz,
    "ImageNet-64": write_imagenet64,
    "CIFAR-100": write_cifar100,
    "CIFAR-10": write_cifar10,
    "released": write_released,
}
NAMELESS = ("ImageNet-64", "released")


def store_of(source: Path, out: Path, **settings) -> ImageStore:
    config = PrepareConfig(**{"source": str(source), "out": out, "size": SIDE} | settings)
    prepare(config)
    return open_store(out, verify=True)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_format_gives_the_same_pixels_and_labels(pictures, tmp_path, kind):
    WRITERS[kind](pictures, tmp_path / "source")
    store = store_of(tmp_path / "source", tmp_path / "store")
    everything = np.concatenate([pictures[split][0] for split in COUNTS])
    expected = everything.transpose(0, 3, 1, 2).tobytes()
    assert (tmp_path / "store" / "images.u8").read_bytes() == expected
    assert store.splits == {"train": (0, 23), "test": (23, 32)}
    assert store.classes == (("0", "1", "2") if kind in NAMELESS else CLASSES)
    for split, (_, labels) in pictures.items():
        assert store.labels(split).tolist() == labels.tolist()
        assert store.count(split) == len(labels)


def test_mean_and_deviation_are_those_of_the_train_split(pictures, tmp_path):
    write_npz(pictures, tmp_path / "source")
    store = store_of(tmp_path / "source", tmp_path / "store")
    pixels = pictures["train"][0].reshape(-1, 3) / 255
    assert np.allclose(store.mean, pixels.mean(0), rtol=0, atol=1e-14)
    assert np.allclose(store.std, pixels.std(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_takes_the_first_of_each_split(pictures, tmp_path, kind):
    WRITERS[kind](pictures, tmp_path / "source")
    store = store_of(tmp_path / "source", tmp_path / "store", limit=4)
    assert store.splits == {"train": (0, 4), "test": (4, 8)}
    for split in COUNTS:
        expected = pictures[split][0][:4].transpose(0, 3, 1, 2)
        assert np.array_equal(store.images(split).numpy(), expected)


def test_single_files_are_sources_too(pictures, tmp_path):
    write_npz(pictures, tmp_path / "npz")
    write_tars(pictures, tmp_path / "tars", shard=100)
    write_released(pictures, tmp_path / "released")
    sources = [
        (tmp_path / "npz" / "test.npz", "test"),
        (tmp_path / "tars" / "set-test-000000.tar", "test"),
        (tmp_path / "released" / f"X_te_{SIDE}.pth", "test"),
    ]
    for i, (source, split) in enumerate(sources):
        store = store_of(source, tmp_path / f"store{i}")
        expected = pictures["test"][0].transpose(0, 3, 1, 2)
        assert np.array_equal(store.images(split).numpy(), expected)


def test_the_original_pickles_of_python_2_are_read(pictures, tmp_path):
    """Byte strings for text, and a dtype with integers where NumPy now wants booleans."""
    write_cifar100(pictures, tmp_path)
    folder = tmp_path / "cifar-100-python"
    for split, (images, labels) in pictures.items():
        data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        (folder / split).write_bytes(python_2_pickle(data, labels.tolist()))
    store = store_of(tmp_path, tmp_path / "store")
    for split, (images, labels) in pictures.items():
        assert np.array_equal(store.images(split).numpy(), images.transpose(0, 3, 1, 2))
        assert store.labels(split).tolist() == labels.tolist()


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    shape = b"(" + b"".join(map(number, data.shape)) + b"t"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + number(0) + b"t"
    array += text(b"b") + b"tR(" + number(1) + shape + dtype + b"I00\n" + text(data.tobytes())
    array += b"tb"
    values = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"fine_labels") + values + b"u."


def test_order_is_by_number_over_the_classes_and_not_by_text(tmp_path):
    levels = {"ant/x_10.png": 4, "bee/x_9.png": 2, "ant/x_9.png": 1, "bee/x_2.png": 0}
    levels["cat/none.png"] = 5
    for name, level in levels.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(png(np.full((2, 2, 3), level, np.uint8)))
    store = store_of(tmp_path / "source", tmp_path / "store", size=2)
    assert store.images()[:, 0, 0, 0].tolist() == [5, 0, 1, 2, 4]
    assert [store.classes[i] for i in store.labels()] == ["cat", "bee", "ant", "bee", "ant"]


def test_val_and_test_keep_their_names_where_both_are_there(pictures, tmp_path):
    write_folder(pictures, tmp_path, ("test", "validation"))
    write_folder(pictures, tmp_path, ("train", "train"))
    store = store_of(tmp_path, tmp_path / "out" / "store")
    assert list(store.splits) == ["train", "val", "test"]
    assert np.array_equal(store.images("val").numpy(), pictures["test"][0].transpose(0, 3, 1, 2))


def test_bare_images_are_an_unlabelled_train_split(pictures, tmp_path):
    for i, image in enumerate(pictures["train"][0]):
        (tmp_path / f"{i}.png").write_bytes(png(image))
    store = store_of(tmp_path, tmp_path / "out" / "store")
    assert store.splits == {"train": (0, 23)} and not store.has_labels and store.classes == ()
    assert np.array_equal(store.images().numpy(), pictures["train"][0].transpose(0, 3, 1, 2))


def test_files_that_are_no_images_are_counted_and_named(pictures, tmp_path):
    import json

    write_folder(pictures, tmp_path / "source")
    (tmp_path / "source" / "train" / "ant" / "notes.txt").write_text("x")
    (tmp_path / "source" / "train" / "ant" / ".DS_Store").write_text("x")
    (tmp_path / "source" / "README").write_text("x")
    store_of(tmp_path / "source", tmp_path / "store")
    ignored = json.loads((tmp_path / "store" / "index.json").read_text())["ignored"]
    assert ignored["count"] == 2
    assert [Path(name).name for name in ignored["first"]] == ["notes.txt", "README"]


@pytest.mark.parametrize(
    "to_array",
    [
        lambda images: images.transpose(0, 3, 1, 2),
        lambda images: images.astype(np.float32) / 255,
        lambda images: (images / 255).astype(np.float16),
        lambda images: np.concatenate([images, np.full_like(images[..., :1], 255)], 3),
    ],
    ids=["planar", "float32", "float16", "opaque RGBA"],
)
def test_npz_arrays_of_other_layouts_hold_the_same_pixels(pictures, tmp_path, to_array):
    np.savez(tmp_path / "a.npz", images=to_array(pictures["train"][0]))
    store = store_of(tmp_path / "a.npz", tmp_path / "store")
    assert np.array_equal(store.images().numpy(), pictures["train"][0].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(23, SIDE, SIDE), (23, SIDE, SIDE, 1), (23, SIDE * SIDE)])
def test_grey_arrays_are_replicated(pictures, tmp_path, shape):
    grey = pictures["train"][0][..., 0]
    np.savez(tmp_path / "a.npz", images=grey.reshape(shape))
    store = store_of(tmp_path / "a.npz", tmp_path / "store")
    assert np.array_equal(store.images().numpy(), np.repeat(grey[:, None], 3, 1))


def test_the_digits_are_embedded_stratified_and_always_the_same(tmp_path):
    from sklearn.datasets import load_digits

    store = prepare(PrepareConfig(source="digits", out=tmp_path / "a", size=8))
    prepare(PrepareConfig(source="digits", out=tmp_path / "b", size=8))
    bytes_a, bytes_b = ((tmp_path / n / "images.u8").read_bytes() for n in "ab")
    assert bytes_a == bytes_b
    assert (store.count("train"), store.count("test")) == (1200, 597)
    digits = load_digits()
    total = np.bincount(digits.target)
    for split, share in (("train", 1200 / 1797), ("test", 597 / 1797)):
        counts = torch.bincount(store.labels(split)).numpy()
        assert np.abs(counts - total * share).max() <= 1
    stored = torch.cat([store.images("train"), store.images("test")])
    assert torch.equal(stored[:, 0], stored[:, 1]) and torch.equal(stored[:, 0], stored[:, 2])
    expected = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, stored[:, 0].numpy())) == sorted(map(bytes, expected))


@pytest.mark.parametrize("fraction,held", [(0.2, [4, 9]), (0.5, [1, 3, 5, 7, 9]), (0.05, [])])
def test_a_fraction_of_each_class_is_held_out(
    tmp_path: Path, fraction: float, held: list[int]
) -> None:
    pixels = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    labels = np.array([0, 1] * 10)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    config = {"source": str(tmp_path / "a.npz"), "size": 4, "test_fraction": fraction}
    with (
        nullcontext() if held else pytest.warns(UserWarning, match="0.05 of so few images is none")
    ):
        store = prepare(PrepareConfig(**config, out=tmp_path / "out"))
    # Of each class the fifth and the tenth, and so on: no class gives more than another.
    test = sorted(2 * i + label for i in held for label in (0, 1))
    train = [i for i in range(20) if i not in test]
    assert store.images("train")[:, 0, 0, 0].tolist() == train
    assert store.labels("train").tolist() == [i % 2 for i in train]
    if held:
        assert store.images("test")[:, 0, 0, 0].tolist() == test
    else:
        assert "test" not in store.splits


def test_a_fraction_of_what_has_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    config = PrepareConfig(source=str(tmp_path), out=tmp_path / "o", size=4, test_fraction=0.1)
    with pytest.raises(ConfigError, match="test_fraction must be 0 .* has train, test"):
        prepare(config)
