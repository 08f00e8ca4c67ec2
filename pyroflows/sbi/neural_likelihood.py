"""Likelihoods by conditional flows, as Pyro models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from .. import flows
from ..distributions import Flow
from ..distributions.maximum_likelihood import DensityFit
from .observations import ObservationSpace
from .prior import Prior
from .simulate import given_or_drawn
from .simulations import Simulations
from .space import ParameterSpace


class NeuralLikelihood:
    r"""Learn the density of observations given parameters, and make a Pyro model of it.

    A conditional flow maximises the mean of :math:`\log q(x \mid \theta)` over simulations [1].
    Observations in a plate are exchangeable: what is learned is the density of one of them, from
    all of them, and the model takes any number.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`; one observed site.
    flow
        Name of a registered flow.
    **options
        Options of the flow.

    Raises
    ------
    ValueError
        If there are several observed sites.

    References
    ----------
    [1] G. Papamakarios, D. C. Sterratt, I. Murray. Sequential neural likelihood.
        `arXiv:1805.07226 <https://arxiv.org/abs/1805.07226>`_, 2018.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("points", 4):
    ...         pyro.sample("x", dist.Normal(theta, 1.0))
    >>> likelihood = NeuralLikelihood(simulator, num_layers=2)
    >>> model = likelihood.fit(num_simulations=500, num_steps=50, progress=False)
    >>> sorted(pyro.poutine.trace(model).get_trace(torch.zeros(4)).observation_nodes)
    ['x']
    """

    def __init__(
        self,
        simulator: Callable,
        observed: str = "x",
        *,
        flow: str = "maf",
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(observed, str):
            raise ValueError(f"observed must be the name of one site, got {observed!r}")
        self.simulator = simulator
        self.flow = flow
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.options = options
        self.space = ParameterSpace.of_model(simulator, (observed,), parameters, args, kwargs)
        self.observations = ObservationSpace.of_model(simulator, (observed,), args, kwargs)

    def fit(
        self,
        simulations: Simulations | None = None,
        *,
        num_simulations: int | None = None,
        seed: int = 0,
        progress: bool = True,
        **settings: Any,
    ) -> LikelihoodModel:
        """Train, and return the model whose observed site is the learned flow.

        Parameters
        ----------
        simulations
            Draws from the simulator, or
        num_simulations
            how many to draw.
        seed
            Determines simulations, initial weights and training.
        progress
            Whether to show progress bars.
        **settings
            See :meth:`pyroflows.Flow.fit`.

        Raises
        ------
        ValueError
            If neither or both of ``simulations`` and ``num_simulations`` are given.
        """
        simulations = given_or_drawn(
            simulations,
            num_simulations,
            self.simulator,
            self.observations.names,
            parameters=self.space.names,
            args=self.args,
            kwargs=self.kwargs,
            seed=seed,
            progress=progress,
        )
        z, x = self._rows(simulations)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            flow = Flow(None, flows.flow(self.flow, x.shape[-1], self.space.dim, **self.options))
        fit = flow.fit(x, z, seed=seed, progress=progress, **settings)
        prior = Prior(self.simulator, self.space.names, self.args, self.kwargs)
        return LikelihoodModel(prior, self.space, self.observations, flow, fit)

    def _rows(self, simulations: Simulations) -> tuple[Tensor, Tensor]:
        """Return parameters and observations, a row for each exchangeable one."""
        z = self.space.unconstrain(simulations.parameters)
        x = self.observations.tensor(simulations.observations)
        if not self.observations.is_set:
            return z, x
        return z.repeat_interleave(x.shape[1], 0), x.flatten(0, 1)


class LikelihoodModel:
    """Be a Pyro model: the prior of a simulator, and its observed site as a learned flow.

    Call it with the observation; any guide, ``fit`` and MCMC work on it.

    Attributes
    ----------
    flow
        The density of one observation, conditional on unconstrained parameters.
    fit
        How the training went.
    """

    def __init__(
        self,
        prior: Prior,
        space: ParameterSpace,
        observations: ObservationSpace,
        flow: Flow,
        fit: DensityFit,
    ) -> None:
        self.prior = prior
        self.space = space
        self.observations = observations
        self.flow = flow
        self.fit = fit
        for parameter in flow.parameters():
            parameter.requires_grad_(False)  # guides learn theirs only

    def __call__(self, x: Tensor | None = None) -> Tensor:
        """Sample parameters, and observe ``x`` or sample it."""
        z = self.space.unconstrain(self.prior())
        likelihood = self.flow.condition(z)
        observed = None if x is None else self.observations.tensor(x)
        (name,) = self.observations.names
        if not self.observations.is_set:
            return pyro.sample(name, likelihood, obs=observed)
        shape = self.observations.shapes[name]
        with pyro.plate(f"{name}_plate", len(x) if x is not None else shape[0]):
            return pyro.sample(name, likelihood, obs=observed)
