"""Permutations of the entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import FlowTransform
from ..layout import check_order


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

    def __init__(self, permutation: Sequence[int]) -> None:
        super().__init__(len(permutation))
        order = check_order(permutation, len(permutation))
        self.register_buffer("permutation", torch.tensor(order))

    def forward_and_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        # From the stored permutation, so that it is right after `load_state_dict` too.
        return y.index_select(-1, self.permutation.argsort()), y.new_zeros(y.shape[:-1])


def permute(input_dim: int, permutation: Sequence[int] | None = None) -> Permutation:
    """Build a permutation, by default a random one, with Pyro's signature.

    Examples
    --------
    >>> permute(3, [2, 1, 0])(torch.arange(3.0))
    tensor([2., 1., 0.])
    """
    return Permutation(torch.randperm(input_dim).tolist() if permutation is None else permutation)
