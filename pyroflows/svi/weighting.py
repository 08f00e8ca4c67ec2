"""Draws from a guide, weighted against the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..distributions import Flow
from .density import CHUNK, ModelDensity


@torch.no_grad()
def weighted_draws(density: ModelDensity, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return draws ``(S, D)`` from the guide and their log-densities under model and guide."""
    parts = []
    for start in range(0, num_draws, CHUNK):
        z, log_q = draw(density, min(CHUNK, num_draws - start))
        parts.append((z, density(z), log_q))
    z, log_p, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    return z, log_p, log_q


def without_nan(log_weights: Tensor) -> Tensor:
    """Count draws where the model's density is NaN as draws of density zero."""
    return log_weights.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def draw(density: ModelDensity, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return draws ``(S, D)`` from the guide and their log-density under it."""
    posterior = density.guide.get_posterior(*density.args, **density.kwargs)
    if isinstance(posterior, Flow):
        return posterior.rsample_and_log_prob((num_draws,))
    z = posterior.sample((num_draws,))
    return z, posterior.log_prob(z)
