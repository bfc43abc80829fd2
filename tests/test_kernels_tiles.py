"""How the Triton kernels cut the inner dimension."""

import pytest

pytest.importorskip("triton")
from krrst_fast.kernels import tiles

LARGE, SMALL = tiles.GRAM["half", "hopper"][1], tiles.THIN["half", "hopper"][0]


@pytest.mark.parametrize("depth", [1, 63, 255, 257, 1000, 8192, 8193, 50000])
@pytest.mark.parametrize("blocks", [1, 36, 132, 133, 3160])
@pytest.mark.parametrize("tile", [LARGE, SMALL], ids=["large", "small"])
def test_splits_and_runs_cover_the_inner_dimension_once(
    depth: int, blocks: int, tile: tiles.Tile
) -> None:
    splits, split, run = tiles.cut(depth, blocks, tile, 90)
    assert (splits - 1) * split < depth <= splits * split
    assert split % tile.depth == run % tile.depth == 0
    assert run <= split and run <= 1280 + tile.depth


@pytest.mark.parametrize(
    "blocks,tile,splits",
    [
        (1, LARGE, 32),  # never shorter than 256 terms
        (132, LARGE, 1),  # a GPU full of programs
        (136, LARGE, 4),  # 136 programs would take as long as 264
        (3160, LARGE, 1),
        (128, SMALL, 2),  # two programs at a time on a multiprocessor
    ],
)
def test_a_gpu_is_full(blocks: int, tile: tiles.Tile, splits: int) -> None:
    assert tiles.cut(8192, blocks, tile, 90).splits == splits


def test_nothing_to_add_up() -> None:
    assert tiles.cut(0, 1, LARGE, 90).splits == 1
