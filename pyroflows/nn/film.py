"""Residual networks that a condition modulates layer by layer."""

from __future__ import annotations

import math
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-5

Block: TypeAlias = tuple[nn.Linear, nn.Linear, tuple[Tensor, Tensor, Tensor]]


class FiLMNetwork(nn.Module):
    r"""Map an input at a time, given a context, through residual blocks.

    The first layer sees the input and the context. Each block scales and shifts its normalised
    input by functions of the condition, a few numbers made of the time and the context [1, 2]:

    .. math:: h \leftarrow h + g \odot W_2\, s(W_1 [(1 + a) \odot \mathrm{norm}(h) + b]) .

    The output starts at zero. The condition may have fewer batch dimensions than the input: with
    one context for many inputs it is computed once.

    Parameters
    ----------
    input_dim
        Size of the input.
    output_dim
        Size of the output.
    context_dim
        Size of the context, 0 for none.
    width
        Number of units.
    num_blocks
        Number of blocks.
    condition_dim
        Size of the condition. The work of modulation, for each of a batch, is in proportion to it.
    num_frequencies
        Number of frequencies of the sines and cosines that stand for the time.
    dropout
        Share of units dropped in training.

    References
    ----------
    [1] E. Perez, F. Strub, H. de Vries, V. Dumoulin, A. Courville. FiLM: visual reasoning with a
        general conditioning layer. `arXiv:1709.07871 <https://arxiv.org/abs/1709.07871>`_, 2017.
    [2] W. Peebles, S. Xie. Scalable diffusion models with transformers.
        `arXiv:2212.09748 <https://arxiv.org/abs/2212.09748>`_, 2022.

    Examples
    --------
    >>> network = FiLMNetwork(2, 2, context_dim=3)
    >>> network(torch.randn(7, 2), torch.rand(7), torch.randn(3)).shape
    torch.Size([7, 2])
    """

    frequencies: Tensor
    ones: Tensor
    zeros: Tensor

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        context_dim: int = 0,
        width: int = 128,
        num_blocks: int = 3,
        condition_dim: int = 32,
        num_frequencies: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("frequencies", math.pi * torch.arange(1, num_frequencies + 1))
        # PyTorch's normalisation is vectorised only with a weight and a bias.
        self.register_buffer("ones", torch.ones(width), persistent=False)
        self.register_buffer("zeros", torch.zeros(width), persistent=False)
        self.input = nn.Linear(input_dim, width)
        self.input_context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.time = nn.Linear(2 * num_frequencies, width)
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.condition_hidden = nn.Linear(width, condition_dim)
        self.modulation = nn.Linear(condition_dim, 3 * width * num_blocks)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, output_dim)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        """Return outputs ``(*batch, output_dim)``; time and context broadcast to the batch."""
        modulations = self._modulations(time, context)
        hidden = self._first(x, context)
        blocks = zip(self.first, self.second, modulations, strict=True)
        in_place = not torch.is_grad_enabled()  # an eighth of the time of a draw
        for first, second, (scale, shift, gate) in blocks:
            inner = F.layer_norm(hidden, (self.width,), self.ones, self.zeros, LAYER_NORM_EPS)
            if in_place:
                inner = inner.mul_(1 + scale).add_(shift)
            else:
                inner = torch.addcmul(shift, inner, 1 + scale)
            update = second(self.dropout(F.silu(first(inner), inplace=in_place)))
            add = hidden.addcmul_ if in_place else hidden.addcmul
            hidden = add(1 + gate, update)
        return self.output(F.silu(hidden, inplace=in_place))

    def divergence(self, x: Tensor, time: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the trace of the Jacobian of the output in the input, shape ``(*batch,)``.

        For outputs as large as the input, and without dropout. Carries the derivatives along all
        ``D`` entries through the network at once: costs ``O(D)`` evaluations.
        """
        modulations = [
            [part.unsqueeze(-2) for part in parts] for parts in self._modulations(time, context)
        ]
        hidden = self._first(x, context).unsqueeze(-2)
        tangent = self.input.weight.T.contiguous().expand(*x.shape, self.width)
        for layers in zip(self.first, self.second, modulations, strict=True):
            first, second, (scale, shift, gate) = cast(Block, layers)
            normalised, slope = _layer_norm(hidden, tangent)
            inner = first(torch.addcmul(shift, normalised, 1 + scale))
            slope = F.linear(slope * (1 + scale), first.weight) * silu_slope(inner)
            hidden = torch.addcmul(hidden, 1 + gate, second(F.silu(inner)))
            tangent = torch.addcmul(tangent, 1 + gate, F.linear(slope, second.weight))
        return (tangent * silu_slope(hidden) * self.output.weight).sum((-1, -2))

    def _first(self, x: Tensor, context: Tensor | None) -> Tensor:
        hidden = self.input(x)
        return hidden if self.input_context is None else hidden + self.input_context(context)

    def _modulations(self, time: Tensor, context: Tensor | None) -> list[tuple[Tensor, ...]]:
        """Return scale, shift and gate of each block, ``(*batch, width)``."""
        angles = time.unsqueeze(-1) * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        if self.context is not None:
            condition = condition + self.context(context)
        condition = F.silu(self.condition_hidden(F.silu(condition)))
        all_parts = self.modulation(condition).unflatten(-1, (3 * len(self.first), self.width))
        # Gradients of slices are as large as what they are cut from; those of this are not.
        parts = all_parts.unbind(-2)
        return [parts[i : i + 3] for i in range(0, len(parts), 3)]


def _layer_norm(hidden: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return a normalised layer, and its derivative along tangents ``(*batch, D, width)``."""
    deviation = hidden - hidden.mean(-1, keepdim=True)
    rate = (deviation.square().mean(-1, keepdim=True) + LAYER_NORM_EPS).rsqrt()
    normalised = deviation * rate
    along = (tangent * normalised).mean(-1, keepdim=True)
    centred = tangent - tangent.mean(-1, keepdim=True)
    return normalised, torch.addcmul(centred, along, normalised, value=-1) * rate


def silu_slope(x: Tensor) -> Tensor:
    """Return the derivative of SiLU."""
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))
