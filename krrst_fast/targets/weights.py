"""Weights from elsewhere: state dicts with torchvision's names, checked before they are used."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError, NonFiniteError
from krrst_fast.models import Network
from krrst_fast.runs.seal import check_safetensors
from krrst_fast.runs.tensors import load_state

_PREFIXES = (
    *("module.", "_orig_mod.", "model."),
    *("backbone.", "encoder.", "encoder_q.", "teacher."),
)
"""Of torch's wrappers, and of the network in a training that is worth keeping."""
_NESTED = ("state_dict", "model", "model_state_dict", "teacher")
# The other network and the queue of MoCo, DINO and the like.
_TRAINING = ("encoder_k", "student", "queue", "queue_ptr", "queue_label")
# Heads of the training that made the weights; `bn` is the last norm of Barlow Twins' own code.
_HEADS = ("fc", "head", "projector", "projection_head", "predictor", "classifier", "bn")


def load_weights(model: Network, path: Path, *, prefix: str = "") -> None:
    """Copy the weights in a .pth, .pt or .safetensors file into `model`.

    The usual prefixes (`module.`, `backbone.`, `encoder_q.`, ...) are dropped, and so are heads
    that `model` has not, and the second network of a training (`encoder_k.`, `student.`).

    Args:
        model: Gets the weights.
        path: The file.
        prefix: Take only what is under this name, such as `student.backbone.`.

    Raises:
        CheckpointError: The file is missing, damaged, would run code, or holds other keys or
            shapes than `model` has, or none under `prefix`; the first few are named.
        NonFiniteError: A weight is NaN or infinite.
    """
    found = _ours(_read(path, prefix), model, path)
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


def _read(path: Path, prefix: str) -> dict[str, Any]:
    """Return the tensors of a file by name; of those under `prefix` the names without it."""
    state: dict[str, Any]
    state = read_safetensors(path)[0] if path.suffix == ".safetensors" else load_state(path)
    first, _, rest = prefix.partition(".")
    if isinstance(nested := state.get(first), dict):
        state, prefix = nested, rest
    for key in _NESTED:
        if isinstance(nested := state.get(key), dict):
            state = nested
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors by name: not a state dict")
    if not prefix:
        return tensors
    dotted = prefix if prefix.endswith(".") else f"{prefix}."
    chosen = {key[len(dotted) :]: x for key, x in tensors.items() if key.startswith(dotted)}
    if not chosen:
        raise CheckpointError(
            f"{path}: no weights under {dotted!r}; the names are {_some(list(tensors))}"
        )
    return chosen


def _ours(state: dict[str, Tensor], model: Network, path: Path) -> dict[str, Tensor]:
    """Return `state` without prefixes, and without what `model` does not have of a training."""
    known = model.state_dict().keys()
    found: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for name, value in state.items():
        key = name
        while key.startswith(_PREFIXES):
            key = key.partition(".")[2]
        if key in known or key.partition(".")[0] not in (*_HEADS, *_TRAINING):
            if key in found:
                raise CheckpointError(
                    f"{path}: holds two networks, {names[key]} and {name}; choose one by "
                    "weights_prefix"
                )
            found[key], names[key] = value, name
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
