"""What a run ran on."""

import json

import pytest
import torch

from krrst_fast.errors import ConfigError
from krrst_fast.runs import environment


def test_describe_is_json_and_true() -> None:
    described = environment.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["extension"] is None or "_C" in described["extension"]


def test_pick_device() -> None:
    assert environment.pick_device("cpu") == torch.device("cpu")
    assert environment.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "meta", "cuda:x", ""):
        with pytest.raises(ConfigError, match=r"must be auto, cpu, cuda\[:index\] or mps, got"):
            environment.pick_device(wrong)
    with pytest.raises(ConfigError, match="cuda:99.*torch sees"):
        environment.pick_device("cuda:99")


def test_mps_is_taken_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_there, name in ((False, "mps"), (False, "mps:0"), (True, "mps:1")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=is_there: there)
        with pytest.raises(ConfigError, match=f"device: '{name}' was asked for and torch sees no"):
            environment.pick_device(name)
    assert environment.pick_device("mps") == torch.device("mps")
    assert environment.solving_device(torch.device("mps")) == torch.device("cpu")
    for other in ("cpu", "cuda:1"):
        assert environment.solving_device(torch.device(other)) == torch.device(other)


def test_peak_memory_grows_with_what_is_used() -> None:
    before = environment.peak_memory_mb()
    torch.ones(50_000_000)
    assert environment.peak_memory_mb() >= max(before, 200)
