"""Flows in a row."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .base import FlowTransform


class Compose(FlowTransform):
    r"""Apply several flows in a row.

    :math:`f = f_L \circ \dots \circ f_1`; the inverse goes through the parts in the opposite order
    and log-determinants add up. Parts without a context ignore the one given to the whole.

    Parameters
    ----------
    parts
        Flows of equal event shape; those that are conditional must agree in ``context_dim``.

    Raises
    ------
    ValueError
        If there are no parts, or they disagree in shape or context.

    Examples
    --------
    >>> from pyroflows.transforms import Permutation
    >>> flow = Compose([Permutation([1, 0]), Permutation([1, 0])])
    >>> len(flow), flow(torch.tensor([1.0, 2.0]))
    (2, tensor([1., 2.]))
    """

    def __init__(self, parts: Iterable[FlowTransform], cache_size: int = 1) -> None:
        parts = list(parts)
        if not parts:
            raise ValueError("parts must hold at least one flow, got none")
        shapes = {tuple(part.event_shape) for part in parts}
        contexts = {part.context_dim for part in parts} - {0}
        if len(shapes) > 1:
            raise ValueError(f"parts must agree in event_shape, got {sorted(shapes)}")
        if len(contexts) > 1:
            raise ValueError(f"parts must agree in context_dim, got {sorted(contexts)}")
        super().__init__(parts[0].event_shape, max(contexts, default=0), cache_size)
        self.parts = nn.ModuleList(parts)

    @property
    def domain(self) -> constraints.Constraint:
        return self[0].domain

    @property
    def codomain(self) -> constraints.Constraint:
        return self[-1].codomain

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in self:
            x, log_det = part.forward_and_log_det(x, context if part.context_dim else None)
            log_dets.append(log_det)
        return x, functools.reduce(torch.add, log_dets)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        log_dets = []
        for part in reversed(list(self)):
            y, log_det = part.inverse_and_log_det(y, context if part.context_dim else None)
            log_dets.append(log_det)
        return y, functools.reduce(torch.add, log_dets)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[FlowTransform]:
        return iter(cast(Iterable[FlowTransform], self.parts))

    def __getitem__(self, index: int | slice) -> FlowTransform:
        parts = list(self)
        return Compose(parts[index]) if isinstance(index, slice) else parts[index]
