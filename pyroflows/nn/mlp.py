"""Networks that turn inputs and a context into the parameters of a flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .layout import batch_first, entries_first

# Activations whose gradient needs nothing but their own result.
_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: torch.relu_,
    nn.Sigmoid: torch.sigmoid_,
    nn.Tanh: torch.tanh_,
}
OUTPUT_INIT_SCALE = 0.01  # outputs start near zero, where every flow is the identity


class MLP(nn.Module):
    """Map an input and a context to outputs through fully connected layers.

    The context enters the first layer through weights of its own, so that it broadcasts against
    the batch shape of the input instead of being copied along it.

    Parameters
    ----------
    in_features
        Size of the input; 0 for a network of the context alone.
    out_features
        Size of the output. Outputs start near zero.
    hidden_dims
        Sizes of the hidden layers, at least one.
    context_dim
        Size of the context, 0 for none.
    activation
        A class of activation modules.

    Examples
    --------
    >>> network = MLP(3, 5, hidden_dims=(16,), context_dim=2)
    >>> network(torch.randn(7, 3), torch.randn(2)).shape
    torch.Size([7, 5])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_hidden_dims(hidden_dims)
        if in_features + context_dim < 1:
            raise ValueError("in_features and context_dim must not both be 0")
        width = hidden_dims[0]
        self.input: Any = nn.Linear(in_features, width) if in_features else None
        self.context: Any = (
            nn.Linear(context_dim, width, bias=not in_features) if context_dim else None
        )
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden_dims))
        self.output = nn.Linear(hidden_dims[-1], out_features)
        self.activation = activation()
        start_near_zero(self.output)

    def forward(self, x: Tensor | None, context: Tensor | None = None) -> Tensor:
        """Return outputs ``(*batch, out_features)``, with ``x`` of shape ``(*batch, in_features)``.

        Without an input, ``batch`` is that of the context.
        """
        source: Any = context if x is None else x
        batch_shape = source.shape[:-1]
        rows = None if x is None else entries_first(x)
        return batch_first(self.rows(rows, context, batch_shape), batch_shape)

    def rows(self, x: Any, context: Any, batch_shape: Sequence[int]) -> Tensor:
        """Return outputs ``(out_features, N)`` of inputs ``(in_features, N)``, a column an event.

        ``batch_shape``, of ``N`` elements, is what the batch shape of the context broadcasts to.
        """
        if self.input is None:
            outputs = self._outputs(entries_first(self.context(context)))
            return spread(batch_first(outputs, context.shape[:-1]), batch_shape)
        hidden = linear_rows(x, self.input.weight, self.input.bias)
        if self.context is not None:
            hidden = hidden + spread(self.context(context), batch_shape)
        return self._outputs(hidden)

    def _outputs(self, hidden: Tensor) -> Tensor:
        hidden = activate(self.activation, hidden)
        layer: Any
        for layer in self.hidden:
            hidden = activate(self.activation, linear_rows(hidden, layer.weight, layer.bias))
        return linear_rows(hidden, self.output.weight, self.output.bias)


def activate(activation: nn.Module, fresh: Tensor) -> Tensor:
    """Apply an activation to a tensor that nobody else holds, in place where that is safe.

    Training small networks spends more time on fresh memory than on arithmetic: in place, a step
    of a network of two layers of 64 units takes a fifth less. Traced programs keep clear of it:
    TorchScript mixes up what shares memory.
    """
    if torch.jit.is_tracing():
        return activation(fresh)
    return _IN_PLACE.get(type(activation), activation)(fresh)


def in_place(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function that applies an activation in place, for use without gradients."""
    return _IN_PLACE.get(type(activation), lambda x: x.copy_(activation(x)))


def linear_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to columns: ``(in_features, N)`` to ``(out_features, N)``.

    Element-wise flows work on whole planes of parameters, one plane per output: with this layout
    each plane is contiguous.
    """
    if torch.jit.is_tracing():  # TorchScript's rewriting of addmm mistakes the broadcast bias
        return torch.matmul(weight, rows) + bias.unsqueeze(-1)
    return torch.addmm(bias.unsqueeze(-1), weight, rows)


def spread(features: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """Broadcast features ``(*batch, F)`` to a batch shape of ``N`` elements: ``(F, N)``."""
    return entries_first(features.expand(*batch_shape, features.shape[-1]))


def start_near_zero(layer: nn.Linear) -> None:
    """Initialise a layer so that its outputs are small but its inputs receive gradients."""
    bound = OUTPUT_INIT_SCALE / layer.in_features**0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)


def check_hidden_dims(hidden_dims: Sequence[int]) -> None:
    """Raise ``ValueError`` unless there is at least one hidden layer and all sizes are positive."""
    if len(hidden_dims) == 0 or min(hidden_dims) < 1:
        raise ValueError(f"hidden_dims must hold at least one positive size, got {hidden_dims!r}")
