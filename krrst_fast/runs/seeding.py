"""Independent random streams from one seed, with no global state."""

import hashlib

import torch


def derive(seed: int, *names: str | int) -> int:
    """Return a seed for each tuple of names, the same on every machine and in every run."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator seeded by `derive(seed, *names)`."""
    return torch.Generator().manual_seed(derive(seed, *names))
