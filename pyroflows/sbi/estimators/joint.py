"""Flow matching of parameters and observations together: any of them given any others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..densities.joint_flow_density import JointFlowDensity
from ..model.observations import ObservationSpace
from ..posteriors.joint_posterior import JointPosterior
from ..posteriors.velocity_posterior import VelocityPosterior
from .estimator import Estimator
from .flow_matching import size_for


class JointFlowMatching(Estimator[VelocityPosterior]):
    """Learn parameters and observations together: any of them given any others.

    One velocity field serves the posterior, the likelihood, the prior and whatever lies between:
    some parameters given others, or observations with missing entries. Observed sites are modelled
    as vectors of real numbers of the size the simulator gives them; plates are not exploited, and
    draws of observed sites may leave their supports. Costs of training and sampling are those of
    :class:`FlowMatching` with as many parameters as there are entries, ``O(D + V)`` per density.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`.
    device
        Where to train. Default: the CPU.
    **options
        Options of the network and the solver: ``width``, ``num_blocks``, ``dropout``,
        ``num_steps``, ``tolerance``, ``num_probes``; see :class:`FlowMatching`.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = JointFlowMatching(simulator)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> posterior.sample(100, x=torch.tensor(1.0))["theta"].shape
    torch.Size([100])
    >>> posterior.sample(100, given={"theta": torch.tensor(1.0)})["x"].shape
    torch.Size([100])
    """

    def __init__(
        self,
        simulator: Callable,
        observed: str | Collection[str] = "x",
        *,
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        super().__init__(
            simulator,
            observed,
            parameters=parameters,
            args=args,
            kwargs=kwargs,
            device=device,
        )
        self.options = options
        self.observations = ObservationSpace(self.observations.shapes)

    def density(self, dim: int, observations: ObservationSpace, num_pairs: int) -> JointFlowDensity:
        """Build the density to train."""
        return JointFlowDensity(dim, observations, **{**size_for(num_pairs), **self.options})

    def fit(self, *args: Any, **settings: Any) -> JointPosterior:
        """Train, and return what is learned as a posterior that takes any condition.

        Parameters
        ----------
        *args, **settings
            See :meth:`FlowMatching.fit`. Early stopping watches the posterior.
        """
        return JointPosterior.of(super().fit(*args, **settings))

    def load(self, path: str | Path) -> JointPosterior:
        """Read a posterior from a file, see :meth:`FlowMatching.load`."""
        return JointPosterior.of(super().load(path))
