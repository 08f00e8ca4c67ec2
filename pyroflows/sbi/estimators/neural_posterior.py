"""Posteriors by conditional flows."""

from __future__ import annotations

from typing import Any

from ..densities.flow_density import FlowDensity
from ..model.observations import ObservationSpace
from ..posteriors.posterior import Posterior
from .estimator import Estimator


class NeuralPosterior(Estimator[Posterior]):
    """Learn the posterior of a simulator's parameters by a conditional flow.

    Maximises the mean log-density of the simulated parameters given their observations [1]. Unlike
    flow matching it gives exact densities in one pass, at the price of a stiffer family.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs, embedding, device
        See :class:`FlowMatching`.
    **options
        ``flow``, the name of a registered flow, by default ``"spline_autoregressive"``, and options
        of that flow.

    References
    ----------
    [1] D. S. Greenberg, M. Nonnenmacher, J. H. Macke. Automatic posterior transformation for
        likelihood-free inference. `arXiv:1905.07488 <https://arxiv.org/abs/1905.07488>`_, 2019.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, torch
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = NeuralPosterior(simulator, flow="maf", num_layers=2)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> posterior.sample(100, x=torch.tensor(1.0))["theta"].shape
    torch.Size([100])
    """

    def density(self, dim: int, observations: ObservationSpace, num_pairs: int) -> Any:
        """Build the density to train."""
        return FlowDensity(dim, observations, self.embedding, **self.options)
