"""The user's own code that makes networks: found, and loaded once in a process."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from krrst_fast.errors import ConfigError
from krrst_fast.models.config import SPEC
from krrst_fast.runs.seeding import seeded


@dataclass(frozen=True, kw_only=True)
class NetworkSource:
    """A class or function that makes networks, and the files it comes from.

    Attributes:
        spec: What it was asked for by, `module:Name` or `file.py:Name`.
        make: The class or function.
        folder: Its imports are looked for here first.
        files: Source files of the module and of the class.
        digest: Digest of these files when they were loaded.
    """

    spec: str
    make: Callable[..., Any]
    folder: Path
    files: tuple[Path, ...]
    digest: str

    def identity(self) -> str:
        """Return what tells this code from an earlier or later version of it.

        Raises:
            ConfigError: A file was edited after this process loaded it.
        """
        if self.digest != _digest(self.files):
            names = ", ".join(file.name for file in self.files)
            raise ConfigError(
                f"{self.spec}: {names} has changed since this process loaded it; start a new one"
            )
        return f"sha256 {self.digest}"

    def call(self, **settings: int) -> nn.Module:
        """Make a network, with those of the settings that are its parameters by name.

        Raises:
            ConfigError: It fails, or makes something else than a module with parameters.
        """
        given = {name: value for name, value in settings.items() if name in self.parameters()}
        words = f"with {', '.join(given)}" if given else "without arguments"
        with self.running(f"making the network {words}"):
            network = self.make(**given)
        if not isinstance(network, nn.Module):
            kind = type(network).__name__
            raise ConfigError(f"{self.spec}: must make a torch.nn.Module, got a {kind}")
        if next(network.parameters(), None) is None:
            raise ConfigError(f"{self.spec}: the network has no parameters, nothing to train")
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
            with importable(self.folder):
                yield
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            raise _failed(self.spec, doing, error, self.files) from error


def find(spec: str) -> NetworkSource:
    """Load what `spec` names; a module or file is read once in a process.

    Args:
        spec: `module:Name`, where modules of the current folder come first, or `path/file.py:Name`,
            relative to the current folder. The name is that of a class or function.

    Raises:
        ConfigError: There is no such module, file or name, or its code fails.
    """
    # Code that draws random numbers when it is loaded draws the same ones in every process, and
    # none from the stream of the network that is built first.
    with seeded(0):
        return _find(spec, Path.cwd())


@cache
def _find(spec: str, folder: Path) -> NetworkSource:
    matched = SPEC.fullmatch(spec)
    assert matched is not None, "a ModelConfig has checked the form"
    place, name = matched["place"], matched["name"]
    is_file = place.endswith(".py") or "/" in place
    if is_file:
        path = (folder / Path(place).expanduser()).resolve()
        folder = path.parent
        module = _run_file(spec, path)
    else:
        module = _import(spec, place, folder)
    make = _attribute(spec, module, name)
    files = _files(module, make)
    return NetworkSource(spec=spec, make=make, folder=folder, files=files, digest=_digest(files))


def _run_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{spec}: there is no file {path}")
    # A name of its own: a file may be called like a package.
    name = f"krrst_network_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their module up there
    try:
        # Not through Python's cache of compiled files, which takes two edits in a second for one.
        with importable(path.parent):
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed(spec, "running the file", error, (path,)) from error
    return module


def _import(spec: str, place: str, folder: Path) -> ModuleType:
    importlib.invalidate_caches()
    try:
        with importable(folder):
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


def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:16]


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
def importable(folder: Path) -> Iterator[None]:
    """Look for modules in `folder` first, as Python does for a script in it."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
