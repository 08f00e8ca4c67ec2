"""Linear algebra in any float dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def in_single_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function work on tensors of half precision, for which LAPACK has no routines."""

    @functools.wraps(function)
    def widened(*tensors: Tensor, **options: Any) -> Tensor:
        dtype = tensors[0].dtype
        if dtype not in _HALF:
            return function(*tensors, **options)
        return function(*(tensor.float() for tensor in tensors), **options).to(dtype)

    return widened


def identity_like(matrix: Tensor) -> Tensor:
    """Return the identity matrix of as many columns, in the same dtype and on the same device."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


@in_single_precision
def solve_unit_triangular(matrix: Tensor, x: Tensor, upper: bool) -> Tensor:
    """Return :math:`M^{-1} x` for each vector of ``x``, shape ``(*batch, D)``.

    ``M`` is one triangle of ``matrix`` with ones on the diagonal; the rest of it is not read.
    """
    rows = x.reshape(-1, x.shape[-1])
    solution = torch.linalg.solve_triangular(
        matrix.mT, rows, upper=not upper, left=False, unitriangular=True
    )
    return solution.reshape(x.shape)
