"""Description of this machine, and of the contents of a file or folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from krrst_fast import operators
from krrst_fast.distill.shipped import is_shipped, shipped_names
from krrst_fast.errors import DataError
from krrst_fast.planner.limits import free_memory
from krrst_fast.runs import environment
from krrst_fast.runs.files import read_json, read_jsonl, recover_folder
from krrst_fast.runs.log import loss_at_end
from krrst_fast.runs.tensors import load_state
from krrst_fast.runs.version import version


def about_this_machine() -> dict[str, str]:
    """Return versions, devices and the state of the extension as lines to print."""
    about = environment.describe()
    gpu = about["gpu"] or "none that torch sees"
    return {
        "krrst_fast": about["krrst_fast"],
        "extension": _extension(),
        "python": about["python"],
        "torch": about["torch"],
        "cpu": f"{about['cpu']}, {about['threads']} threads",
        "memory": _memory(),
        "gpu": f"{gpu} (CUDA {torch.version.cuda})" if about["gpu"] else gpu,
        "platform": about["platform"],
        "sets": f"{', '.join(shipped_names())}: krrst info NAME",
    }


def _memory() -> str:
    left = free_memory("cpu")
    return "no limit is known" if left is None else f"{left / 1e9:.1f} GB left for a process"


def _extension() -> str:
    if not operators.HAS_EXTENSION:
        return f"{operators.EXTENSION}; plain PyTorch computes"
    try:
        from krrst_fast._native import build_info
    except ImportError as error:
        return f"loaded, without the module for image files: {error}"
    built = build_info()
    return f"loaded, built by compiler {built['compiler']} for version {built['version']}"


def about_path(path: Path) -> dict[str, str]:
    """Describe a store, target, run folder or distilled set.

    All of a store is read once, to compare its checksums.

    Raises:
        DataError: It is none of them, or it is damaged.
    """
    recover_folder(path)
    if is_shipped(path):
        return _distilled(path) | {"shipped": f"with krrst_fast {version()}"}
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    for belongs, describe in _KINDS:
        if belongs(path):
            return describe(path)
    raise DataError(f"{path}: neither a store, a target, a run nor a distilled set")


def _store(path: Path) -> dict[str, str]:
    from krrst_fast.data import open_store

    store = open_store(path, verify=True)
    rows = {
        "kind": "image store",
        "images": ", ".join(f"{store.count(split)} {split}" for split in store.splits),
        "size": f"{store.channels}x{store.size}x{store.size}",
        "classes": _some(store.classes) if store.has_labels else "not labelled",
        "mean": _numbers(store.mean),
        "std": _numbers(store.std),
        "checksums": "verified",
    }
    if store.left_out:
        rows["left out"] = "; ".join(f"{n} x {reason}" for reason, n in store.left_out.items())
    if store.skipped:
        rows["skipped"] = _some([str(row["name"]) for row in store.skipped])
    return rows


def _target(path: Path) -> dict[str, str]:
    from krrst_fast.targets import load_target
    from krrst_fast.targets.frozen import TARGET_FILE, target_info
    from krrst_fast.targets.weights import read_safetensors

    file = path / TARGET_FILE if path.is_dir() else path
    info = target_info(file, read_safetensors(file)[1])
    if "encoder" in info:
        # Opening the encoder would run its code.
        encoder = info["encoder"]
        return {
            "kind": "target encoder" if encoder["input_size"] else "target table of features",
            "encoder": encoder["spec"],
            "digest": encoder["digest"],
            "outputs": f"{info['num_outputs']} of {encoder['dim']} features, "
            f"{encoder['explained']:.0%} of their variance",
            "image size": f"{info['image_size']}, resized to {encoder['input_size']}"
            if encoder["input_size"]
            else str(info["image_size"]),
        }
    target = load_target(path)
    parameters = sum(p.numel() for p in target.model.parameters())
    return {
        "kind": "target network",
        "outputs": str(target.dim),
        "image size": str(target.image_size),
        "parameters": f"{parameters:,}",
        "mean": _numbers(target.mean),
        "std": _numbers(target.std),
    }


def _run(path: Path) -> dict[str, str]:
    from krrst_fast.distill.heldout import in_words, last_figures
    from krrst_fast.report.run_folder import read_run

    run = read_run(path)
    rows = {"kind": "distillation run", "saved": _saved(path, run.config)}
    rows["logged"] = f"up to step {run.steps_done}"
    rows |= {key: str(run.config[key]) for key in ("store", "target") if key in run.config}
    if (loss := loss_at_end(run.rows)) is not None:
        rows["loss at the end"] = f"{loss:.4g}"
    if said := in_words(run.summary or last_figures(run.rows)):
        rows["held-out R2"] = said.removeprefix("held-out R2: ")
    if run.distilled is not None:
        rows |= {k: v for k, v in _distilled(path).items() if k != "kind"}
    rows |= _environments(path)
    rows["evaluations"] = _some([file.stem for file in sorted(path.glob("evaluation/*.json"))])
    return rows


def _baseline(path: Path) -> dict[str, str]:
    config, rows = read_json(path / "config.json"), read_jsonl(path / "metrics.jsonl")
    found = {"kind": "learnt baseline", "method": str(config["method"])}
    found["saved"] = _saved(path, config)
    found["logged"] = f"up to step {rows[-1].get('step', 0) if rows else 0}"
    found |= {key: str(config[key]) for key in ("store", "target") if key in config}
    if (loss := loss_at_end(rows)) is not None:
        found["loss at the end"] = f"{loss:.4g}"
    if (path / "distilled.safetensors").exists():
        found |= {k: v for k, v in _distilled(path).items() if k != "kind"}
    return found | _environments(path)


def _training(path: Path) -> dict[str, str]:
    config, rows = read_json(path / "config.json"), read_jsonl(path / "metrics.jsonl")
    last = rows[-1].get("step", 0) if rows else 0
    return {
        "kind": "target network in training",
        "saved": _saved(path, config if isinstance(config, dict) else {}),
        "logged": f"up to step {last}",
        **_environments(path),
    }


def _saved(path: Path, config: dict[str, Any]) -> str:
    """Return what a run goes on from: what is saved, not what was logged."""
    steps = config.get("steps", "?")
    if (path / "distilled.safetensors").exists():
        return f"the result, after {steps} steps"
    if not (path / "checkpoint.pt").exists():
        return "nothing yet: --resume begins"
    saved = load_state(path / "checkpoint.pt")
    state = saved.get("state")
    state = state.get("trainer", state) if isinstance(state, dict) else {}
    part = ", in the pool's warm-up" if "warm_up_ages" in saved else ""
    return f"step {state.get('step', '?')} of {steps}{part}: --resume goes on from there"


def _environments(path: Path) -> dict[str, str]:
    files = environment.recorded(path)
    return {"environments": _some([file.name for file in files])} if len(files) > 1 else {}


def _distilled(path: Path) -> dict[str, str]:
    from krrst_fast.distill.distilled_set import load_distilled

    distilled = load_distilled(path)
    return {
        "kind": "distilled set",
        "images": "x".join(map(str, distilled.images.shape)),
        "targets": "x".join(map(str, distilled.targets.shape)),
        "mean": _numbers(distilled.mean),
        "std": _numbers(distilled.std),
    }


def _config_has(path: Path, name: str) -> bool:
    file = path / "config.json"
    if not file.is_file():
        return False
    config = read_json(file)
    return isinstance(config, dict) and name in config


_KINDS: tuple[tuple[Callable[[Path], bool], Callable[[Path], dict[str, str]]], ...] = (
    (lambda path: (path / "index.json").exists(), _store),
    (lambda path: (path / "target.safetensors").exists(), _target),
    (lambda path: path.name == "target.safetensors", _target),
    (lambda path: _config_has(path, "method"), _baseline),
    (lambda path: _config_has(path, "num_images"), _run),
    (lambda path: _config_has(path, "projector"), _training),
    (lambda path: path.suffix == ".safetensors", _distilled),
    (lambda path: any(path.glob("*.safetensors")) or (path / "x_syn.pt").exists(), _distilled),
)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _some(names: list[str] | tuple[str, ...], most: int = 10) -> str:
    shown = ", ".join(names[:most]) or "none"
    return f"{len(names)}: {shown}, ..." if len(names) > most else shown
