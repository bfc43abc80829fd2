"""The distilled set: its file, its pixels, and every way of reading one."""

import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from krrst_fast.distill.distilled_set import FILE_NAME, DistilledSet, load_distilled
from krrst_fast.errors import DataError

MEAN, STD = (0.5, 0.25, 0.125), (0.2, 0.3, 0.4)


def _set(seed: int = 0) -> DistilledSet:
    draw = torch.Generator().manual_seed(seed)
    return DistilledSet(
        images=torch.randn(5, 3, 4, 6, generator=draw),
        targets=torch.randn(5, 7, generator=draw),
        mean=MEAN,
        std=STD,
        meta={"method": "test", "b": "2", "a": "1"},
    )


def test_a_set_comes_back_from_its_file_and_from_its_folder(tmp_path):
    saved = _set()
    saved.save(tmp_path / FILE_NAME)
    for path in (tmp_path, tmp_path / FILE_NAME, str(tmp_path)):
        read = load_distilled(path)
        assert torch.equal(read.images, saved.images) and torch.equal(read.targets, saved.targets)
        assert (read.mean, read.std, read.meta) == (MEAN, STD, saved.meta)
        assert len(read) == 5


def test_gradients_slices_and_float64_are_saved_as_plain_float32(tmp_path):
    plain = _set()
    images = plain.images.double().flip(0).flip(0).transpose(2, 3).contiguous().transpose(2, 3)
    other = DistilledSet(
        images=images.requires_grad_(), targets=plain.targets, mean=MEAN, std=STD, meta=plain.meta
    )
    other.save(tmp_path / "other.safetensors")
    plain.save(tmp_path / "plain.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in ("other", "plain"))
    assert first.read_bytes() == second.read_bytes()


def test_the_same_set_gives_the_same_bytes_in_every_process(tmp_path):
    """Hash seeds differ between processes; the order of the metadata must not follow them."""
    program = """
import sys, torch
from krrst_fast.distill.distilled_set import DistilledSet
one = torch.ones
DistilledSet(images=one(1, 3, 2, 2), targets=one(1, 2), mean=(0.0,) * 3, std=(1.0,) * 3,
             meta={key: key for key in "hgfedcba"}).save(__import__("pathlib").Path(sys.argv[1]))
"""
    digests = set()
    for seed in "12":
        path = tmp_path / f"{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-c", program, str(path)], check=True, env={"PYTHONHASHSEED": seed}
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_pixels_undo_the_normalisation_and_clip():
    pixel = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8).repeat(1, 3, 1, 1)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    images = (pixel / 255 - mean) / std
    made = DistilledSet(images=images, targets=torch.zeros(1, 1), mean=MEAN, std=STD)
    assert torch.equal(made.pixels(), pixel.permute(0, 2, 3, 1))
    far = DistilledSet(images=images * 1e6, targets=torch.zeros(1, 1), mean=MEAN, std=STD)
    assert set(far.pixels().unique().tolist()) <= {0, 255}


def test_the_released_tensors_are_read(tmp_path):
    expected = _set()
    torch.save(expected.images.clone().requires_grad_(), tmp_path / "x_syn.pt")
    torch.save(expected.targets.clone().requires_grad_(), tmp_path / "y_syn.pt")
    read = load_distilled(tmp_path)
    assert torch.equal(read.images, expected.images) and not read.images.requires_grad
    assert torch.equal(read.targets, expected.targets)
    assert (read.mean, read.std) == ((0.0,) * 3, (1.0,) * 3)
    torch.save(expected.images.abs() * 255, tmp_path / "x_syn.pt")
    with pytest.raises(DataError, match=r"x_syn\.pt: .* divide pixels of 0 to 255 by 255"):
        load_distilled(tmp_path)


@pytest.mark.parametrize("name", ["x_syn.pt", "y_syn.pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_released_tensors_are_data_errors(tmp_path, name, zipped):
    made, path = _set(), tmp_path / name
    for file, tensor in (("x_syn.pt", made.images), ("y_syn.pt", made.targets)):
        torch.save(tensor, tmp_path / file, _use_new_zipfile_serialization=zipped)
    good, draw = path.read_bytes(), random.Random(0)
    # Nothing, a name that is no UTF-8, an empty stack twice, and no pickle.
    damaged = [
        b"",
        b"\x80\x02}q\x00X\x04\x00\x00\x00\xff\xff\xff\xffs.",
        b"0.",
        b"\x80\x02.",
        b"text",
    ]
    damaged += [good[: draw.randrange(len(good))] for _ in range(30)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: not a readable tensor file .+") as caught:
            load_distilled(tmp_path)
        assert "\n" not in str(caught.value)
    for _ in range(200):
        content = bytearray(good)
        for _ in range(3):
            content[draw.randrange(min(len(good), 600))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            assert len(load_distilled(tmp_path)) == 5
        except DataError as error:
            assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(5, 3, 4)}, r"must be \[M, C, H, W\] and \[M, P\], got \(5, 3, 4\)"),
        ({"targets": torch.zeros(4, 2)}, r"got \(5, 3, 4, 6\) and \(4, 2\)"),
        ({"std": (1.0,)}, "mean and std must have 3 items"),
        ({"mean": ("a", 0, 0)}, "mean must be finite and std positive, got .'a', 0, 0."),
        ({"std": (10**400, 1, 1)}, "mean must be finite and std positive"),
        ({"meta": {"images": 5}}, "meta must be texts by name, got .'images': 5."),
        ({"meta": [1]}, "meta must be texts by name"),
        ({"images": torch.full((5, 3, 4, 6), torch.nan)}, "images hold NaN or infinity"),
        ({"targets": torch.full((5, 7), torch.inf)}, "targets hold NaN or infinity"),
    ],
)
def test_a_set_that_cannot_be_used_is_refused(change, message):
    values = {"images": _set().images, "targets": _set().targets, "mean": MEAN, "std": STD}
    with pytest.raises(DataError, match=message):
        DistilledSet(**(values | change))


def test_what_is_not_a_set_is_named(tmp_path):
    with pytest.raises(DataError, match="no.safetensors: there is no such file"):
        load_distilled(tmp_path / "no.safetensors")
    with pytest.raises(DataError, match=f"holds neither {FILE_NAME} nor x_syn.pt and y_syn.pt"):
        load_distilled(tmp_path)

    whole = tmp_path / "whole.safetensors"
    _set().save(whole)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(whole.read_bytes()[:-10])
    with pytest.raises(DataError, match="bad.safetensors: not a readable safetensors file"):
        load_distilled(path)

    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="bad.safetensors: not a distilled set"):
        load_distilled(path)

    with safe_open(whole, framework="pt") as file:
        header = json.loads(file.metadata()["krrst_fast"])
    tensors = {"images": _set().images, "targets": _set().targets}
    save_file(tensors, path, {"krrst_fast": json.dumps(header | {"format_version": 9})})
    with pytest.raises(DataError, match="format version 9, this version of krrst_fast reads 1"):
        load_distilled(path)

    tensors["images"][0, 0, 0, 0] = torch.nan
    save_file(tensors, path, {"krrst_fast": json.dumps(header)})
    with pytest.raises(DataError, match="bad.safetensors: DistilledSet: images hold NaN"):
        load_distilled(path)

    for name, content in (("x_syn.pt", torch.zeros(2, 3, 4, 4)), ("y_syn.pt", {"y": 1})):
        torch.save(content, tmp_path / name)
    with pytest.raises(DataError, match="y_syn.pt: holds a dict, not a tensor"):
        load_distilled(tmp_path)
    (tmp_path / "y_syn.pt").write_bytes(b"not a pickle")
    with pytest.raises(DataError, match="y_syn.pt: not a readable tensor file"):
        load_distilled(tmp_path)


def test_a_set_is_a_dataset_of_pairs_with_a_repr_of_one_line(tmp_path):
    made = _set()
    assert isinstance(made, torch.utils.data.Dataset)
    image, target = made[-1]
    assert torch.equal(image, made.images[4]) and torch.equal(target, made.targets[4])
    assert len(list(made)) == 5
    with pytest.raises(IndexError):
        made[5]
    assert repr(made) == "DistilledSet(5 images of 3x4x6, 7 targets, method='test')"
    made.save(str(tmp_path / "set.safetensors"))
    assert torch.equal(DistilledSet.load(tmp_path / "set.safetensors").images, made.images)


def test_a_loader_draws_the_same_batches_for_the_same_seed():
    made = _set()
    batches = [list(made.loader(2, seed=seed)) for seed in (1, 1, 2)]
    assert [len(images) for images, _ in batches[0]] == [2, 2, 1]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(batches[0], batches[1]))
    orders = [torch.cat([targets for _, targets in each]) for each in batches]
    assert not torch.equal(orders[0], orders[2])
    assert torch.equal(orders[0].sort(0).values, made.targets.sort(0).values)
    plain = torch.cat([images for images, _ in made.loader(2, shuffle=False)])
    assert torch.equal(plain, made.images)
    assert len(list(made.loader(2, drop_last=True))) == 2


@pytest.mark.parametrize("first", ["", "import krrst_fast.distill.loop, krrst_fast.evaluate.run"])
def test_the_stages_are_names_of_the_package_whatever_was_imported(first):
    """`krrst_fast.distill` is a package, and is called too."""
    program = f"""
{first}
from krrst_fast import DistillConfig, distill, evaluate, export_set, prepare, train_target
import krrst_fast.distill
assert krrst_fast.distill is distill and distill.DistillConfig is DistillConfig
for stage in (distill, evaluate, prepare, train_target, export_set):
    assert callable(stage)
    try:
        stage()
    except TypeError as error:
        assert "missing 1 required positional" in str(error) or "missing 2" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
