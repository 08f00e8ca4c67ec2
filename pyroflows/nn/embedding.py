"""Networks that summarise observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SetEmbedding(nn.Module):
    r"""Summarise a set by a function that knows no order [1].

    .. math:: e(x_{1..n}) = \rho\left(\tfrac1n \textstyle\sum_i \phi(x_i), \log n\right)

    Sets of any size give summaries of the same size. Costs ``O(n)``.

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
            nn.Linear(input_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.together = nn.Sequential(
            nn.Linear(width + 1, width), nn.SiLU(), nn.Linear(width, output_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return summaries ``(*batch, output_dim)`` of sets ``(*batch, n, input_dim)``."""
        mean = self.each(x).mean(-2)
        log_size = torch.full_like(mean[..., :1], x.shape[-2]).log()
        return self.together(torch.cat([mean, log_size], -1))
