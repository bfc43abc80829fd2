"""`krrst target --encoder`: any encoder, or a matrix of features, as a target."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from krrst_fast.data.augment import plain_views
from krrst_fast.data.store import ImageStore
from krrst_fast.errors import ConfigError, KrrstError
from krrst_fast.runs import environment
from krrst_fast.runs.config import to_dict
from krrst_fast.runs.files import new_folder, write_json
from krrst_fast.runs.rows import computed_rows
from krrst_fast.targets.config import TargetConfig
from krrst_fast.targets.diagnose import collapse_metrics
from krrst_fast.targets.encoder import Encoder, EncoderInfo, FeatureTable, pooled
from krrst_fast.targets.frozen import TARGET_FILE, FrozenTarget, load_target
from krrst_fast.targets.open_encoder import (
    Opened,
    absolute,
    digest_of_file,
    file_of,
    is_features,
    of_module,
    open_encoder,
    read_features,
)
from krrst_fast.targets.pca import check_components, pca_head
from krrst_fast.targets.standardize import standardize_head

FITTED_BY = 10_000
"""Images, all over the store, that the principal components are fitted by."""
_CHECKED_IMAGES = 1024
_CHUNK = 256
_SAME = 1e-2
"""How far features of one image may be apart, of the largest: batches round differently."""
_FEATURES = "encoder_features"


def make_target(config: TargetConfig, store: ImageStore, *, progress: bool) -> FrozenTarget:
    """Write the folder of a target whose network is `config.encoder`.

    Raises:
        ConfigError: The encoder cannot be made or called, or its settings are missing.
        DataError: A matrix of features does not fit the store.
        CheckpointError: A file cannot be read.
    """
    assert config.encoder is not None
    began, spec = time.perf_counter(), absolute(config.encoder)
    # All that can be refused is, before the folder is made.
    ready = _ready(
        spec,
        store,
        num_outputs=config.num_outputs,
        input_size=config.input_size or None,
        mean=config.mean,
        std=config.std,
        device=environment.pick_device(config.device),
    )
    if ":" in spec and open_encoder(spec).digest != ready.digest:
        raise ConfigError(
            f"encoder {config.encoder}: gives other weights at each call; seed them or load them"
        )
    new_folder(config.out, overwrite=True)
    write_json(config.out / "config.json", to_dict(config))
    write_json(config.out / "environment.json", environment.describe())
    folder = config.out / _FEATURES
    target = _fitted(
        ready, store, config.num_outputs, config.standardize, folder=folder, progress=progress
    )
    count = min(store.count("train"), _CHECKED_IMAGES)
    outputs = target.plain(store, _spread_over(store, count))
    totals = {
        "steps": 0,
        "seconds": time.perf_counter() - began,
        "features": _info(target).dim,
        "explained_variance": _info(target).explained,
        "dim": target.dim,
    }
    write_json(config.out / "summary.json", totals | collapse_metrics(outputs))
    target.save(config.out / TARGET_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    return load_target(config.out)


def encoder_target(
    encoder: str | nn.Module,
    store: ImageStore,
    *,
    num_outputs: int,
    input_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    standardize: bool = False,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    progress: bool = False,
) -> FrozenTarget:
    """Make a target of any encoder, its features reduced by PCA on the plain images of a store.

    Args:
        encoder: SPEC (see docs/encoders.md), or a module, whose target cannot be saved.
        store: The images that are to be distilled.
        num_outputs: P, the principal components; 0 keeps all features.
        input_size: Size of the images the encoder sees; None takes what it says of itself.
        mean, std: What it wants images normalised by, a channel each; None likewise.
        standardize: Scale each output to unit variance, instead of all by one factor.
        device: Where the encoder runs.
        folder: Keeps the features while they are computed, so that a killed call is taken up.
        progress: Show a bar where there is a terminal.

    Raises:
        ConfigError: The encoder cannot be made or called, or its settings are missing.
        DataError: A matrix of features does not fit the store, or features are all the same.
        CheckpointError: A file cannot be read.
    """
    ready = _ready(
        encoder,
        store,
        num_outputs=num_outputs,
        input_size=input_size,
        mean=mean,
        std=std,
        device=torch.device(device),
    )
    with tempfile.TemporaryDirectory() as scratch:
        return _fitted(
            ready,
            store,
            num_outputs,
            standardize,
            folder=folder or Path(scratch),
            progress=progress,
        )


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """An encoder that has been called on some images, or features that have been read."""

    spec: str
    """As the target file has it; empty for a module of Python."""
    name: str
    digest: str
    source: Encoder | Tensor
    """The encoder behind the store, without its head; or features [N, V, D]."""
    settings: dict[str, Any]
    """The encoder's own size and scale of images."""
    file: Path | None = None


def _ready(
    encoder: str | nn.Module,
    store: ImageStore,
    *,
    num_outputs: int,
    input_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: torch.device,
) -> _Ready:
    count = store.count("train")
    if isinstance(encoder, str) and is_features(encoder):
        of_images = (("input_size", input_size or None), ("mean", mean), ("std", std))
        given = [name for name, value in of_images if value is not None]
        if given:
            raise ConfigError(
                f"encoder {encoder}: features have no {' and '.join(given)}; leave it out"
            )
        path = Path(encoder)
        features = read_features(path, count)
        check_components(features.shape[0] * features.shape[1], features.shape[2], num_outputs)
        return _Ready(
            spec=path.name,
            name=path.name,
            digest=digest_of_file(path),
            source=features,
            settings={},
        )
    if isinstance(encoder, str):
        name, opened, file = encoder, open_encoder(encoder), file_of(encoder)
    else:
        name, file = type(encoder).__name__, None
        opened = of_module(encoder, name)
    settings = _settings(name, opened, store, input_size, mean, std)
    model = _behind_store(name, opened, store, settings, device)
    check_components(min(count, FITTED_BY), model.feature_dim, num_outputs)
    spec = name if isinstance(encoder, str) else ""
    if file:
        # The copy beside the target file.
        spec = f"encoder-{opened.digest.split()[-1][:8]}{file.suffix}"
    return _Ready(
        spec=spec, name=name, digest=opened.digest, source=model, settings=settings, file=file
    )


def _fitted(
    ready: _Ready,
    store: ImageStore,
    num_outputs: int,
    standardize: bool,
    *,
    folder: Path,
    progress: bool,
) -> FrozenTarget:
    """Fit the head on plain images, whose features are kept in `folder` while they are computed."""
    source = ready.source
    if isinstance(source, Encoder):
        features = _features(ready, source, store, folder, progress)
    else:
        features = source.flatten(0, 1)
    head, explained = pca_head(features, num_outputs)
    if standardize:
        standardize_head(head, _outputs(head, features))
    model: Encoder | FeatureTable
    if isinstance(source, Encoder):
        source.fc = head.to(source.device)
        model = source
    else:
        outputs = _outputs(head, features).view(*source.shape[:2], head.out_features)
        model = FeatureTable(outputs, channels=store.channels)
    return FrozenTarget(
        model,
        config=EncoderInfo(
            spec=ready.spec,
            digest=ready.digest,
            dim=features.shape[1],
            explained=explained,
            **ready.settings,
        ),
        num_outputs=head.out_features,
        mean=tuple(store.mean),
        std=tuple(store.std),
        image_size=store.size,
        meta={"encoder": ready.name, "store": store.identity()},
        file=ready.file,
    )


def _features(
    ready: _Ready, model: Encoder, store: ImageStore, folder: Path, progress: bool
) -> Tensor:
    """Compute the encoder's features [N, D] on plain images all over the store."""
    index = _spread_over(store, min(store.count("train"), FITTED_BY))
    images, device = store.images("train"), model.device

    def embed(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return model.embed(plain_views(images, index[rows], store.mean, store.std).to(device))

    return computed_rows(
        folder,
        (len(index), model.feature_dim),
        {
            "store": store.identity(),
            # Two of one digest may differ in what they compute: the name, and the code of a file.
            "encoder": f"{ready.digest} {ready.name} {_code(ready.name)}",
            "settings": str(ready.settings),
            "device": device.type,
        },
        embed,
        block=_CHUNK,
        what="features",
        progress=progress,
    )


def _code(name: str) -> str:
    """Return a fingerprint of the file that `my.py:callable` names, else nothing."""
    path = Path(name.rpartition(":")[0])
    return digest_of_file(path) if path.suffix == ".py" and path.is_file() else ""


def _outputs(head: nn.Linear, features: Tensor) -> Tensor:
    return torch.cat([head(part) for part in features.split(4096)])


def _info(target: FrozenTarget) -> EncoderInfo:
    assert isinstance(target.config, EncoderInfo)
    return target.config


def _settings(
    name: str,
    opened: Opened,
    store: ImageStore,
    input_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the size and scale of the images that the encoder sees: as given, or as it says."""
    chosen = {
        "input_size": input_size or opened.input_size,
        "mean": opened.mean if mean is None else mean,
        "std": opened.std if std is None else std,
    }
    missing = [key for key, value in chosen.items() if value is None]
    for key in missing:
        if key in opened.faults:
            raise ConfigError(f"{opened.faults[key]}; --{key} overrides it")
    if missing:
        raise ConfigError(
            f"encoder {name}: {' and '.join(missing)} must be given (--{' --'.join(missing)}), or "
            "be attributes of the module: what the encoder was trained with is not guessed"
        )
    for key in ("mean", "std"):
        values = tuple(map(float, chosen[key]))  # type: ignore[arg-type]
        if len(values) != store.channels or not np.isfinite(values).all():
            raise ConfigError(
                f"encoder {name}: {key} must be {store.channels} numbers, got {list(values)}"
            )
        chosen[key] = values
    if max(*chosen["mean"], *chosen["std"]) > 2:  # type: ignore[misc]
        raise ConfigError(
            f"encoder {name}: mean and std must be in units of [0, 1] pixels: divide those of 0 to "
            f"255 by 255; got {chosen['mean']} and {chosen['std']}"
        )
    if min(chosen["std"]) <= 0 or chosen["input_size"] < 1:  # type: ignore[arg-type, operator]
        raise ConfigError(
            f"encoder {name}: std and input_size must be positive, got {chosen['std']} and "
            f"{chosen['input_size']}"
        )
    return chosen


def _behind_store(
    name: str,
    opened: Opened,
    store: ImageStore,
    settings: dict[str, Any],
    device: torch.device,
) -> Encoder:
    """Return the encoder behind the images of the store, once it has been called on some."""
    size, channels = settings["input_size"], store.channels
    module = opened.module.to(device)
    try:
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            x = torch.randn(3, channels, size, size, generator=noise).to(device)
            found = [pooled(module(part)) for part in (x, x, x[:2], x[:1])]
            widths = [features.shape for features in found[1:]]
    except KrrstError:
        raise
    except Exception as error:  # the encoder is anybody's code
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"encoder {name}: fails on batches of 3, 2 or 1 images [{channels}, {size}, {size}] "
            f"(files are to be exported with a free batch size): {reason}"
        ) from error
    if [shape[0] for shape in widths] != [3, 2, 1] or len({shape[1] for shape in widths}) > 1:
        raise ConfigError(
            f"encoder {name}: batches of 3, 2 and 1 images give features of shapes "
            f"{[list(shape) for shape in widths]}, and a row an image is needed"
        )
    allowed = _SAME * float(found[0].abs().max()) + 1e-6
    for features, what in (
        (found[1], "are random: the same images gave two results"),
        (found[2], "depend on the other images of a batch (BatchNorm in training mode?)"),
        (found[3], "depend on the other images of a batch (BatchNorm in training mode?)"),
    ):
        if not torch.allclose(features, found[0][: len(features)], rtol=0, atol=allowed):
            raise ConfigError(f"encoder {name}: its features {what}; put it in evaluation mode")
    return Encoder(
        module,
        dim=widths[0][1],
        image_size=store.size,
        channels=channels,
        mean=store.mean,
        std=store.std,
        input_size=size,
        input_mean=settings["mean"],
        input_std=settings["std"],
        device=device,
    )


def _spread_over(store: ImageStore, count: int) -> Tensor:
    """Return `count` numbers of images, evenly spread over the train split."""
    return torch.arange(count) * store.count("train") // count
