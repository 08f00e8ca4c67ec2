"""The order of entries, and the memory layout in which scalar bijections work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn.mlp import fold_batch


def entries_first(x: Tensor) -> Tensor:
    """Turn ``(*batch, D)`` into ``(D, N)``."""
    return fold_batch(x, (x.shape[:-1].numel(), x.shape[-1])).T


def batch_first(rows: Tensor, batch_shape: torch.Size) -> Tensor:
    """Turn ``(D, N)`` back into ``(*batch, D)``."""
    return fold_batch(rows.T, (*batch_shape, rows.shape[0]))


def parameter_planes(parameters: Tensor, num_parameters: int) -> Tensor:
    """Turn a network's output ``(*batch, P * D)`` into ``(P, D, N)``."""
    rows = entries_first(parameters)
    return rows.reshape(num_parameters, rows.shape[0] // num_parameters, rows.shape[1])


def sum_entries(log_derivative: Tensor, batch_shape: torch.Size) -> Tensor:
    """Turn log-derivatives ``(D, N)`` into log-determinants ``(*batch,)``."""
    return fold_batch(log_derivative.sum(0), batch_shape)


def check_order(order: Sequence[int] | None, input_dim: int) -> list[int]:
    """Return ``order`` as a list, the identity if ``None``; raise unless it is a permutation."""
    result = list(range(input_dim)) if order is None else [*order]
    if sorted(result) != list(range(input_dim)):
        raise ValueError(f"order must be a permutation of 0 .. {input_dim - 1}, got {result}")
    return result
