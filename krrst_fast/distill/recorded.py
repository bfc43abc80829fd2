"""Where the inputs lie that the config.json of a run names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def recorded_path(folder: Path, settings: Mapping[str, Any], key: str) -> Path:
    """A path in the settings of a run.

    Runs of earlier versions hold paths as they were typed. A relative one is looked for in the
    working directory, then in the one that the run was started in, if its folder is still there.

    Args:
        folder: of the run.
        settings: its config.json.
        key: store or target.
    """
    path, out = Path(str(settings[key])), Path(str(settings.get("out", "")))
    here = folder.resolve()
    if path.is_absolute() or path.exists() or out.is_absolute() or not out.parts:
        return path
    if here.parts[-len(out.parts) :] != out.parts:
        return path
    there = Path(*here.parts[: -len(out.parts)]) / path
    return there if there.exists() else path
