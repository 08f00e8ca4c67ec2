"""Activations that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Asinh(nn.Module):
    r"""Apply the inverse hyperbolic sine, :math:`\operatorname{asinh}(x)`.

    Near zero it is the identity, and far out it grows like a logarithm: a network of it goes on
    where one of ``Tanh`` has come to rest, without running away.

    Examples
    --------
    >>> Asinh()(torch.tensor([0.0, 1.0, 1000.0]))
    tensor([0.0000, 0.8814, 7.6009])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return values of the shape of ``x``."""
        return torch.asinh(x)
