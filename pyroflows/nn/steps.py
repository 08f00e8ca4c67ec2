"""The steps in which a masked network is taken through its entries, gathered in blocks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import TypeAlias

import torch

# For inputs, hidden layers and outputs: the block's slice of the layer, and the sizes of its steps.
Block: TypeAlias = list[tuple[slice, list[int]]]


def blocks_forwards(
    degrees: Sequence[Sequence[int]], input_dim: int, num_parameters: int, steps_per_block: int
) -> list[Block]:
    """Divide a pass from the first entry to the last into steps, and gather these in blocks.

    A step takes as many entries as the same hidden units suffice for, and the hidden units that
    these entries need but earlier ones did not.

    Parameters
    ----------
    degrees
        The degrees of each hidden layer, sorted: a unit sees entries of rank up to its degree.
    input_dim
        Number of entries.
    num_parameters
        Number of outputs per entry.
    steps_per_block
        Number of steps in a block, except for the last.

    Examples
    --------
    >>> (block,) = blocks_forwards([[0, 0, 1]], 3, num_parameters=2, steps_per_block=3)
    >>> for units, sizes in block:
    ...     print(units, sizes)
    slice(0, 3, None) [1, 1, 1]
    slice(0, 3, None) [0, 2, 1]
    slice(0, 6, None) [2, 2, 2]
    """
    cuts = _cuts(degrees, input_dim)
    units = [[0, *(bisect_left(layer, cut) for cut in cuts[:-1])] for layer in degrees]
    return _blocks([cuts, *units, [num_parameters * cut for cut in cuts]], steps_per_block)


def blocks_backwards(
    degrees: Sequence[Sequence[int]], input_dim: int, num_parameters: int, steps_per_block: int
) -> list[Block]:
    """Divide a pass from the last entry to the first into steps, and gather these in blocks.

    As in :func:`blocks_forwards`, but the hidden units of a step are those that see its entries
    and not the next. Steps and blocks are listed from the first entry on.

    Examples
    --------
    >>> (block,) = blocks_backwards([[0, 0, 1]], 3, num_parameters=2, steps_per_block=3)
    >>> for units, sizes in block:
    ...     print(units, sizes)
    slice(0, 3, None) [1, 1, 1]
    slice(0, 3, None) [2, 1, 0]
    slice(0, 6, None) [2, 2, 2]
    """
    cuts = _cuts(degrees, input_dim)
    units = [[bisect_left(layer, cut) for cut in cuts] for layer in degrees]
    return _blocks([cuts, *units, [num_parameters * cut for cut in cuts]], steps_per_block)


def least_overhead() -> AbstractContextManager:
    """Return inference mode, which takes a fifth off small operations, where torch can bear it.

    Compilers and function transforms cannot: after a failure in it the whole process is unusable.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return torch.no_grad()
    return torch.inference_mode()


def _cuts(degrees: Sequence[Sequence[int]], input_dim: int) -> list[int]:
    """Return the ranks at which further hidden units are needed, from 0 to ``input_dim``."""
    ranks = range(input_dim)
    units = [[bisect_left(layer, rank) for layer in degrees] for rank in ranks]
    starts = [rank for rank in ranks if not rank or units[rank] != units[rank - 1]]
    return [*starts, input_dim]


def _blocks(bounds: Sequence[list[int]], steps_per_block: int) -> list[Block]:
    """Gather steps, given by their bounds in each layer, in blocks."""
    starts = range(0, len(bounds[0]) - 1, steps_per_block)
    return [
        [_pieces(layer[start : start + steps_per_block + 1]) for layer in bounds]
        for start in starts
    ]


def _pieces(bounds: list[int]) -> tuple[slice, list[int]]:
    return slice(bounds[0], bounds[-1]), [stop - start for start, stop in pairwise(bounds)]
