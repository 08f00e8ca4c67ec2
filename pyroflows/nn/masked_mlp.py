"""The masked network of autoregressive flows, and its evaluation one input at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .layout import batch_first, entries_first
from .mlp import activate, check_hidden_dims, in_place, linear_rows, spread, start_near_zero
from .steps import blocks_forwards, least_overhead

# With the block's own units, 8 steps keep the small products as cheap as their overhead.
_STEPS_PER_BLOCK = 8


class MaskedMLP(nn.Module):
    r"""Map a vector to parameters, those of each entry depending on earlier entries only.

    Each entry has a rank, its place in the order. Each hidden unit has a degree :math:`k`: it sees
    entries of rank at most :math:`k` and is seen by parameters of entries of rank above
    :math:`k`. Hidden units are sorted by degree, which makes the masks block triangular.

    Parameters
    ----------
    input_dim
        Number of entries :math:`D`, at least 2 unless there is a context.
    num_parameters
        Number of parameters :math:`P` per entry.
    hidden_dims
        Sizes of the hidden layers, at least one.
    context_dim
        Size of a context seen by all parameters, 0 for none.
    order
        Entries by rank: ``order[r]`` is the entry that comes r-th. Default: as they are.
    activation
        A class of activation modules.

    References
    ----------
    [1] M. Germain, K. Gregor, I. Murray, H. Larochelle. MADE: Masked autoencoder for distribution
        estimation. `arXiv:1502.03509 <https://arxiv.org/abs/1502.03509>`_, 2015.

    Examples
    --------
    >>> network = MaskedMLP(4, num_parameters=2, hidden_dims=(16, 16))
    >>> network(torch.randn(7, 4)).shape
    torch.Size([7, 8])
    """

    order: Tensor
    rank: Tensor
    output_mask: Tensor

    def __init__(
        self,
        input_dim: int,
        num_parameters: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        order: Sequence[int] | None = None,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_hidden_dims(hidden_dims)
        if input_dim < 2 and not context_dim:
            raise ValueError(f"input_dim must be at least 2 without a context, got {input_dim}")
        self.input_dim = input_dim
        self.num_parameters = num_parameters
        # With a context, units of degree -1 carry it to the entry that comes first.
        lowest = -1 if context_dim else 0
        self.degrees = [_spread(lowest, input_dim - 2, width) for width in hidden_dims]
        self._blocks = blocks_forwards(self.degrees, input_dim, num_parameters, _STEPS_PER_BLOCK)

        order = list(range(input_dim)) if order is None else list(order)
        rank = [order.index(entry) for entry in range(input_dim)]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("rank", torch.tensor(rank), persistent=False)
        sizes = [input_dim, *hidden_dims]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.context = nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        self.output = nn.Linear(hidden_dims[-1], num_parameters * input_dim)
        self.activation = activation()
        start_near_zero(self.output)

        above = [rank, *self.degrees]
        for i, (seen, seeing) in enumerate(zip(above[:-1], self.degrees, strict=True)):
            self.register_buffer(f"mask_{i}", _mask(seeing, seen, strict=False), persistent=False)
        output_mask = _mask(rank, self.degrees[-1], strict=True).repeat(num_parameters, 1)
        self.register_buffer("output_mask", output_mask, persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return parameters ``(*batch, P * D)``, plane by plane."""
        batch_shape = x.shape[:-1]
        return batch_first(self.rows(entries_first(x), context, batch_shape), batch_shape)

    def rows(self, x: Tensor, context: Tensor | None, batch_shape: Sequence[int]) -> Tensor:
        """Return parameters ``(P * D, N)`` of inputs ``(D, N)``, a column an event.

        ``batch_shape``, of ``N`` elements, is what the batch shape of the context broadcasts to.
        """
        hidden = x
        for i, (layer, mask) in enumerate(self._masked_layers()):
            hidden = linear_rows(hidden, layer.weight * mask, layer.bias)
            if i == 0 and self.context is not None:
                hidden = hidden + spread(self.context(context), batch_shape)
            hidden = activate(self.activation, hidden)
        return linear_rows(hidden, self.output.weight * self.output_mask, self.output.bias)

    def weights_by_rank(self) -> list[Tensor]:
        """Return the masked weights of all layers, for entries by rank.

        The parameters of an entry are together: the outputs are ``(D, P)``, flattened.
        """
        first, *others = [layer.weight * mask for layer, mask in self._masked_layers()]
        output = self._outputs_by_rank(self.output.weight * self.output_mask)
        return [first.index_select(1, self.order), *others, output]

    def biases_by_rank(self, context: Tensor | None, batch_shape: Sequence[int]) -> list[Tensor]:
        """Return the biases of all layers as columns, in the order of :meth:`weights_by_rank`.

        The first includes what the context contributes, which is broadcast to a batch shape of
        ``N`` elements: ``(units, N)``.
        """
        biases = [layer.bias.unsqueeze(-1) for layer, _ in self._masked_layers()]
        if self.context is not None:
            biases[0] = biases[0] + spread(self.context(context), batch_shape)
        return [*biases, self._outputs_by_rank(self.output.bias.unsqueeze(-1))]

    def fill_in(
        self,
        solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        y: Tensor,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Find the input whose entries solve an equation each, given the entries before them.

        Goes once through the entries in their order and evaluates each hidden unit once, as soon
        as all it sees is known: the arithmetic of all steps together is that of one forward pass.
        Records no gradients.

        Parameters
        ----------
        solve
            Receives ``n`` entries of ``y``, ``(n, N)``, and the parameters ``(P, n, N)`` of these
            entries; returns the entries of the solution and their log-derivatives.
        y
            Right-hand sides, ``(D, N)``.
        context
            Shape ``(N, context_dim)``.

        Returns
        -------
        Tensor
            The solution, ``(D, N)``.
        Tensor
            The sums of its log-derivatives, ``(N,)``.
        """
        # What is computed from the results of inference mode is ordinary again.
        with least_overhead():
            x, log_derivatives = self._fill_in_by_rank(
                solve, y.index_select(0, self.order), self._memory(y.shape[1], context)
            )
        with torch.no_grad():
            return x.index_select(0, self.rank), torch.cat(log_derivatives).sum(0)

    def _fill_in_by_rank(
        self,
        solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        y: Tensor,
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        # What earlier blocks of steps contribute comes in one product per block, because products
        # of few rows spend their time on reading; tensors are cut into the pieces of a block's
        # steps at once, because slices cost as much as arithmetic. Masks hide what is not known.
        apply_activation = in_place(self.activation)
        weights = self.weights_by_rank()
        x, outputs = values[0], values[-1]
        parameters = outputs.view(self.input_dim, self.num_parameters, -1).transpose(0, 1)
        log_derivatives = []
        for block in self._blocks:
            layers = []
            for i, ((known, _), (rows, sizes)) in enumerate(pairwise(block)):
                seen, new, weight = values[i], values[i + 1][rows], weights[i][rows]
                if known.start:
                    new.addmm_(weight[:, : known.start], seen[: known.start])
                layers.append((new.split(sizes), weight[:, known].split(sizes), seen[known]))
            *hidden, (new_outputs, output_weights, last_hidden) = layers
            ranks, sizes = block[0]
            pieces = [x[ranks].split(sizes), y[ranks].split(sizes)]
            pieces.append(parameters[:, ranks].split(sizes, dim=1))
            for step, (solution, target, planes) in enumerate(zip(*pieces)):
                for new, weight, seen in hidden:
                    apply_activation(new[step].addmm_(weight[step], seen))
                new_outputs[step].addmm_(output_weights[step], last_hidden)
                solved, log_derivative = solve(target, planes)
                solution.copy_(solved)
                log_derivatives.append(log_derivative)
        return x, log_derivatives

    def _memory(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Return memory for inputs, hidden units and outputs, the latter two filled with biases."""
        biases = self.biases_by_rank(context, (batch,))
        x = biases[-1].new_zeros(self.input_dim, batch)
        return [x, *(bias.new_empty(len(bias), batch).copy_(bias) for bias in biases)]

    def _masked_layers(self) -> Iterator[tuple[Any, Tensor]]:
        for i, layer in enumerate(self.layers):
            yield layer, getattr(self, f"mask_{i}")

    def _outputs_by_rank(self, rows: Tensor) -> Tensor:
        planes = rows.unflatten(0, (self.num_parameters, self.input_dim))
        return planes.transpose(0, 1).index_select(0, self.order).flatten(0, 1)


def _spread(lowest: int, highest: int, count: int) -> list[int]:
    """Return ``count`` degrees spread evenly over a range, sorted, the ends included."""
    return [lowest + round(i * (highest - lowest) / max(count - 1, 1)) for i in range(count)]


def _mask(seeing: Sequence[int], seen: Sequence[int], strict: bool) -> Tensor:
    column, row = torch.tensor(seeing).unsqueeze(-1), torch.tensor(seen)
    mask = column > row if strict else column >= row
    return mask.to(torch.get_default_dtype())
