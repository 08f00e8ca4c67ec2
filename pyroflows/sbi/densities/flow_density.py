"""Densities by conditional flows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import flows
from ...distributions import Flow
from ..model.observations import ObservationSpace
from .conditional import ConditionalDensity


class FlowDensity(ConditionalDensity):
    r"""Model parameters by a registered flow, conditioned on the summary of the observation.

    Parameters
    ----------
    dim, observations, embedding
        See :class:`ConditionalDensity`.
    flow
        Name of a registered flow.
    **options
        Options of the flow.
    """

    def __init__(
        self,
        dim: int,
        observations: ObservationSpace,
        embedding: nn.Module | None = None,
        flow: str = "spline_autoregressive",
        **options: Any,
    ) -> None:
        super().__init__(dim, observations, embedding)
        self.transform = flows.flow(flow, dim, self.context_dim, **options)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        return self.log_prob(z, x)

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        standard = self.standardizer(x)
        w = self.linear.whiten(z, self.features(standard))
        log_prob = Flow(None, self.transform).score(w, self.embedding(standard))
        return log_prob - self.linear.log_abs_det_jacobian(self.features(standard))

    @torch.no_grad()
    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        standard = self.standardizer(x)
        conditioned = Flow(None, self.transform).condition(self.embedding(standard))
        w = conditioned.sample(torch.Size([num_samples]))
        return self.linear.colour(w, self.features(standard))
