"""The block-triangular layer of block neural autoregressive flows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class BlockLinear(nn.Module):
    r"""Hold weights that are positive within each group of units, free from earlier groups.

    The weight matrix consists of :math:`D \times D` blocks, those on the diagonal
    :math:`e^{W_{dd}}`, those below it :math:`W_{de}`, those above it zero. The layer's products
    are left to its user, who needs the two kinds of blocks apart.

    Parameters
    ----------
    groups
        Number of groups :math:`D`.
    in_size, out_size
        Units per group before and after the layer.
    gain
        Scale of the initial weights: rows of positive blocks sum to about ``gain``.

    References
    ----------
    [1] N. De Cao, I. Titov, W. Aziz. Block neural autoregressive flow.
        `arXiv:1904.04676 <https://arxiv.org/abs/1904.04676>`_, 2019.

    Examples
    --------
    >>> layer = BlockLinear(groups=3, in_size=1, out_size=8)
    >>> own, earlier = layer.blocks()
    >>> own.shape, earlier.shape, bool((own > 0).all())
    (torch.Size([3, 8, 1]), torch.Size([24, 3]), True)
    """

    mask: Tensor

    def __init__(self, groups: int, in_size: int, out_size: int, gain: float = 1.0) -> None:
        super().__init__()
        self.groups, self.in_size, self.out_size = groups, in_size, out_size
        self.weight = nn.Parameter(torch.empty(groups * out_size, groups * in_size))
        mask = torch.ones(groups, groups).tril(-1)
        mask = mask.repeat_interleave(out_size, 0).repeat_interleave(in_size, 1)
        self.register_buffer("mask", mask, persistent=False)
        bound = gain / (groups * in_size) ** 0.5
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            mean = math.log(gain / in_size)
            self._diagonal().copy_(torch.empty_like(self._diagonal()).uniform_(mean - 1, mean + 1))

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Return the positive blocks and the matrix of free weights below them.

        Returns
        -------
        Tensor
            The blocks on the diagonal, ``(D, out_size, in_size)``.
        Tensor
            The matrix that is zero on and above them, ``(D * out_size, D * in_size)``.
        """
        return self._diagonal().exp(), self.weight * self.mask

    def seen_by_later(self, earlier: Tensor, group: int) -> Tensor:
        """Return the part of the matrix by which later groups see the units of one."""
        start, stop = (i * self.in_size for i in (group, group + 1))
        return earlier[(group + 1) * self.out_size :, start:stop]

    def _diagonal(self) -> Tensor:
        blocks = self.weight.view(self.groups, self.out_size, self.groups, self.in_size)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, in_size={self.in_size}, out_size={self.out_size}"
