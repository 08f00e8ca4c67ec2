"""Networks that summarise sets."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SetEmbedding(nn.Module):
    r"""Summarise a set by a function that knows no order [1].

    .. math:: e(x_{1..n}) = \rho\left(\tfrac1n \textstyle\sum_i \phi(x_i) ,
        \max_i \phi(x_i) , \log(1 + n)\right)

    Sets of any size give summaries of the same size. Missing entries, NaN, are marked for
    :math:`\phi`; elements of which all entries are missing do not count. Costs ``O(n)``.

    Parameters
    ----------
    input_dim
        Size of an element.
    output_dim
        Size of the summary.
    width
        Number of units of the hidden layers.

    References
    ----------
    [1] M. Zaheer, S. Kottur, S. Ravanbakhsh, B. Poczos, R. Salakhutdinov, A. Smola. Deep sets.
        `arXiv:1703.06114 <https://arxiv.org/abs/1703.06114>`_, 2017.

    Examples
    --------
    >>> SetEmbedding(2, 5)(torch.randn(7, 4, 2)).shape
    torch.Size([7, 5])
    """

    def __init__(self, input_dim: int, output_dim: int, width: int = 64) -> None:
        super().__init__()
        self.each = nn.Sequential(
            nn.Linear(2 * input_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.together = nn.Sequential(
            nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, output_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return summaries ``(*batch, output_dim)`` of sets ``(*batch, n, input_dim)``."""
        absent = x.isnan().all(-1, keepdim=True)
        number = (~absent).sum(-2).to(x)
        units = self.each(mark_missing(x))
        mean = units.masked_fill(absent, 0.0).sum(-2) / number.clamp(min=1)
        # Units are above -1: without elements that is the maximum.
        maximum = units.masked_fill(absent, -1.0).amax(-2)
        return self.together(torch.cat([mean, maximum, number.log1p()], -1))


def mark_missing(x: Tensor) -> Tensor:
    """Return entries with 0 for NaN, and behind them 1 for each NaN: ``(*batch, 2 V)``."""
    missing = x.isnan()
    return torch.cat([x.masked_fill(missing, 0.0), missing.to(x)], -1)


class MarkMissing(nn.Module):
    """Give the entries of a vector, and which of them are missing.

    Examples
    --------
    >>> MarkMissing()(torch.tensor([2.0, torch.nan]))
    tensor([2., 0., 0., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return vectors ``(*batch, 2 V)`` of vectors ``(*batch, V)`` with NaN."""
        return mark_missing(x)
