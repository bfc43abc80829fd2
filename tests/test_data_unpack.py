"""Real CIFAR-100 images, laid out in each format users have, give the same packed pixels."""

import subprocess
import sys
from pathlib import Path

import pytest

from krrst_fast.data import ImageStore, PrepareConfig, open_store, prepare

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
UNPACK = DATA / "unpack.py"
LIMIT = 300

pytestmark = pytest.mark.skipif(
    not UNPACK.is_file(), reason="no ../shared/data/unpack.py beside the repository"
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, ImageStore]:
    """Each format of the same images as a store."""
    folder = tmp_path_factory.mktemp("unpacked")
    made = {}
    for name in ("cifar", "imagefolder", "webdataset", "npz"):
        command = [sys.executable, str(UNPACK), "cifar100", name, str(folder / name)]
        subprocess.run([*command, "--limit", str(LIMIT)], check=True)
        out = folder / f"{name}.store"
        prepare(PrepareConfig(source=str(folder / name), out=out))
        made[name] = open_store(out, verify=True)
    return made


@pytest.mark.parametrize("name", ["imagefolder", "webdataset", "npz"])
def test_the_packed_pixels_are_the_same_bytes(stores, name):
    expected = (stores["cifar"].path / "images.u8").read_bytes()
    assert len(expected) == 2 * LIMIT * 3 * 32 * 32
    assert (stores[name].path / "images.u8").read_bytes() == expected
    assert stores[name].splits == stores["cifar"].splits == {"train": (0, 300), "test": (300, 600)}
    assert stores[name].mean == stores["cifar"].mean and stores[name].std == stores["cifar"].std


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_labels_mean_the_same_classes(stores, split):
    """Tars know integers only; the pickles say which class they are."""
    pickles = stores["cifar"]
    expected = [pickles.classes[label] for label in pickles.labels(split)]
    assert len(set(expected)) > 50
    for name in ("imagefolder", "npz"):
        store = stores[name]
        assert [store.classes[label] for label in store.labels(split)] == expected
    integers = stores["webdataset"]
    named = [pickles.classes[int(integers.classes[i])] for i in integers.labels(split)]
    assert named == expected


def test_jpegs_of_other_sizes_and_grey_ones_become_one_size(tmp_path):
    """Imagenette's tars: 224 pixels, some of them grey, class names in a file beside them."""
    store = prepare(
        PrepareConfig(source=str(DATA / "imagenette224"), out=tmp_path / "s", size=64, limit=40)
    )
    assert store.splits == {"train": (0, 40), "test": (40, 80)}
    assert store.classes[0] == "n01440764 tench" and len(store.classes) == 10
    assert store.images().float().std() > 40
    assert set(store.labels().tolist()) <= set(range(10))
