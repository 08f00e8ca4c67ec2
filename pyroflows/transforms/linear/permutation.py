"""Permutations of the entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import FlowTransform
from ..layout import batch_first, check_order, entries_first


class Permutation(FlowTransform):
    r"""Reorder the entries: :math:`y_i = x_{\pi(i)}`, with log-determinant 0.

    Parameters
    ----------
    permutation
        The permutation :math:`\pi` of ``0 .. D - 1``, kept as a buffer.

    Raises
    ------
    ValueError
        If ``permutation`` is not one.

    Examples
    --------
    >>> Permutation([2, 0, 1])(torch.tensor([10.0, 20.0, 30.0]))
    tensor([30., 10., 20.])
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Sequence[int]) -> None:
        super().__init__(len(permutation))
        order = check_order(permutation, len(permutation))
        self.register_buffer("permutation", torch.tensor(order))
        self.register_buffer("inverse_permutation", self.permutation.argsort(), persistent=False)

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(x, self.permutation)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self._reorder(y, self.inverse_permutation)

    @staticmethod
    def _reorder(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        batch_shape = x.shape[:-1]
        rows = entries_first(x).index_select(0, order)
        return batch_first(rows, batch_shape), x.new_zeros(batch_shape)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.inverse_permutation.copy_(self.permutation.argsort())


def permute(input_dim: int, permutation: Sequence[int] | None = None) -> Permutation:
    """Build a permutation, by default a random one, with Pyro's signature.

    Examples
    --------
    >>> permute(3, [2, 1, 0])(torch.arange(3.0))
    tensor([2., 1., 0.])
    """
    return Permutation(torch.randperm(input_dim).tolist() if permutation is None else permutation)
