"""A flow in the units of the data."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from ..transforms import FlowTransform
from .bases import floating_tensor_of, innermost


class Standardized(FlowTransform):
    r"""Let a flow see data and contexts in units of their own: :math:`y = m + s f(x; (c - a) / b)`.

    Parameters
    ----------
    flow
        The flow :math:`f`.
    loc, scale
        Mean :math:`m` and standard deviation :math:`s` of the data, of the flow's event shape.
        Default: 0 and 1.
    context_loc, context_scale
        Mean :math:`a` and standard deviation :math:`b` of the contexts, shape ``(context_dim,)``.
        Default: 0 and 1.

    Examples
    --------
    >>> from pyroflows.transforms import Permutation
    >>> flow = Standardized(Permutation([1, 0]), torch.ones(2), torch.tensor([2.0, 10.0]))
    >>> flow(torch.tensor([3.0, 4.0]))
    tensor([ 9., 31.])
    """

    loc: Tensor
    scale: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(
        self,
        flow: FlowTransform,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        super().__init__(flow.event_shape, flow.context_dim)
        self.flow = flow
        like = floating_tensor_of(flow)
        self._hold("loc", loc, like.new_zeros(self.event_shape))
        self._hold("scale", scale, like.new_ones(self.event_shape))
        self._hold("context_loc", context_loc, like.new_zeros(self.context_dim))
        self._hold("context_scale", context_scale, like.new_ones(self.context_dim))

    def _hold(self, name: str, value: Tensor | None, default: Tensor) -> None:
        self.register_buffer(name, default if value is None else value.to(default))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self.flow.forward_and_log_det(x, self.standard_context(context))
        return self.loc + self.scale * y, log_det + self.scale.log().sum()

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = self.flow.inverse_and_log_det(self.standard(y), self.standard_context(context))
        return x, log_det - self.scale.log().sum()

    def standard(self, y: Tensor) -> Tensor:
        """Return data in the units of the flow."""
        return (y - self.loc) / self.scale

    def standard_context(self, context: Tensor | None) -> Tensor | None:
        """Return a context in the units of the flow."""
        return None if context is None else (context - self.context_loc) / self.context_scale


def standardized(flow: FlowTransform, data: Tensor, context: Tensor | None) -> FlowTransform:
    """Return the flow in the units of rows of data; itself if it has units, or its own space."""
    if isinstance(flow, Standardized) or innermost(flow.codomain) is not constraints.real:
        return flow
    moments = [*_moments(data), *([] if context is None else _moments(context))]
    return Standardized(flow, *moments).train(flow.training)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    deviation, mean = torch.std_mean(rows.double(), dim=0)
    # What does not vary, as a context may, is only shifted.
    return mean, torch.where(deviation > 0, deviation, 1.0)
