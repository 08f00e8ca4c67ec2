"""Networks of residual blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualMLP(nn.Module):
    r"""Map vectors to vectors through residual blocks [1].

    .. math:: h \leftarrow h + W_2\, s(W_1\, s(h))

    Parameters
    ----------
    in_features
        Size of the input.
    out_features
        Size of the output.
    width
        Number of units.
    num_blocks
        Number of blocks.

    References
    ----------
    [1] K. He, X. Zhang, S. Ren, J. Sun. Identity mappings in deep residual networks.
        `arXiv:1603.05027 <https://arxiv.org/abs/1603.05027>`_, 2016.

    Examples
    --------
    >>> import torch
    >>> ResidualMLP(3, 5)(torch.randn(7, 3)).shape
    torch.Size([7, 5])
    """

    def __init__(
        self, in_features: int, out_features: int, width: int = 128, num_blocks: int = 2
    ) -> None:
        super().__init__()
        self.input = nn.Linear(in_features, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.output = nn.Linear(width, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs ``(*batch, out_features)``."""
        hidden = self.input(x)
        for first, second in zip(self.first, self.second, strict=True):
            hidden = hidden + second(F.silu(first(F.silu(hidden))))
        return self.output(F.silu(hidden))
