"""Numbers to draw: tensors on any device, arrays and lists become arrays in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..diagnostics.entries import entry_names


def to_numpy(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=float)


def as_array(name: str, values: Any, *shape: int | str) -> np.ndarray:
    """Return values as an array, or say what is wrong with their shape.

    Parameters
    ----------
    name
        What the values are called in errors.
    values
        A tensor on any device, an array, or nested lists.
    *shape
        The sizes they must have. A name stands for any size of at least 1.
    """
    array = to_numpy(values)
    fits = array.ndim == len(shape) and all(
        got >= 1 if isinstance(size, str) else got == size
        for got, size in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    return array


def as_finite_array(name: str, values: Any, *shape: int | str) -> np.ndarray:
    """Return values as an array, or say that their shape is wrong or that some are not finite."""
    array = as_array(name, values, *shape)
    if wrong := np.count_nonzero(~np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {wrong} of {array.size} entries that are not")
    return array


def as_columns(name: str, values: Any) -> tuple[np.ndarray, list[str]]:
    """Return draws as a matrix ``(S, D)`` with a name for each column.

    Parameters
    ----------
    name
        What the values are called in errors, and columns of a matrix after.
    values
        A matrix, or draws ``(S, *shape)`` by site.
    """
    if not isinstance(values, Mapping):
        matrix = as_finite_array(name, values, "S", "D")
        return matrix, entry_names(name, torch.Size(matrix.shape[1:]))
    columns, names = [], []
    for site, draws in values.items():
        shape = torch.Size(np.shape(draws)[1:])
        sizes = ("S", *shape)
        array = as_finite_array(f"{name}[{site!r}]", draws, *sizes)
        columns.append(array.reshape(len(array), -1))
        names += entry_names(site, shape)
    if len({len(column) for column in columns}) != 1:
        numbers = {site: len(column) for site, column in zip(values, columns, strict=True)}
        raise ValueError(f"{name} must hold equally many draws of each site, got {numbers}")
    return np.concatenate(columns, 1), names
