"""Velocity fields: networks of time, place and context, with their divergence in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .mlp import activate, check_hidden_dims, start_near_zero

# (t, x) -> velocity (N, D) and divergence (N,) at the points x (N, D).
VelocityAndDivergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Derivatives of activations, from what goes in and what comes out. What goes into a hyperbolic
# tangent may have been overwritten by what comes out.
_DERIVATIVES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.Tanh: lambda before, after: 1 - after * after,
    nn.Softplus: lambda before, after: before.sigmoid(),
    nn.SiLU: lambda before, after: torch.lerp(after, torch.ones_like(after), before.sigmoid()),
}


class VelocityField(nn.Module):
    r"""Give the velocity of points in a flow: :math:`v(t, x, c)`, a fully connected network.

    .. math:: v(t, x, c) = b_n + W_n \, \sigma(\ldots \sigma(b_1 + W_1 x + w t + C c) \ldots) .

    Parameters
    ----------
    input_dim
        Number of entries ``D`` of a point.
    hidden_dims
        Sizes of the hidden layers, at least one.
    context_dim
        Size of the context :math:`c`, 0 for none.
    activation
        A class of activation modules; the flow is as smooth as they are.

    Examples
    --------
    >>> field = VelocityField(3, hidden_dims=(16,), context_dim=2)
    >>> field(torch.tensor(0.5), torch.randn(7, 3), torch.randn(2)).shape
    torch.Size([7, 3])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: type[nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__()
        check_hidden_dims(hidden_dims)
        if input_dim < 1:
            raise ValueError(f"input_dim must be at least 1, got {input_dim}")
        if context_dim < 0:
            raise ValueError(f"context_dim must be at least 0, got {context_dim}")
        self.input = nn.Linear(input_dim, hidden_dims[0])
        self.time = nn.Linear(1, hidden_dims[0], bias=False)
        self.context = nn.Linear(context_dim, hidden_dims[0], bias=False) if context_dim else None
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden_dims))
        self.output = nn.Linear(hidden_dims[-1], input_dim)
        self.activation = activation()
        start_near_zero(self.output)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return velocities of the shape of ``x``, at one time ``t`` for all points."""
        hidden = self.input(x) + self.time(t.reshape(1))
        if self.context is not None:
            hidden = hidden + self.context(context)
        hidden = activate(self.activation, hidden)
        for layer in self.hidden:
            hidden = activate(self.activation, layer(hidden))
        return self.output(hidden)

    def with_divergence(self, context: Tensor | None = None) -> VelocityAndDivergence | None:
        r"""Return a function that evaluates the field and its divergence in closed form.

        With :math:`s_i = \sigma'` at the i-th hidden layer, the divergence
        :math:`\mathrm{tr}\,\partial v / \partial x` is

        .. math:: s_1 \cdot \mathrm{diag}(W_1 W_2), \qquad
            s_1^\top [(W_1 W_3) \circ W_2^\top] \, s_2

        for one and two hidden layers. The matrix in brackets is formed here, once: an evaluation
        costs one more product of the size of the hidden layers, whatever ``D``.

        Parameters
        ----------
        context
            Shape ``(context_dim,)`` or ``(N, context_dim)``.

        Returns
        -------
        Callable or None
            Maps a time and points ``(N, D)`` to velocities ``(N, D)`` and divergences ``(N,)``.
            ``None`` where there is no closed form: for more hidden layers, and activations other
            than ``Tanh``, ``Softplus`` and ``SiLU``.
        """
        derivative = _DERIVATIVES.get(type(self.activation))
        if derivative is None or len(self.hidden) > 1:
            return None
        shift = self.input.bias if self.context is None else self.input.bias + self.context(context)
        loop = self.input.weight @ self.output.weight
        between = next(self.hidden.parameters(), None)
        coupling = loop.diagonal() if between is None else loop * between.T

        def evaluate(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            before = torch.addmm(shift + t * self.time.weight[:, 0], x, self.input.weight.T)
            after = activate(self.activation, before)
            flux = derivative(before, after) @ coupling
            for layer in self.hidden:
                before = layer(after)
                after = activate(self.activation, before)
                flux = (flux * derivative(before, after)).sum(-1)
            return self.output(after), flux

        return evaluate
