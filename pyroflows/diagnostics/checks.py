"""Checks of the tensors that diagnostics take, with messages that name the argument."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, values: Tensor, *sizes: str | int) -> None:
    """Raise unless values are a tensor without NaN, of the given leading sizes.

    Parameters
    ----------
    name
        The argument's name.
    values
        What came.
    *sizes
        A size is a number, or a letter if any number from 1 will do.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
    fits = values.ndim >= len(sizes) and all(
        size == expected or (isinstance(expected, str) and size > 0)
        for size, expected in zip(values.shape, sizes)
    )
    if not fits:
        expected_shape = ", ".join(map(str, sizes))
        raise ValueError(
            f"{name} must have shape ({expected_shape}, ...), got {tuple(values.shape)}"
        )
    if values.isnan().any():
        raise ValueError(
            f"{name} must not hold NaN, got {int(values.isnan().sum())} in {values.numel()} entries"
        )


def check_matrix(name: str, values: Tensor, num_rows: str | int, num_columns: str | int) -> None:
    """Raise unless values are a matrix of finite floating-point numbers, of the given sizes."""
    check_tensor(name, values, num_rows, num_columns)
    if values.ndim != 2:
        raise ValueError(
            f"{name} must have shape ({num_rows}, {num_columns}), got {tuple(values.shape)}"
        )
    check_finite(name, values)


def check_finite(name: str, values: Tensor) -> None:
    """Raise unless values are finite floating-point numbers."""
    if not values.is_floating_point():
        raise TypeError(f"{name} must be of a floating-point dtype, got {values.dtype}")
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} must be finite, got infinite entries")


def check_varying(name: str, values: Tensor) -> None:
    """Raise if a column of a matrix is constant: it has no scale to be measured by."""
    constant = (values.amin(0) == values.amax(0)).nonzero().flatten()
    if len(constant) > 0:
        raise ValueError(f"{name} must vary in every column, got constants in {constant.tolist()}")
