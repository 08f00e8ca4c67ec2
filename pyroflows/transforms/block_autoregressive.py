"""Block autoregression: a monotone network whose weights are block triangular."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import BlockLinear, Hypernetwork
from ..nn.mlp import OUTPUT_INIT_SCALE, spread
from .base import FlowTransform
from .layout import batch_first, check_order, entries_first, sum_entries
from .solve import solve_increasing, with_implicit_gradient

_BIAS_SPREAD = 2.0  # the first hidden units of an entry bend at different places


class BlockAutoregressive(FlowTransform):
    r"""Add to each entry a bounded increasing function of it that depends on earlier entries.

    .. math:: y_d = e^{s_d} x_d + g_d(x_d; x_{<d}), \qquad
        \log|\det J| = \textstyle\sum_d \log\big(e^{s_d} + \partial g_d / \partial x_d\big) .

    All :math:`g_d` come from one network, in whose hidden layers :math:`l` each entry has
    :math:`h_l` units of its own. They see the units of their own entry through positive weights
    and those of earlier entries through free ones:

    .. math:: a^l_d = \tanh\Big(e^{W^l_{dd}} a^{l-1}_d + \sum_{e<d} W^l_{de} a^{l-1}_e
        + b^l_d\Big), \qquad a^0 = x,

    and :math:`g` is one more such layer without the tanh. The linear term makes the flow map onto
    all vectors; without it, as in [1], bounded units reach a box only.

    The forward map takes one pass, ``O(D^2 h^2)`` per vector. The inverse goes through the entries
    one by one and solves an increasing equation in each; only the entry's own units, ``O(h^2)``,
    take part in the iteration, so that all else together is the arithmetic of one pass. Since
    tanh is bounded, each solution has a bracket. Gradients of the inverse are those of the
    implicit function.

    Parameters
    ----------
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context :math:`c`, 0 for none: :math:`s(c)` and all biases :math:`b(c)` depend
        on it.
    hidden_factors
        Numbers of units per entry :math:`h_l` of the hidden layers, at least one.
    order
        Entries in the order in which they depend on each other. Default: as they are.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.

    Raises
    ------
    ValueError
        If ``order`` is no permutation, or ``hidden_factors`` is empty or holds a number below 1.
    ConvergenceError
        By the inverse, if an equation is not solved, as for weights or inputs that are not finite.

    References
    ----------
    [1] N. De Cao, I. Titov, W. Aziz. Block neural autoregressive flow.
        `arXiv:1904.04676 <https://arxiv.org/abs/1904.04676>`_, 2019.

    Examples
    --------
    >>> flow = BlockAutoregressive(10)
    >>> x = torch.randn(100, 10)
    >>> bool(torch.allclose(flow.inv(flow(x)), x, atol=1e-5))
    True
    """

    order: Tensor
    rank: Tensor

    def __init__(
        self,
        input_dim: int,
        context_dim: int = 0,
        hidden_factors: Sequence[int] = (8, 8),
        order: Sequence[int] | None = None,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(input_dim, context_dim)
        if len(hidden_factors) == 0 or min(hidden_factors) < 1:
            raise ValueError(
                f"hidden_factors must hold at least one positive size, got {hidden_factors!r}"
            )
        self.register_buffer("order", torch.tensor(check_order(order, input_dim)), persistent=False)
        self.register_buffer("rank", self.order.argsort(), persistent=False)
        self.hidden = nn.ModuleList(
            BlockLinear(input_dim, *pair) for pair in pairwise((1, *hidden_factors))
        )
        self.output = BlockLinear(input_dim, hidden_factors[-1], 1, OUTPUT_INIT_SCALE)
        self._sizes = [input_dim * factor for factor in (*hidden_factors, 1, 1)]
        biases = [
            torch.empty(size).uniform_(-_BIAS_SPREAD, _BIAS_SPREAD) for size in self._sizes[:-2]
        ]
        initial = torch.cat([*biases, torch.zeros(2 * input_dim)])
        self.biases = Hypernetwork(initial, context_dim, hidden_dims, activation)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch_shape = x.shape[:-1]
        rows = entries_first(x).index_select(0, self.order)
        *biases, log_scale = self._rows_of_biases(batch_shape, context)
        scale = log_scale.exp()
        units, slope = rows.unsqueeze(1), rows.new_ones(1, 1)
        for i, ((own, earlier), bias) in enumerate(zip(self._blocks(), biases)):
            if i:
                units, slope = _bend(units, slope)
            seen = torch.addmm(bias, earlier, units.flatten(0, 1))
            units = torch.baddbmm(seen.view(*own.shape[:2], -1), own, units)
            slope = own @ slope
        y = torch.addcmul(units.squeeze(1), rows, scale).index_select(0, self.rank)
        log_slope = (slope.squeeze(1) + scale).log()
        return batch_first(y, batch_shape), sum_entries(log_slope, batch_shape)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch_shape = y.shape[:-1]
        rows = entries_first(y).index_select(0, self.order)
        *biases, log_scale = self._rows_of_biases(batch_shape, context)
        blocks, scale = self._blocks(), log_scale.exp()
        # What the units of the entries still to come see of those that are known.
        seen = [bias.expand(-1, rows.shape[1]) for bias in biases]
        solution, slopes = [], []
        for rank, target in enumerate(rows.split(1)):
            here, seen = self._split_first(seen, self.event_shape[0] - rank - 1)
            entry = _Entry([own[rank] for own, _ in blocks], here, scale[rank])
            x = entry.solve(target)
            units, _, slope = entry.evaluate(x)
            seen = [
                torch.addmm(others, layer.seen_by_later(earlier, rank), own_units)
                for others, layer, (_, earlier), own_units in zip(seen, self._layers, blocks, units)
            ]
            solution.append(x)
            slopes.append(slope)
        x = torch.cat(solution).index_select(0, self.rank)
        return batch_first(x, batch_shape), sum_entries(-torch.cat(slopes).log(), batch_shape)

    @property
    def _layers(self) -> tuple[BlockLinear, ...]:
        return (*cast(Iterable[BlockLinear], self.hidden), self.output)

    def _blocks(self) -> list[tuple[Tensor, Tensor]]:
        return [layer.blocks() for layer in self._layers]

    def _split_first(self, rows: Sequence[Tensor], later: int) -> tuple[list[Tensor], list[Tensor]]:
        """Split the units of all layers into those of one entry and those of ``later`` entries."""
        sizes = [layer.out_size for layer in self._layers]
        parts = [r.split([size, later * size]) for r, size in zip(rows, sizes)]
        return [first for first, _ in parts], [others for _, others in parts]

    def _rows_of_biases(self, batch_shape: torch.Size, context: Tensor | None) -> list[Tensor]:
        """Return the biases of all layers and the log-scales, ``(size, N)`` or ``(size, 1)``."""
        biases = self.biases(context)
        rows = entries_first(biases) if context is None else spread(biases, batch_shape)
        return list(rows.split(self._sizes))


class _Entry:
    """The increasing function that one entry goes through, all earlier entries being known."""

    def __init__(self, own: Sequence[Tensor], seen: Sequence[Tensor], scale: Tensor) -> None:
        self.own, self.seen, self.scale = own, seen, scale

    def evaluate(self, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the units before each layer, the value and the slope."""
        units: list[Tensor] = []
        value, slope = x, x.new_ones(1, 1)
        for own, seen in zip(self.own, self.seen):
            if units:
                value, slope = _bend(value, slope)
            units.append(value)
            value = torch.addmm(seen, own, value)
            slope = own @ slope
        return units, torch.addcmul(value, x, self.scale), slope + self.scale

    def solve(self, y: Tensor) -> Tensor:
        """Return where the function takes the value ``y``, with its gradient."""
        bound = self.own[-1].sum()
        center = y - self.seen[-1]
        lower, upper = (center - bound) / self.scale, (center + bound) / self.scale
        x = solve_increasing(lambda x: self.evaluate(x)[1:], y, lower, upper).detach()
        _, value, slope = self.evaluate(x)
        return with_implicit_gradient(x, value, slope, y)


def _bend(value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Apply tanh to units and the chain rule to their slopes."""
    bent = torch.tanh(value)
    return bent, torch.addcmul(slope, slope, bent.square(), value=-1)


def block_autoregressive(
    input_dim: int, hidden_factors: Sequence[int] = (8, 8), **options: Any
) -> BlockAutoregressive:
    """Build a block autoregressive flow.

    Examples
    --------
    >>> block_autoregressive(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return BlockAutoregressive(input_dim, 0, hidden_factors, **options)


def conditional_block_autoregressive(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    hidden_factors: Sequence[int] = (8, 8),
    **options: Any,
) -> BlockAutoregressive:
    """Build a block autoregressive flow with a context.

    Examples
    --------
    >>> conditional_block_autoregressive(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return BlockAutoregressive(
        input_dim, context_dim, hidden_factors, hidden_dims=hidden_dims, **options
    )
