"""The user's own code: a class or function found by SPEC, `module:Name` or `file.py:Name`."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from krrst_fast.errors import ConfigError, KrrstError
from krrst_fast.models.config import SPEC


@dataclass(frozen=True, kw_only=True)
class UserCode:
    """A class or function that makes modules, and the files it comes from.

    Attributes:
        spec: What it was asked for by, as error messages name it.
        make: The class or function.
        folder: Its imports are looked for here first.
        files: Source files of the module and of the class.
    """

    spec: str
    make: Callable[..., Any]
    folder: Path
    files: tuple[Path, ...]

    def call(self, **settings: int) -> nn.Module:
        """Make a module, with those of the settings that are its parameters by name.

        Raises:
            ConfigError: It fails, or makes something else than a module.
        """
        given = {name: value for name, value in settings.items() if name in self.parameters()}
        words = f"with {', '.join(given)}" if given else "without arguments"
        with self.running(f"making the network {words}"):
            network = self.make(**given)
        if not isinstance(network, nn.Module):
            kind = type(network).__name__
            raise ConfigError(f"{self.spec}: must make a torch.nn.Module, got a {kind}")
        return network

    def parameters(self) -> set[str]:
        """Return the names of the parameters that can be given by keyword."""
        try:
            parameters = inspect.signature(self.make).parameters.values()
        except (TypeError, ValueError):  # compiled code without a signature
            return set()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {parameter.name for parameter in parameters if parameter.kind in named}

    @contextmanager
    def running(self, doing: str) -> Iterator[None]:
        """Run the user's code; what it raises becomes a ConfigError that names its line."""
        try:
            with _importable(self.folder):
                yield
        except KrrstError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(self.spec, doing, error, self.files) from error


def load(spec: str, folder: Path, *, name: str = "") -> UserCode:
    """Load what SPEC names; a file is run anew at each call, a module is imported once.

    Args:
        spec: `module:Name`, where modules of `folder` come first, or `path/file.py:Name`, relative
            to `folder`. The name is that of a class or function, with dots inside of others.
        folder: The current folder.
        name: What error messages call it; SPEC if left out.

    Raises:
        ConfigError: There is no such module, file or name, or its code fails.
    """
    name = name or spec
    matched = SPEC.fullmatch(spec)
    if matched is None:
        raise ConfigError(f"{name}: must be module:Name or file.py:Name, of a class or function")
    place = matched["place"]
    if is_file(place):
        path = (folder / Path(place).expanduser()).resolve()
        folder = path.parent
        module = _run_file(name, path)
    else:
        module = _import(name, place, folder)
    make = _attribute(name, module, matched["name"])
    return UserCode(spec=name, make=make, folder=folder, files=_files(module, make))


def is_file(place: str) -> bool:
    """Return whether the first part of a SPEC is the path of a file, not the name of a module."""
    return place.endswith(".py") or "/" in place


def _run_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{spec}: there is no file {path}")
    # A name of its own: a file may be called like a package.
    name = f"krrst_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    before = sys.modules.get(name)
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Not through Python's cache of compiled files, which takes two edits in a second for one.
        with _importable(path.parent):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
        raise _failed(spec, "running the file", error, (path,)) from error
    return module


def _import(spec: str, place: str, folder: Path) -> ModuleType:
    importlib.invalidate_caches()
    try:
        with _importable(folder):
            return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (place == missing or place.startswith(f"{missing}.")):
            raise ConfigError(
                f"{spec}: there is no module {missing!r} in the current folder {folder} or among "
                "the installed packages; a file is given as path/to/file.py:Name"
            ) from None
        raise _failed(spec, "importing the module", error, ()) from error


def _attribute(spec: str, module: ModuleType, name: str) -> Callable[..., Any]:
    found: Any = module
    for word in name.split("."):
        if not hasattr(found, word):
            near = get_close_matches(word, dir(found), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{spec}: there is no {word!r} in it{hint}")
        found = getattr(found, word)
    if isinstance(found, nn.Module):
        raise ConfigError(
            f"{spec}: must be a class or function that makes a new network at each call, got a "
            f"network ({type(found).__name__})"
        )
    if not callable(found):
        raise ConfigError(
            f"{spec}: must be a class or function that makes a network, got {found!r:.60}"
        )
    return found


def _files(module: ModuleType, make: Callable[..., Any]) -> tuple[Path, ...]:
    """Return the file of the module and, where that only passes it on, the one of the class."""
    try:
        defined = inspect.getsourcefile(inspect.unwrap(make))
    except TypeError:  # an object, or compiled code
        defined = None
    names = dict.fromkeys(name for name in (module.__file__, defined) if name)
    return tuple(Path(name) for name in names)


def _failed(spec: str, doing: str, error: BaseException, files: tuple[Path, ...]) -> ConfigError:
    """Return the error of the user's code as one line that names the last of their lines."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if Path(frame.filename) in files]
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    if isinstance(error, SystemExit):
        text = "it ended the program; what only a script does belongs under __name__ == '__main__'"
    else:
        text = f"{type(error).__name__}: {error}"
    return ConfigError(f"{spec}: {doing} failed: {' '.join(text.split())}{where}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Look for modules in `folder` first, as Python does for a script in it."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
