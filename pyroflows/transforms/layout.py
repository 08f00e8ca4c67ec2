"""What couplings, autoregressive and elementwise flows share: parameters, sums and orders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..nn.layout import batch_first, entries_first, fold_batch

__all__ = ["batch_first", "check_order", "entries_first", "parameter_planes", "sum_entries"]


def parameter_planes(rows: Tensor, num_parameters: int) -> Tensor:
    """Turn a network's outputs ``(P * D, N)`` into ``(P, D, N)``."""
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
