"""Densities by conditional flows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import flows
from ...distributions import Flow
from ..model.observations import ObservationSpace
from .conditional import ConditionalDensity

CHUNK = 1024  # draws at a time: what fits in the caches is several times faster


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
        size = max(1, CHUNK // max(1, x.shape[: -self.event_dim].numel()))
        parts = [
            conditioned.sample(torch.Size([min(size, num_samples - start)]))
            for start in range(0, num_samples, size)
        ]
        return self.linear.colour(torch.cat(parts), self.features(standard))
