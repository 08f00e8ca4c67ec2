"""Flows of vectors as flows of images."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributions import constraints

from ..base import FlowTransform


class Flattened(FlowTransform):
    """Map arrays by a flow of vectors, which sees their entries in a row.

    Parameters
    ----------
    flow
        A flow of vectors of ``D`` entries.
    event_shape
        The shape of an array of ``D`` entries, such as ``(C, H, W)``.

    Raises
    ------
    ValueError
        If ``flow`` is no flow of vectors, or of another number of entries.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.transforms import permute
    >>> flow = Flattened(permute(12, range(12)), (3, 2, 2))
    >>> flow(torch.zeros(5, 3, 2, 2)).shape
    torch.Size([5, 3, 2, 2])
    """

    def __init__(self, flow: FlowTransform, event_shape: Iterable[int]) -> None:
        super().__init__(event_shape, flow.context_dim)
        if flow.event_shape != (self.event_shape.numel(),):
            raise ValueError(
                f"flow must map vectors of {self.event_shape.numel()} entries, as many as arrays "
                f"of shape {tuple(self.event_shape)} have, got one of event shape "
                f"{tuple(flow.event_shape)}"
            )
        self.flow = flow

    @property
    def domain(self) -> constraints.Constraint:
        return self._reshaped(self.flow.domain)

    @property
    def codomain(self) -> constraints.Constraint:
        return self._reshaped(self.flow.codomain)

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, log_det = self.flow.forward_and_log_det(self._flat(x), context)
        return y.unflatten(-1, self.event_shape), log_det

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = self.flow.inverse_and_log_det(self._flat(y), context)
        return x.unflatten(-1, self.event_shape), log_det

    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(-len(self.event_shape))

    def _reshaped(self, space: constraints.Constraint) -> constraints.Constraint:
        entry = space.base_constraint if isinstance(space, constraints.independent) else space
        return constraints.independent(entry, len(self.event_shape))
