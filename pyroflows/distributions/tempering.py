"""Bases of another temperature."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import torch.distributions as td
from torch import nn

_FAMILIES = (td.Normal, td.StudentT, td.Laplace, td.Cauchy, td.MultivariateNormal)


class Tempered(nn.Module):
    """Give the distribution of a base with its scale multiplied by a temperature."""

    def __init__(self, base: nn.Module, temperature: float) -> None:
        super().__init__()
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {temperature}")
        self.base = base
        self.temperature = temperature

    def forward(self) -> td.Distribution:
        return _scaled(self.base(), self.temperature)


def _scaled(distribution: td.Distribution, factor: float) -> td.Distribution:
    if isinstance(distribution, td.Independent):
        inner = _scaled(distribution.base_dist, factor)
        return dist.Independent(inner, distribution.reinterpreted_batch_ndims)
    if not isinstance(distribution, _FAMILIES):
        names = ", ".join(family.__name__ for family in _FAMILIES)
        raise TypeError(
            f"only bases with a location and a scale have a temperature ({names}), got "
            f"{type(distribution).__name__}"
        )
    if factor == 0:
        return dist.Delta(distribution.mode, event_dim=len(distribution.event_shape))
    if isinstance(distribution, td.MultivariateNormal):
        return dist.MultivariateNormal(
            distribution.loc, scale_tril=factor * distribution.scale_tril, validate_args=False
        )
    scaled = copy.copy(distribution)
    scaled.scale = factor * distribution.scale
    return scaled
