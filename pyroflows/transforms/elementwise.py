"""The elementwise flow: each entry mapped by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..nn import MLP
from ..nn.mlp import spread
from .base import FlowTransform
from .layout import batch_first, entries_first, parameter_planes, sum_entries
from .scalar import ScalarBijection
from .spline import Spline


class Elementwise(FlowTransform):
    r"""Map each entry by a scalar bijection of its own: :math:`y_d = g(x_d; \theta_d)`.

    The parameters :math:`\theta_d` are learned; with a context :math:`c` they are the output of a
    network, :math:`\theta = \theta(c)`. One pass in both directions.

    Parameters
    ----------
    bijection
        What to do to each entry, for instance ``Spline()``.
    input_dim
        Number of entries ``D``.
    context_dim
        Size of the context, 0 for none.
    hidden_dims
        Sizes of the hidden layers of the network of the context.
    activation
        A class of activation modules for the network of the context.

    Examples
    --------
    >>> from pyroflows.transforms import Affine
    >>> flow = Elementwise(Affine(), 3)
    >>> flow(torch.ones(3))
    tensor([1., 1., 1.], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        bijection: ScalarBijection,
        input_dim: int,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (64, 64),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(input_dim, context_dim)
        self.bijection = bijection
        size = bijection.num_parameters * input_dim
        if context_dim:
            self.network = MLP(0, size, hidden_dims, context_dim, activation)
        else:
            self.parameter = nn.Parameter(torch.zeros(size))

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(self.bijection.domain, 1)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.forward, x, context)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._apply_bijection(self.bijection.inverse, y, context)

    def _apply_bijection(
        self, direction: Callable, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch_shape = x.shape[:-1]
        if context is None:
            parameters = spread(self.parameter, batch_shape)
        else:
            parameters = self.network.rows(None, context, batch_shape)
        y, log_derivative = direction(
            entries_first(x), parameter_planes(parameters, self.bijection.num_parameters)
        )
        return batch_first(y, batch_shape), sum_entries(log_derivative, batch_shape)

    def extra_repr(self) -> str:
        return f"{self.bijection}, {super().extra_repr()}"


def spline(input_dim: int, count_bins: int = 8, bound: float = 3.0) -> Elementwise:
    """Build an elementwise rational-quadratic spline, with Pyro's signature.

    Examples
    --------
    >>> spline(10)(torch.zeros(10)).shape
    torch.Size([10])
    """
    return Elementwise(Spline(count_bins, bound), input_dim)


def conditional_spline(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    count_bins: int = 8,
    bound: float = 3.0,
    **options: Any,
) -> Elementwise:
    """Build an elementwise rational-quadratic spline with a context, with Pyro's signature.

    Examples
    --------
    >>> conditional_spline(10, 3).condition(torch.ones(3))(torch.zeros(10)).shape
    torch.Size([10])
    """
    hidden_dims = (input_dim * 10, input_dim * 10) if hidden_dims is None else hidden_dims
    return Elementwise(Spline(count_bins, bound), input_dim, context_dim, hidden_dims, **options)
