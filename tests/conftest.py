"""What every test runs under: deterministic algorithms, and uninitialised memory full of NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_poisoned_memory() -> Iterator[None]:
    """With deterministic algorithms torch fills fresh memory with NaN: a kernel that misses an element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
