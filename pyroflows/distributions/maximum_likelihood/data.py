"""Rows of data to learn from: their checks and their split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MIN_ROWS = 2  # a single one has no spread
RESOLUTION = 16  # an entry must vary by this many times its rounding error


@dataclass(frozen=True)
class Rows:
    """Hold rows of data and their contexts."""

    data: Tensor
    context: Tensor | None

    def __len__(self) -> int:
        return len(self.data)

    def select(self, index: Tensor) -> Rows:
        """Return the rows of these indices."""
        index = index.to(self.data.device)
        context = None if self.context is None else self.context.index_select(0, index)
        return Rows(self.data.index_select(0, index), context)

    def chunks(self, size: int) -> Iterator[Rows]:
        """Yield all rows in order, ``size`` at a time."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Rows(self.data[part], None if self.context is None else self.context[part])


def concatenate(one: Rows, other: Rows) -> Rows:
    """Return the rows of both, which have contexts."""
    assert one.context is not None
    assert other.context is not None
    context = torch.cat([one.context, other.context])
    return Rows(torch.cat([one.data, other.data]), context)


def check_rows(
    data: Tensor | np.ndarray,
    context: Tensor | np.ndarray | None,
    event_shape: torch.Size,
    context_dim: int,
    like: Tensor,
) -> Rows:
    """Return data and context in the dtype and on the device of ``like``.

    Raises
    ------
    TypeError
        If one of them is not an array.
    ValueError
        If they cannot be learned from.
    """
    rows = as_rows("data", data, event_shape, like)
    _check_spread(rows)
    return with_context(rows, context, context_dim, like)


def with_context(
    rows: Tensor, context: Tensor | np.ndarray | None, context_dim: int, like: Tensor
) -> Rows:
    """Return checked rows together with their context, in the dtype and on the device of ``like``.

    Raises
    ------
    TypeError
        If the context is not an array.
    ValueError
        If it is missing or unexpected, or has another number of rows or entries.
    """
    if context is None:
        if context_dim:
            raise ValueError(f"context must have shape (N, {context_dim}), got none")
        return Rows(rows, None)
    if not context_dim:
        raise ValueError("context must be None for a density without one, got one")
    contexts = as_rows("context", context, torch.Size([context_dim]), like)
    if len(contexts) != len(rows):
        raise ValueError(
            f"context must have as many rows as data, {len(rows)}, got {len(contexts)}"
        )
    return Rows(rows, contexts)


def split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Return the rows to train on and those to validate on, a random share of ``fraction``.

    Raises
    ------
    ValueError
        If too few rows are left to train on.
    """
    total = len(rows)
    held_out = max(1, round(fraction * total)) if fraction else 0
    if total - held_out < MIN_ROWS:
        raise ValueError(
            f"data must have at least {MIN_ROWS} rows to train on, got {total}, of which "
            f"{held_out} to validate on"
        )
    order = torch.randperm(total, generator=generator(seed, 0))
    return rows.select(order[held_out:]), rows.select(order[:held_out])


def generator(*numbers: int) -> torch.Generator:
    """Return a random generator on the CPU that depends on nothing but these numbers."""
    return torch.Generator().manual_seed(mix(*numbers))


def mix(*numbers: int) -> int:
    """Return a seed made of several.

    Examples
    --------
    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def as_rows(name: str, value: Tensor | np.ndarray, event_shape: torch.Size, like: Tensor) -> Tensor:
    """Return events of a shape as a tensor in the dtype and on the device of ``like``.

    Raises
    ------
    TypeError
        If ``value`` is not an array.
    ValueError
        If it has another shape, or numbers that are not finite.
    """
    if not isinstance(value, Tensor | np.ndarray):
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    rows = torch.as_tensor(value).detach().to(like)
    if rows.dim() != 1 + len(event_shape) or rows.shape[1:] != event_shape:
        expected = ", ".join(["N", *map(str, event_shape)])
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(rows.shape)}")
    finite = rows.isfinite()
    if not bool(finite.all()):
        row = (~finite).flatten(1).any(1).nonzero()
        raise ValueError(
            f"{name} must be finite in {rows.dtype}, got {_first(rows, finite)} in row "
            f"{row[0].item()} ({len(row)} of {len(rows)} rows are not finite)"
        )
    return rows


def _first(rows: Tensor, finite: Tensor) -> float:
    return rows[~finite][0].item()


def _check_spread(rows: Tensor) -> None:
    """Raise ``ValueError`` if an entry is the same in all rows, where no density exists."""
    if len(rows) < MIN_ROWS:
        raise ValueError(f"data must have at least {MIN_ROWS} rows, got {len(rows)}")
    low, high = rows.amin(0), rows.amax(0)
    resolution = torch.maximum(low.abs(), high.abs()) * torch.finfo(rows.dtype).eps
    constant = (high - low <= RESOLUTION * resolution).nonzero()
    if len(constant):
        columns = ", ".join(map(str, constant.squeeze(-1).tolist()[:10]))
        remedy = "" if rows.dtype == torch.float64 else ", or use float64 if it varies there"
        raise ValueError(
            f"data must vary in every column, got constant ones in {rows.dtype}: column "
            f"{columns}; leave them out{remedy}"
        )
