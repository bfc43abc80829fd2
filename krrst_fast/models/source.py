"""The user's own networks: loaded once in a process, and told from other versions of their code."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import nn

from krrst_fast.errors import ConfigError
from krrst_fast.models.user_code import UserCode, load
from krrst_fast.runs.seeding import seeded


@dataclass(frozen=True, kw_only=True)
class NetworkSource(UserCode):
    """A class or function that makes networks which are trained.

    Attributes:
        digest: Digest of the files when they were loaded.
    """

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
        network = super().call(**settings)
        if next(network.parameters(), None) is None:
            raise ConfigError(f"{self.spec}: the network has no parameters, nothing to train")
        return network


def find(spec: str) -> NetworkSource:
    """Load what `spec` names; a module or file is read once in a process.

    Args:
        spec: `module:Name` or `path/file.py:Name`, as `load` takes it, from the current folder.

    Raises:
        ConfigError: There is no such module, file or name, or its code fails.
    """
    # Code that draws random numbers when it is loaded draws the same ones in every process, and
    # none from the stream of the network that is built first.
    with seeded(0):
        return _find(spec, Path.cwd())


@cache
def _find(spec: str, folder: Path) -> NetworkSource:
    code = load(spec, folder)
    return NetworkSource(**vars(code), digest=_digest(code.files))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:16]
