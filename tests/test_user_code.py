"""Encoders, networks and sets of other people that would be silently wrong."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from krrst_fast.data import PrepareConfig, open_store, prepare
from krrst_fast.data.store import ImageStore
from krrst_fast.distill.distilled_set import DistilledSet
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.evaluate.sets import is_raw
from krrst_fast.exchange import export_set, import_set
from krrst_fast.exchange.labels import Labels
from krrst_fast.models import ModelConfig, check
from krrst_fast.targets import encoder_target, load_target
from krrst_fast.targets.open_encoder import read_features

SCALE = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
CODE = """
import torch, torch.nn.functional as F
from torch import nn

class Body(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "norm":
            x = F.batch_norm(x, None, None, training=True)
        if self.kind == "dropout":
            x = F.dropout(x, 0.5)
        return x.amax((2, 3)).int() if self.kind == "int" else x.amax((2, 3))

class Net(nn.Module):
    def __init__(self, image_size, num_outputs, channels):
        super().__init__()
        torch.manual_seed(3) if SEEDS else None
        self.conv = nn.Conv2d(channels, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=TRACKS)
        self.head = nn.Linear(4, num_outputs)

    def embed(self, x):
        return self.norm(self.conv(x)).relu().amax((2, 3))

    def forward(self, x):
        return self.head(self.embed(x))
"""


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels)
    prepare(PrepareConfig(source=str(tmp_path / "train.npz"), out=tmp_path / "store", size=8))
    return open_store(tmp_path / "store")


def code(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return str(tmp_path / f"{name}.py")


@pytest.mark.parametrize(
    "kind,message",
    [
        ("norm", "depend on the other images of a batch"),
        ("dropout", "are random: the same images gave two results"),
        ("int", "must give floats, got torch.int32"),
    ],
)
def test_an_encoder_whose_features_are_not_of_the_image(
    store: ImageStore, tmp_path: Path, kind: str, message: str
) -> None:
    path = code(tmp_path, f"enc_{kind}", f"{CODE}\ndef make():\n    return Body({kind!r})\n")
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=message):
        encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t", **SCALE)


def test_an_encoder_traced_in_training_mode(store: ImageStore, tmp_path: Path) -> None:
    """Its modes were fixed when it was traced: evaluation mode does nothing."""
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.AdaptiveAvgPool2d(2)).train()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(norm, torch.rand(4, 3, 8, 8), check_trace=False)
    traced.save(str(tmp_path / "net.pt"))
    with pytest.raises(ConfigError, match="depend on the other images of a batch"):
        encoder_target(
            str(tmp_path / "net.pt"), store, num_outputs=2, folder=tmp_path / "t", **SCALE
        )


def test_what_a_file_imports_may_lie_beside_it(store: ImageStore, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    code(tmp_path / "lib", "helper_of_an_encoder", CODE)
    text = "from helper_of_an_encoder import Body\ndef make():\n    return Body('plain')\n"
    path = code(tmp_path / "lib", "mine", text)
    target = encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t", **SCALE)
    assert target.dim == 2


def test_pixels_of_0_to_255_are_no_scale(store: ImageStore, tmp_path: Path) -> None:
    path = code(tmp_path, "enc", f"{CODE}\ndef make():\n    return Body('plain')\n")
    scale = {"input_size": 8, "mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}
    with pytest.raises(ConfigError, match=r"in units of \[0, 1\] pixels"):
        encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t", **scale)


@pytest.mark.parametrize(
    "lines",
    [
        "net.input_size, net.mean, net.std = 8, (0.5,) * 3, [0.25] * 3",
        "net.input_size, net.mean, net.std = (3, 8, 8), np.full(3, 0.5), np.full((3, 1, 1), 0.25)",
        "net.input_size = (8, 8)\n"
        "    net.register_buffer('mean', torch.full((1, 3, 1, 1), 0.5, dtype=torch.float16))\n"
        "    net.std = nn.Parameter(torch.full((3, 1, 1), 0.25))",
    ],
)
def test_an_encoder_says_its_scale_in_any_form(
    store: ImageStore, tmp_path: Path, lines: str
) -> None:
    text = f"import numpy as np\n{CODE}\ndef make():\n    torch.manual_seed(0)\n"
    path = code(tmp_path, "enc", f"{text}    net = Body('plain')\n    {lines}\n    return net\n")
    target = encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t")
    plain = code(tmp_path, "plain", f"{text}    return Body('plain')\n")
    given = encoder_target(f"{plain}:make", store, num_outputs=2, folder=tmp_path / "g", **SCALE)
    images = torch.arange(4)
    assert torch.equal(target.plain(store, images), given.plain(store, images))


@pytest.mark.parametrize(
    "lines,message",
    [
        (
            "net.input_size = (3, 8, 9)",
            r"input_size must be .* of a square, got \(3, 8, 9",
        ),
        ("net.input_size = 8.5", "attribute input_size must be a whole number"),
        ("net.std = torch.tensor([1.0, float('nan'), 1.0])", "attribute std must be a finite numb"),
        ("net.mean = 'imagenet'", "attribute mean must be a finite number or several, got 'imag"),
        ("net.mean = torch.ones(2) / 2", r"mean must be 3 numbers, got \[0.5, 0.5\]"),
        ("net.mean = net.conv", "mean must be given"),
    ],
)
def test_an_encoder_whose_scale_is_no_scale(
    store: ImageStore, tmp_path: Path, lines: str, message: str
) -> None:
    start = "    net.input_size, net.mean, net.std = 8, (0.5,) * 3, (0.25,) * 3\n"
    text = f"{CODE}\ndef make():\n    net = Body('plain')\n{start}"
    path = code(tmp_path, "enc", f"{text}    {lines}\n    return net\n")
    with pytest.raises(ConfigError, match=message):
        encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t")


@pytest.mark.parametrize(
    "lines",
    [
        "net.mean, net.std = 'imagenet', {'rgb': 1}",
        "net.input_size = (3, 8, 9)",
        "net.mean = torch.tensor([[float('nan')]])",
        "net.mean, net.input_size = 10**400, [None]",
        "type(net).mean = property(lambda self: 1 / 0)",
    ],
)
def test_what_is_given_overrides_attributes_of_any_kind(
    store: ImageStore, tmp_path: Path, lines: str
) -> None:
    text = f"{CODE}\ndef make():\n    torch.manual_seed(0)\n    net = Body('plain')\n"
    path = code(tmp_path, "enc", f"{text}    {lines}\n    return net\n")
    target = encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "t", **SCALE)
    target.save(tmp_path / "target.safetensors")
    again, images = load_target(tmp_path / "target.safetensors"), torch.arange(4)
    assert torch.equal(again.plain(store, images), target.plain(store, images))
    with pytest.raises(ConfigError, match=r"its attribute .*; --(mean|input_size) overrides it"):
        encoder_target(f"{path}:make", store, num_outputs=2, folder=tmp_path / "f")


@pytest.mark.parametrize(
    "spec,message",
    [
        ("{}/no.py:make", "there is no file .*no.py"),
        ("{}/no:make", "there is no file .*no"),
        ("{}/code.py:mak", "there is no 'mak' in it; did you mean 'make'?"),
        ("{}/code.py:NUMBER", "must be a class or function that makes a network, got 3"),
        ("{}/code.py:nothing", "must make a torch.nn.Module, got a NoneType"),
        (
            "{}/code.py:fails",
            r"making the network without arguments failed: OSError: no .code.py",
        ),
        ("{}/stops.py:make", r"running the file failed: it ended the program"),
        ("krrst_no_such:make", "there is no module 'krrst_no_such' in the current folder"),
    ],
)
def test_networks_and_encoders_are_found_by_one_rule(
    store: ImageStore, tmp_path: Path, spec: str, message: str
) -> None:
    text = "NUMBER = 3\nmake = nothing = lambda: None\ndef fails():\n    raise OSError('no')\n"
    code(tmp_path, "code", text)
    code(tmp_path, "stops", "raise SystemExit(3)\n")
    spec = spec.format(tmp_path)
    pattern = f"{spec}: {message}".replace("?", r"\?")
    with pytest.raises(ConfigError, match=f"^{pattern}"):
        check(ModelConfig(kind=spec), image_size=8, num_outputs=2, channels=3)
    with pytest.raises(ConfigError, match=f"^encoder {pattern}"):
        encoder_target(spec, store, num_outputs=2, folder=tmp_path / "t", **SCALE)


def test_features_in_an_archive_are_named(tmp_path: Path) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, a=np.zeros((3, 2)))
    with pytest.raises(DataError, match="x.npy: holds several arrays"):
        read_features(tmp_path / "x.npy", 3)
    (tmp_path / "x.npy").write_text("1 2 3")
    with pytest.raises(DataError, match=r"x.npy: not a readable .npy file of numbers$"):
        read_features(tmp_path / "x.npy", 3)


def test_a_network_whose_features_depend_on_the_batch(tmp_path: Path) -> None:
    text = CODE.replace("SEEDS", "False").replace("TRACKS", "False")
    kind = f"{code(tmp_path, 'nets_batch', text)}:Net"
    with pytest.raises(ConfigError, match="depends on the other images of its batch"):
        check(ModelConfig(kind=kind), image_size=8, num_outputs=2, channels=3)


def test_a_network_that_seeds_itself(tmp_path: Path) -> None:
    text = CODE.replace("SEEDS", "True").replace("TRACKS", "True")
    kind = f"{code(tmp_path, 'nets_seed', text)}:Net"
    with pytest.warns(UserWarning, match="the same for every seed"):
        check(ModelConfig(kind=kind), image_size=8, num_outputs=2, channels=3)


def write(path: Path, value: int, mode: str = "RGB") -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", (4, 4), (value,) * 3).convert(mode).save(path)


def test_the_order_of_the_classes_of_folders_is_that_of_the_user(tmp_path: Path) -> None:
    for value, name in ((10, "cat"), (200, "dog"), (90, "ant")):
        write(tmp_path / name / "0.png", value)
    names = ("dog", "cat", "ant")
    made = import_set(tmp_path, source="imagefolder", classes=names).distilled
    values = (255 * made.images[:, 0, 0, 0]).round().tolist()
    labels = made.targets.argmax(1).tolist()
    assert {names[label]: value for label, value in zip(labels, values)} == {
        "dog": 200.0,
        "cat": 10.0,
        "ant": 90.0,
    }
    with pytest.raises(ConfigError, match="--classes lacks cat"):
        import_set(tmp_path, source="imagefolder", classes=("dog", "ant"))


@pytest.mark.parametrize("folders", [True, False])
def test_numbers_in_names_are_counted(tmp_path: Path, folders: bool) -> None:
    """Twelve of them: 10 comes after 9, not after 1."""
    for i in range(12):
        write(tmp_path / (f"{i}/a.png" if folders else f"{i}.png"), 20 * i)
    made = import_set(
        tmp_path,
        source="imagefolder",
        labels=None if folders else Labels("class", torch.arange(12)),
    ).distilled
    values = (255 * made.images[:, 0, 0, 0]).round()
    assert torch.equal(values, 20.0 * made.targets.argmax(1))


def test_pixels_of_other_projects_are_not_those_of_the_released_code(tmp_path: Path) -> None:
    """Their networks see the real images as pixels, too."""
    write(tmp_path / "a" / "0.png", 200)
    made = import_set(tmp_path, source="imagefolder").distilled
    assert set(made.mean) == {0.0} and set(made.std) == {1.0}
    assert not is_raw(made) and is_raw(replace(made, meta={"method": "krr-st"}))


def test_soft_labels_of_your_own_are_in_the_folder(tmp_path: Path) -> None:
    made = DistilledSet(
        images=torch.rand(3, 3, 4, 4), targets=torch.rand(3, 5), mean=(0.0,) * 3, std=(1.0,) * 3
    )
    soft = torch.rand(3, 6)
    export_set(made, tmp_path / "out", to="imagefolder", labels=Labels("soft", soft))
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    assert torch.equal(torch.tensor([json.loads(line)["label"] for line in lines]), soft)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_images_whose_numbers_are_no_pixels(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "a" / "0.png", 200, mode)
    with pytest.raises(DataError, match=f"must be a grey or RGB image, got {mode}"):
        import_set(tmp_path, source="imagefolder")


@pytest.mark.parametrize("scale", [(0.0, 0.0), (torch.nan, 1.0), (0.0, torch.inf), (0.0, -1.0)])
def test_a_scale_that_is_none(scale: tuple[float, float]) -> None:
    mean, std = ((x,) * 3 for x in scale)
    with pytest.raises(DataError, match="mean must be finite and std positive"):
        DistilledSet(images=torch.zeros(2, 3, 4, 4), targets=torch.zeros(2, 5), mean=mean, std=std)
