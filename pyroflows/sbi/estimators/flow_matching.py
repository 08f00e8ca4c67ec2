"""Posteriors by flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..densities.flow_matching_density import FlowMatchingDensity
from ..densities.straight_density import StraightDensity
from ..densities.velocity_density import VelocityDensity
from ..model.observations import ObservationSpace
from ..posteriors.velocity_posterior import STRAIGHT, VelocityPosterior
from .estimator import Estimator


class FlowMatching(Estimator[VelocityPosterior]):
    """Learn the posterior of a simulator's parameters by flow matching.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`.
    embedding
        A module that summarises one observation. Default: the observation itself, or a permutation
        invariant network for observations in a plate. See :class:`SeriesEmbedding`,
        :class:`ImageEmbedding`.
    missing
        Why entries of observations, NaN, may be missing: ``"random"``, any of them and without
        regard to the values, for which training hides some at random; or ``"simulated"``, where the
        simulator itself says so. Default: none may.
    min_size
        The smallest number of elements of a plate that observations may have, up to the size of
        the plate: training sees random subsets. Default: the size of the plate, for all.
    device
        Where to train. Default: the CPU.
    **options
        Options of :class:`FlowMatchingDensity`: ``width``, ``num_blocks``, ``dropout``,
        ``time_sampling``, ``coupling``, ``condition_weight``, ``marginals``, ``mixed_precision``,
        ``num_steps``, ``tolerance``, ``num_probes``.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = FlowMatching(simulator)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> posterior.sample(100, x=torch.tensor(1.0))["theta"].shape
    torch.Size([100])
    """

    _posterior_type = VelocityPosterior

    def density(
        self, dim: int, observations: ObservationSpace, num_pairs: int
    ) -> FlowMatchingDensity:
        """Build the density to train."""
        options = {**size_for(num_pairs), **self.options}
        return FlowMatchingDensity(dim, observations, self.embedding, **options)

    def _saved_density(self, about: Mapping[str, Any]) -> VelocityDensity:
        density = self.density(self.space.dim, self.observations, about["num_pairs"])
        if STRAIGHT in about:
            return StraightDensity(density, self.observations, about[STRAIGHT])
        return density


def size_for(num_pairs: int) -> dict[str, Any]:
    """Return the size of network that so many pairs can bear."""
    if num_pairs < 3000:
        return {"width": 64, "num_blocks": 2, "dropout": 0.1}
    return {"width": 128, "num_blocks": 3}
