"""Networks of the user's own code: found, built, checked, and refused in one line."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from krrst_fast.errors import ConfigError
from krrst_fast.models import ModelConfig, build, check, place

NETS = (Path(__file__).parent / "own_nets.py").read_text(encoding="utf-8")


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with nets.py in it; each test has a folder, and so a load, of its own."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("nets", None)


def made(kind: str, *, features: str | None = None, seed: int = 0, outputs: int = 5, size: int = 8):
    config = ModelConfig(kind=kind, features=features)
    return build(config, image_size=size, num_outputs=outputs, seed=seed)


def checked(kind: str, features: str | None = None) -> None:
    check(ModelConfig(kind=kind, features=features), image_size=8, num_outputs=5, channels=3)


def images(count: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["nets.py:Net", "./nets.py:Net", "nets:Net", "nets:Outer.Inner"])
def test_a_class_of_a_file_or_module_keeps_its_own_forward(nets, kind):
    path = list(sys.path)
    network, x = made(kind).eval(), images()
    assert sys.path == path
    assert network.feature_dim == 8 and network.embed(x).shape == (4, 8)
    torch.testing.assert_close(network(x), 2 * network.net.head(network.net.embed(x)))
    assert isinstance(network.fc, nn.Identity)
    with pytest.raises(ValueError, match=r"OwnNetwork: x must be \[B, 3, 8, 8\]"):
        network.embed(images(size=4))
    checked(kind)


@pytest.mark.parametrize(
    "kind,features,dim",
    [
        ("nets.py:Embeds", None, 8 * 16),
        ("nets.py:Plain", "fc", 32),
        ("nets.py:Plain", "body", 8 * 16),
        ("nets.py:Plain", "body.2", 32),
        ("nets.py:sequential", "3", 144),
        ("nets.py:Net", "head", 8),
        ("torch.nn:Identity", None, 0),
    ],
)
def test_else_a_linear_layer_is_put_on_the_features(nets, kind, features, dim):
    if not dim:
        with pytest.raises(ConfigError, match="torch.nn:Identity: the network has no parameters"):
            made(kind)
        return
    network, x = made(kind, features=features).eval(), images()
    assert network.feature_dim == dim and network.fc.weight.shape == (5, dim)
    f = network.embed(x)
    torch.testing.assert_close(network(x), f @ network.fc.weight.T + network.fc.bias)
    torch.testing.assert_close(network.embed(x[:2]), f[:2])
    checked(kind, features)
    bare = made(kind, features=features, outputs=0).eval()
    if kind != "nets.py:Net":  # which draws its head first
        torch.testing.assert_close(bare(x), f)


def test_the_features_are_the_input_of_the_layer(nets):
    network, seen = made("nets.py:Plain", features="fc", seed=3).eval(), []
    from krrst_fast.models.source import find

    plain = find("nets.py:Plain").call().eval()
    own = {n.removeprefix("net."): v for n, v in network.state_dict().items() if "net." in n}
    plain.load_state_dict(own, strict=False)
    plain.fc.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    plain(images())
    torch.testing.assert_close(network.embed(images()), seen[0])
    compiled = torch.compile(network.embed, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), seen[0])


def test_a_seed_gives_the_same_bits_and_leaves_the_generator_alone(nets):
    before = torch.get_rng_state()
    first, again, other = (made("nets.py:Net", seed=s) for s in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    states = first.state_dict(), again.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert not torch.equal(first.net.conv.weight, other.net.conv.weight)
    assert first.training and int(first.net.norm.num_batches_tracked) == 0
    checked("nets.py:Net")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_body_is_what_the_features_depend_on(nets):
    network = made("nets.py:Net").eval()
    flags = [p.requires_grad for p in network.parameters()]
    body = network.body_state()
    assert not network.training and flags == [p.requires_grad for p in network.parameters()]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"net.conv.weight", "net.conv.bias", *(f"net.norm.{part}" for part in parts)}
    assert set(body) == expected
    assert set(made("nets.py:Plain", features="fc").body_state()) == {
        "net.conv.weight",
        "net.conv.bias",
    }
    frozen = made("nets.py:Frozen")
    assert not frozen.net.conv.weight.requires_grad
    assert "net.conv.weight" in frozen.body_state()
    assert not frozen.net.conv.weight.requires_grad


def test_it_lies_in_memory_as_built_in_ones_do(nets):
    network = place(made("nets.py:Net"), "cpu")
    assert network.net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert place(made("nets.py:Cube"), "cpu", torch.float64).net.scale.dtype == torch.float64
    config = ModelConfig(kind="nets.py:Cube")
    check(config, image_size=8, num_outputs=5, channels=3, dtype=torch.float64)


@pytest.mark.parametrize(
    "kind,features,message",
    [
        ("no_such:Net", None, "no_such:Net: there is no module 'no_such' in the current folder"),
        (
            "nets.no:Net",
            None,
            "importing the module failed: ModuleNotFoundError|no module 'nets.no'",
        ),
        ("no/such.py:Net", None, "no/such.py:Net: there is no file .*such.py"),
        ("nets.py:Nett", None, "nets.py:Nett: there is no 'Nett' in it; did you mean 'Net'?"),
        ("nets:Outer.In", None, "nets:Outer.In: there is no 'In' in it"),
        ("nets.py:NUMBER", None, "must be a class or function that makes a network, got 3"),
        ("nets.py:ONE", None, r"makes a new network at each call, got a network \(Net\)"),
        ("nets.py:text", None, "nets.py:text: must make a torch.nn.Module, got a str"),
        ("nets.py:Needs", None, "making the network without arguments failed: TypeError.*'width'"),
        ("nets.py:Breaks", None, r"RuntimeError: no such weights \(nets.py, line \d+\)"),
        ("nets.py:Empty", None, "nets.py:Empty: the network has no parameters"),
        ("nets.py:Plain", None, r"needs a method embed\(x\) .* got none; .*--model.features fc"),
        ("nets.py:Layer", None, r"needs a method embed\(x\) .* got a layer Conv2d of that name"),
        ("nets.py:Plain", "fd", r"no layer 'fd' .*its last layer is fc\); did you mean 'fc'"),
        ("nets.py:Unused", "other", "its forward does not call layer 'other'"),
        (
            "nets.py:Tokens",
            None,
            r"embed must be \[B, D\] or \[B, C, H, W\], got \(2, 8, 16\) for 2",
        ),
        (
            "nets.py:Scalar",
            None,
            r"embed must be \[B, D\] or \[B, C, H, W\], got \(\) for 2 images",
        ),
        ("nets.py:Pair", None, "embed must be a tensor of features, got a tuple"),
        ("nets.py:Half", None, "embed must be torch.float32 like x, got torch.float16"),
        ("nets.py:Random", None, "embed is random in evaluation mode"),
        ("nets.py:Two", None, r"computing features failed: TypeError.*'mask' ?"),
        (
            "nets.py:Wide",
            None,
            r"forward must give \[B, num_outputs\], here \(2, 5\), got \(2, 8\)",
        ),
        ("nets.py:NoForward", None, "forward failed: NotImplementedError"),
        ("nets.py:Detached", None, "the features have no gradient by the images"),
        ("nets.py:AllFrozen", None, None),
        ("nets.py:same", None, "must make a new network at each call, got the same again"),
        ("nets.py:drifting", None, "conv.weight differs between two networks of one seed"),
    ],
)
def test_what_is_no_such_network_is_named(nets, kind, features, message):
    if message is None:  # its new head is trained
        checked(kind, features)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        checked(kind, features)
    assert str(caught.value).startswith(kind) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("import no_such_library", "running the file failed: ModuleNotFoundError: No module named"),
        ("def f(:", r"running the file failed: SyntaxError: .*line 1"),
        ("import sys\nsys.exit(3)", "ended the program; what only a script does belongs under"),
    ],
)
def test_a_file_that_cannot_be_run_is_named(nets, text, message):
    (nets / "bad.py").write_text(text)
    for kind in ("bad.py:Net", "bad:Net"):
        with pytest.raises(
            ConfigError, match=message.replace("running the file", "(running|import).*")
        ):
            made(kind)
    assert not [name for name in sys.modules if name == "bad"]


@pytest.mark.parametrize(
    "kind", ["", "Net", "nets.py", "nets.py:", ":Net", "nets:Net()", "vgg", "a:1"]
)
def test_what_is_no_name_of_a_network_is_refused(kind):
    with pytest.raises(
        ConfigError, match="ModelConfig: kind must be one of convnet, .*module:Class"
    ):
        ModelConfig(kind=kind)


def test_features_are_a_setting_of_own_networks():
    with pytest.raises(ConfigError, match="features must be a layer of a network of your own"):
        ModelConfig(kind="resnet10", features="fc")
    with pytest.raises(ConfigError, match="features must be a layer"):
        ModelConfig(kind="nets:Net", features="")
    assert ModelConfig().identity() == {} and not ModelConfig(kind="vgg11").is_own


def test_files_import_their_neighbours_and_are_told_apart(nets):
    (nets / "zoo").mkdir()
    (nets / "zoo" / "parts.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    (nets / "zoo" / "net.py").write_text(
        "from torch import nn\n"
        "def late():\n"
        "    import krrst_test_neighbour\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    )
    (nets / "zoo" / "krrst_test_neighbour.py").write_text("")
    assert made("zoo/net.py:late", features="1").feature_dim == 192
    sys.modules.pop("krrst_test_neighbour")


def test_an_edited_file_is_noticed(nets):
    config = ModelConfig(kind="nets.py:Net")
    before = config.identity()
    assert list(before) == ["network"] and before["network"].startswith("sha256 ")
    (nets / "nets.py").write_text(NETS + "\n")
    with pytest.raises(ConfigError, match="nets.py has changed since this process loaded it"):
        config.identity()
    made("nets.py:Net")  # a run that is under way goes on with what it began with
    (nets / "nets.py").write_text(NETS)
    assert config.identity() == before
    (nets / "renamed.py").write_text(NETS)
    assert ModelConfig(kind="renamed.py:Net").identity() == before
