"""Networks of which each entry of a vector has its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .film import silu_slope


class EntrywiseNetwork(nn.Module):
    r"""Map each entry of a vector, at a time and given a number of its own, to a number.

    .. math:: y_i = f_i(x_i, t, c_i) ,

    with a small residual network :math:`f_i` for each entry, all evaluated at once. The output
    starts at zero.

    Parameters
    ----------
    dim
        Number of entries ``D``.
    width
        Number of units of each of the networks.
    num_blocks
        Number of their residual layers.
    num_frequencies
        Number of frequencies of the sines and cosines that stand for the time.

    Examples
    --------
    >>> network = EntrywiseNetwork(3)
    >>> network(torch.randn(7, 3), torch.rand(7), torch.randn(3)).shape
    torch.Size([7, 3])
    """

    frequencies: Tensor

    def __init__(
        self, dim: int, width: int = 32, num_blocks: int = 3, num_frequencies: int = 4
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, num_frequencies + 1))
        self.input = EntrywiseLinear(dim, 2 + 2 * num_frequencies, width)
        self.blocks = nn.ModuleList(EntrywiseLinear(dim, width, width) for _ in range(num_blocks))
        self.output = EntrywiseLinear(dim, width, 1)
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Set all outputs to zero."""
        self.output.weight.zero_()
        self.output.bias.zero_()

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return outputs ``(*batch, D)``; time and context broadcast to the batch."""
        hidden = self._first(x, time, context)
        for block in self.blocks:
            hidden = hidden + F.silu(block(hidden))
        return _rows(self.output(F.silu(hidden)), x)

    def divergence(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return the trace of the Jacobian of the output in the input, shape ``(*batch,)``.

        Costs two evaluations, whatever ``D``: entries do not mix.
        """
        hidden = self._first(x, time, context)
        tangent = self.input.weight[:, :1]
        for block in self.blocks:
            assert isinstance(block, EntrywiseLinear)
            inner = block(hidden)
            hidden = hidden + F.silu(inner)
            tangent = tangent + silu_slope(inner) * (tangent @ block.weight)
        return _rows((tangent * silu_slope(hidden)) @ self.output.weight, x).sum(-1)

    def _first(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return what the first layer gives, ``(D, N, width)``.

        What it makes of times and contexts is made once for all inputs that these broadcast to.
        """
        own, given, of_time = self.input.weight.split([1, 1, 2 * len(self.frequencies)], 1)
        angles = time.unsqueeze(-1) * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        shift = torch.einsum("...f,dfw->...dw", waves, of_time) + self.input.bias.squeeze(1)
        shift = torch.addcmul(shift, context.unsqueeze(-1), given.squeeze(1))
        first = torch.addcmul(shift, x.unsqueeze(-1), own.squeeze(1))
        return first.reshape(-1, *own.shape[::2]).transpose(0, 1)


class EntrywiseLinear(nn.Module):
    """Apply to each entry an affine map of its own.

    Parameters
    ----------
    dim
        Number of entries ``D``.
    in_size, out_size
        Numbers of inputs and outputs of each map.

    Examples
    --------
    >>> EntrywiseLinear(3, 2, 5)(torch.randn(3, 7, 2)).shape
    torch.Size([3, 7, 5])
    """

    def __init__(self, dim: int, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_size, out_size))
        self.bias = nn.Parameter(torch.empty(dim, 1, out_size))
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -(in_size**-0.5), in_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(D, N, in_size)`` to ``(D, N, out_size)``."""
        return torch.baddbmm(self.bias, x, self.weight)


def _rows(output: Tensor, like: Tensor) -> Tensor:
    """Return one output for each entry, in the shape of the input."""
    return output.squeeze(-1).T.reshape(like.shape)
