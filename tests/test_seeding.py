"""Independent streams from one seed."""

import torch

from krrst_fast.runs.seeding import derive, generator


def test_streams_are_fixed_and_independent() -> None:
    assert derive(0) == derive(0) < 2**63
    assert len({derive(0), derive(1), derive(0, "a"), derive(0, "b"), derive(0, "a", 1)}) == 5
    # The numbers themselves are part of the format of every saved run.
    assert derive(0, "pool", 3) == 471341205764234803
    first, again = (torch.randn(4, generator=generator(5, "x")) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(4, generator=generator(5, "y")))


def test_global_stream_is_untouched() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)
