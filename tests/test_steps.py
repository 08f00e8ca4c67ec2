"""The steps in which masked networks are evaluated: nothing is used before it is known."""

from itertools import accumulate

import pytest

from pyroflows.nn.steps import Block, blocks_backwards, blocks_forwards
from tests.models import over

NETWORKS: dict[str, tuple[list[list[int]], int]] = {
    "narrow": ([[0, 3, 6]], 8),
    "wide": ([[0, 0, 0, 1, 1, 2, 2, 2]], 4),
    "deep": ([[0, 1, 2, 3], [0, 2, 3], [0, 3]], 5),
    "with context": ([[-1, 0, 1], [-1, 1]], 3),
    "one entry": ([[-1, -1]], 1),
}


@pytest.fixture(**over(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[list[list[int]], int]:
    """Return the degrees of hidden layers, and the number of entries."""
    return request.param


def bounds(blocks: list[Block], layer: int) -> list[int]:
    """Return where the steps of a layer begin and end, having checked that blocks are adjacent."""
    for block in blocks:
        units, sizes = block[layer]
        assert units.stop - units.start == sum(sizes)
    assert [b[layer][0].start for b in blocks[1:]] == [b[layer][0].stop for b in blocks[:-1]]
    sizes = [size for block in blocks for size in block[layer][1]]
    return list(accumulate(sizes, initial=blocks[0][layer][0].start))


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize("divide", [blocks_forwards, blocks_backwards])
def test_steps_cover_entries_and_their_parameters(network, divide, size: int) -> None:
    degrees, input_dim = network
    blocks = divide(degrees, input_dim, 3, size)
    assert {len(block[0][1]) for block in blocks[:-1]} <= {size}
    ranks = bounds(blocks, 0)
    assert (ranks[0], ranks[-1]) == (0, input_dim)
    assert bounds(blocks, -1) == [3 * rank for rank in ranks]


def test_units_are_ready_for_the_first_entry_of_their_step(network) -> None:
    """Forwards, units of degrees below an entry's rank are what it needs and what is known."""
    degrees, input_dim = network
    blocks = blocks_forwards(degrees, input_dim, 1, 2)
    ranks = bounds(blocks, 0)
    for i, layer in enumerate(degrees):
        stops = bounds(blocks, i + 1)[1:]
        for first, last, stop in zip(ranks[:-1], ranks[1:], stops, strict=True):
            for rank in range(first, last):
                assert stop == sum(degree < rank for degree in layer)


def test_units_that_see_an_entry_are_solved_before_it(network) -> None:
    """Backwards, units of degrees from an entry's rank on are all that see it."""
    degrees, input_dim = network
    blocks = blocks_backwards(degrees, input_dim, 1, 2)
    ranks = bounds(blocks, 0)
    for i, layer in enumerate(degrees):
        starts = bounds(blocks, i + 1)
        assert starts[-1] == len(layer)
        for first, start in zip(ranks, starts, strict=True):
            assert len(layer) - start == sum(degree >= first for degree in layer)
