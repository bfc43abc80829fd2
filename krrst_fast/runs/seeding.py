"""Independent random streams from one seed, with no global state."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_CPU = torch.device("cpu")


def derive(seed: int, *names: str | int) -> int:
    """Return a seed for each tuple of names, the same on every machine and in every run."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derive(seed, *names)`."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def seeded(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed torch's default generators of the CPU and of a GPU `device`; restore them afterwards.

    For code that draws from them: the initial values of layers, dropout.
    """
    # Those generators alone: torch.manual_seed would reseed every GPU.
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        with _seeded_mps(seed) if device.type == "mps" else nullcontext():
            yield


@contextmanager
def _seeded_mps(seed: int) -> Iterator[None]:
    before = torch.mps.get_rng_state()
    torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        torch.mps.set_rng_state(before)
