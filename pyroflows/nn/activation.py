"""Activations that torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STEEPNESS = 2.0


class Asinh(nn.Module):
    r"""Apply :math:`\operatorname{asinh}(2 x) / 2`, with the inverse hyperbolic sine.

    Around zero it bends like a hyperbolic tangent, and far out it grows like a logarithm: a network
    of it goes on where one of ``Tanh`` has come to rest, without running away.

    Examples
    --------
    >>> Asinh()(torch.tensor([0.0, 1.0, 1000.0]))
    tensor([0.0000, 0.7218, 4.1470])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return values of the shape of ``x``."""
        return torch.asinh(STEEPNESS * x) / STEEPNESS
