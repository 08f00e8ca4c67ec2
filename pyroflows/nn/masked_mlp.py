"""The masked network of autoregressive flows, and its evaluation one input at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mlp import check_hidden_dims, features_first_linear, start_near_zero


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

        order = list(range(input_dim)) if order is None else list(order)
        rank = [order.index(entry) for entry in range(input_dim)]
        self.register_buffer("order", torch.tensor(order), persistent=False)
        sizes = [input_dim, *hidden_dims]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
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
        """Return parameters ``(*batch, P * D)``, plane by plane, laid out features first."""
        hidden = x
        for i, layer in enumerate(self.layers):
            hidden = F.linear(hidden, layer.weight * getattr(self, f"mask_{i}"), layer.bias)
            if i == 0 and self.context is not None:
                hidden = hidden + self.context(context)
            hidden = self.activation(hidden)
        return features_first_linear(hidden, self.output.weight * self.output_mask, self.output.bias)

    @torch.no_grad()
    def fill_in(
        self, solve: Callable[[slice, Tensor], Tensor], batch: int, context: Tensor | None = None
    ) -> Tensor:
        """Find the input whose entries solve an equation each, given the entries before them.

        Goes once through the entries in their order and evaluates each hidden unit once, as soon
        as all it sees is known: the arithmetic of all steps together is that of one forward pass.

        Parameters
        ----------
        solve
            Receives a slice of ranks and the parameters ``(P, n, batch)`` of those entries and
            returns the entries ``(n, batch)``.
        batch
            Number of vectors.
        context
            Shape ``(batch, context_dim)``.

        Returns
        -------
        Tensor
            Entries by rank, ``(D, batch)``.
        """
        dim, planes = self.input_dim, self.num_parameters
        weights = [layer.weight for layer in self.layers]
        weights[0] = weights[0][:, self.order]
        biases = [layer.bias.unsqueeze(-1) for layer in self.layers]
        if self.context is not None:
            biases[0] = biases[0] + self.context(context).T
        rows = torch.arange(planes * dim, device=self.order.device).view(planes, dim)
        rows = rows[:, self.order].T.flatten()
        output_weight, output_bias = self.output.weight[rows], self.output.bias[rows].unsqueeze(-1)

        x = output_weight.new_empty(dim, batch)
        hidden = [weight.new_empty(weight.shape[0], batch) for weight in weights]
        for ranks, units in self._steps():
            seen, num_seen = x, ranks.start
            for weight, bias, values, new in zip(weights, biases, hidden, units, strict=True):
                if new.stop > new.start:
                    values[new] = self.activation(
                        torch.addmm(bias[new], weight[new, :num_seen], seen[:num_seen])
                    )
                seen, num_seen = values, new.stop
            new_rows = slice(ranks.start * planes, ranks.stop * planes)
            parameters = torch.addmm(
                output_bias[new_rows], output_weight[new_rows, :num_seen], seen[:num_seen]
            )
            parameters = parameters.view(ranks.stop - ranks.start, planes, batch).transpose(0, 1)
            x[ranks] = solve(ranks, parameters)
        return x

    def _steps(self) -> Iterator[tuple[slice, list[slice]]]:
        """Yield the ranks to fill in at each step and the hidden units they newly enable."""
        counts = [
            [sum(degree < rank for degree in layer) for layer in self.degrees]
            for rank in range(self.input_dim)
        ]
        enabled = [0] * len(self.degrees)
        start = 0
        while start < self.input_dim:
            stop = start + 1
            while stop < self.input_dim and counts[stop] == counts[start]:
                stop += 1
            yield slice(start, stop), [slice(*pair) for pair in zip(enabled, counts[start])]
            start, enabled = stop, counts[start]


def _spread(lowest: int, highest: int, count: int) -> list[int]:
    """Return ``count`` degrees spread evenly over a range, sorted, the ends included."""
    return [lowest + round(i * (highest - lowest) / max(count - 1, 1)) for i in range(count)]


def _mask(seeing: Sequence[int], seen: Sequence[int], strict: bool) -> Tensor:
    column, row = torch.tensor(seeing).unsqueeze(-1), torch.tensor(seen)
    mask = column > row if strict else column >= row
    return mask.to(torch.get_default_dtype())
