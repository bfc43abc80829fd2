"""Weights from elsewhere: state dicts with torchvision's names, checked before they are used."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError, NonFiniteError
from krrst_fast.models import Network
from krrst_fast.runs.files import load_state
from krrst_fast.runs.seal import check_safetensors

_PREFIXES = ("module.", "backbone.")
_NESTED = ("state_dict", "model", "model_state_dict")
# Heads of the training that made the weights; `bn` is the last norm of Barlow Twins' own code.
_HEADS = ("fc", "head", "projector", "projection_head", "predictor", "classifier", "bn")


def load_weights(model: Network, path: Path) -> None:
    """Copy the weights in a .pth, .pt or .safetensors file into `model`.

    The prefixes `module.` and `backbone.` are dropped, and so are heads that `model` has not.

    Raises:
        CheckpointError: The file is missing, damaged, would run code, or holds other keys or
            shapes than `model` has; the first few are named.
        NonFiniteError: A weight is NaN or infinite.
    """
    found = _ours(_read(path), model)
    needed = model.state_dict()
    problems = _mismatches(found, needed)
    if problems:
        name = type(model).__name__
        raise CheckpointError(f"{path}: not the weights of this {name}: {'; '.join(problems)}")
    check_finite(found, str(path))
    model.load_state_dict(found, strict=False)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata of a safetensors file; raise CheckpointError if that fails."""
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path, failure=CheckpointError)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def check_finite(state: dict[str, Tensor], where: str) -> None:
    """Raise NonFiniteError that names `where` and the first tensor with a NaN or infinity."""
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"{where}: {key} holds NaN or infinity")


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    state = load_state(path)
    for key in _NESTED:
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name: not a state dict")
    return tensors


def _ours(state: dict[str, Tensor], model: Network) -> dict[str, Tensor]:
    """Return `state` without prefixes, and without heads that `model` does not have."""
    known = model.state_dict().keys()
    found = {}
    for key, value in state.items():
        while key.startswith(_PREFIXES):
            key = key.partition(".")[2]
        if key in known or key.partition(".")[0] not in _HEADS:
            found[key] = value
    return found


def _mismatches(found: dict[str, Tensor], needed: dict[str, Tensor]) -> list[str]:
    # Files older than torch 0.4.1 have no batch counters, and nothing here reads them.
    missing = [k for k in needed if k not in found and not k.endswith("num_batches_tracked")]
    unexpected = [key for key in found if key not in needed]
    reshaped = [
        f"{key} is {list(found[key].shape)}, needed {list(value.shape)}"
        for key, value in needed.items()
        if key in found and found[key].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped))
    return [f"{kind} {_some(names)}" for kind, names in kinds if names]


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
