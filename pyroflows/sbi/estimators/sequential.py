"""Posteriors refined for one observation, round by round."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

from ..model.simulations import Simulations
from ..posteriors.velocity_posterior import VelocityPosterior
from ..simulation.simulate import simulate, simulate_at
from .estimator import stage
from .flow_matching import FlowMatching

NUM_PILOTS = 10_000  # draws that the region is read from
MAX_PROPOSALS = 100  # for each draw, on average


def refine(
    estimator: FlowMatching,
    x: Tensor | Mapping[str, Tensor],
    *,
    num_simulations: int,
    num_rounds: int = 2,
    simulations: Simulations | None = None,
    epsilon: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> VelocityPosterior:
    r"""Learn the posterior of one observation, simulating where it lies.

    Each round but the first draws parameters from the prior restricted to a region that holds
    :math:`1 - \epsilon` of the last round's posterior, and trains on all simulations within it
    [1]. Inside the region all parameters come from the prior, up to a constant, so that nothing has
    to be corrected. Where the posterior is much narrower than the prior, this takes far fewer
    simulations; but the result holds for this observation alone, and warns if asked for another.

    The region is the ball that holds :math:`1 - \epsilon / 2` of the noise, carried to parameters,
    less where the density is below its :math:`\epsilon / 2` quantile.

    An interrupt, or an error on the way, in any round but the first leaves the posterior of the
    round before, with a warning.

    Parameters
    ----------
    estimator
        A :class:`FlowMatching` estimator.
    x
        The observation.
    num_simulations
        How many to draw in each round.
    num_rounds
        Number of rounds; the first draws from the prior.
    simulations
        Draws to use in the first round, instead of new ones.
    epsilon
        How much of a posterior may be lost in each round.
    seed
        Determines simulations and training.
    progress
        Whether to show progress bars.
    **settings
        See :meth:`Estimator.fit`. With ``checkpoint`` each round has a file of its own: called
        again in the same way, it simulates once more what it did, and goes on with the training
        from there.

    Returns
    -------
    VelocityPosterior
        For this observation, after two rounds or more.

    Raises
    ------
    TypeError
        If the estimator is not a :class:`FlowMatching`.
    ValueError
        If ``x`` is not one observation, a number is out of range, or the prior has no density.

    References
    ----------
    [1] M. Deistler, P. J. Goncalves, J. H. Macke. Truncated proposals for scalable and hassle-free
        simulation-based inference. `arXiv:2210.04815 <https://arxiv.org/abs/2210.04815>`_, 2022.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Uniform(-10.0, 10.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.1))
    >>> posterior = refine(
    ...     pf.sbi.FlowMatching(simulator), torch.tensor(1.0),
    ...     num_simulations=300, num_steps=50, progress=False,
    ... )
    >>> posterior.sample(100, x=torch.tensor(1.0))["theta"].shape
    torch.Size([100])
    """
    observed = _checked(estimator, x, num_rounds, epsilon)
    rounds = _Rounds(estimator, observed, num_simulations, epsilon, seed, progress, settings)
    posterior = rounds.first(simulations)
    assert posterior.fit is not None
    if posterior.fit.interrupted:
        return posterior  # it has no region to trust
    for number in range(1, num_rounds):
        try:
            posterior = rounds.next(posterior, number)
        # What is learned already outlives whatever goes wrong in making it better.
        except KeyboardInterrupt:
            return _unfinished(posterior, number, num_rounds, "interrupted")
        except (ArithmeticError, RuntimeError, ValueError) as error:
            return _unfinished(posterior, number, num_rounds, error)
    return posterior


def _unfinished(
    posterior: VelocityPosterior, number: int, num_rounds: int, reason: object
) -> VelocityPosterior:
    """Return the posterior of the last round, and say that it is."""
    warnings.warn(
        f"round {number + 1} of {num_rounds} was not finished: the posterior is that of round "
        f"{number}: {reason}",
        stacklevel=3,
    )
    return posterior


class _Rounds:
    """Hold what the rounds have in common, and what they have gathered."""

    def __init__(
        self,
        estimator: FlowMatching,
        observed: Tensor,
        num_simulations: int,
        epsilon: float,
        seed: int,
        progress: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self.estimator = estimator
        self.observed = observed
        self.num_simulations = num_simulations
        self.epsilon = epsilon
        self.seed = seed
        self.settings = {"seed": seed, "progress": progress, **settings}
        self.checkpoint = self.settings.pop("checkpoint", None)
        self.simulating: dict[str, Any] = {
            "observed": estimator.observed,
            "args": estimator.args,
            "kwargs": estimator.kwargs,
            "progress": progress,
            "keep_nan": estimator.observations.missing == "simulated",
        }
        self.regions: list[_Region] = []

    def first(self, simulations: Simulations | None) -> VelocityPosterior:
        """Learn from simulations of the whole prior."""
        if simulations is None:
            simulations = simulate(
                self.estimator.simulator,
                self.num_simulations,
                parameters=self.estimator.space.names,
                seed=self.seed,
                **self.simulating,
            )
        self.simulations = simulations
        return self.estimator.fit(simulations, checkpoint=self.checkpoint, **self.settings)

    def next(self, posterior: VelocityPosterior, number: int) -> VelocityPosterior:
        """Learn from simulations where the last round's posterior lies."""
        seed, space = self.seed + number, self.estimator.space
        self.regions.append(_Region(posterior, self.observed, self.epsilon, seed))
        parameters = _draw_prior(posterior, self.regions, self.num_simulations, seed)
        new = simulate_at(
            self.estimator.simulator, space.constrain(parameters), seed=seed, **self.simulating
        )
        z = space.unconstrain(self.simulations.parameters).to(parameters)
        kept = self.simulations[self.regions[-1].contains(z).nonzero().squeeze(-1).cpu()]
        self.simulations = Simulations.concatenate([kept, new])
        # Pairs drawn from the whole prior would undo the truncation.
        settings = {**self.settings, "augment": False}
        checkpoint = stage(self.checkpoint, f".{number}")
        refined = self.estimator.fit(self.simulations, checkpoint=checkpoint, **settings)
        assert refined.fit is not None
        if refined.fit.interrupted:
            raise KeyboardInterrupt  # what it has learned so far may be worse than what was there
        refined.about["observation"] = self.observed.tolist()
        return refined


class _Region:
    """Hold a region that has all but a little of a posterior."""

    def __init__(
        self, posterior: VelocityPosterior, observed: Tensor, epsilon: float, seed: int
    ) -> None:
        self.density = posterior.density
        self.observed = observed.to(self.density.linear.loc)
        self.radius = math.sqrt(chi2.ppf(1 - epsilon / 2, self.density.dim))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(NUM_PILOTS, self.density.dim, generator=generator)
        log_q = _log_normal(noise.to(self.observed)) - self.push(noise.to(self.observed))[1]
        self.threshold = log_q.quantile(epsilon / 2)

    @torch.no_grad()
    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.density.push(noise, self.observed)

    @torch.no_grad()
    def contains(self, z: Tensor) -> Tensor:
        """Tell which vectors ``(N, D)`` are inside."""
        noise, log_det = self.density.pull(z, self.observed)
        return self.holds(noise, log_det)

    def holds(self, noise: Tensor, log_det: Tensor) -> Tensor:
        dense = _log_normal(noise) - log_det >= self.threshold
        return dense & (noise.norm(dim=-1) <= self.radius)

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """Return noise that is uniform in the ball."""
        dim = self.density.dim
        direction = torch.nn.functional.normalize(torch.randn(number, dim, generator=generator))
        radius = self.radius * torch.rand(number, 1, generator=generator) ** (1 / dim)
        return (radius * direction).to(self.observed)


def _draw_prior(
    posterior: VelocityPosterior, regions: Sequence[_Region], number: int, seed: int
) -> Tensor:
    """Return draws ``(N, D)`` from the prior restricted to all regions, by rejection.

    The proposals are uniform in the noise of the last region.
    """
    assert posterior.joint is not None
    last, generator = regions[-1], torch.Generator().manual_seed(seed)
    proposals, log_weights, log_uniforms = [], [], []
    for _ in range(MAX_PROPOSALS):
        noise = last.noise(number, generator)
        z, log_det = last.push(noise)
        log_weight = posterior.joint.log_prior(z) + log_det
        inside = last.holds(noise, log_det)
        for region in regions[:-1]:
            inside &= region.contains(z)
        proposals.append(z)
        log_weights.append(log_weight.masked_fill(~inside, -torch.inf))
        log_uniforms.append(torch.rand(number, generator=generator).log().to(z))
        weight = torch.cat(log_weights)
        accepted = torch.cat(log_uniforms) < weight - weight.max()
        if accepted.sum() >= number:
            return torch.cat(proposals)[accepted.nonzero().squeeze(-1)[:number]]
    warnings.warn(
        f"only {int(accepted.sum())} of {number} parameters were found in the region after "
        f"{MAX_PROPOSALS * number} proposals: the round goes on with them",
        stacklevel=4,
    )
    return torch.cat(proposals)[accepted.nonzero().squeeze(-1)]


def _log_normal(noise: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)


def _checked(
    estimator: FlowMatching, x: Tensor | Mapping[str, Tensor], num_rounds: int, epsilon: float
) -> Tensor:
    """Return the observation as a tensor."""
    if not isinstance(estimator, FlowMatching):
        raise TypeError(f"estimator must be a FlowMatching, got {type(estimator).__name__}")
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be at least 1, got {num_rounds}")
    if not 0 < epsilon < 0.5:
        raise ValueError(f"epsilon must lie in (0, 0.5), got {epsilon}")
    observed = estimator.observations.tensor(x)
    batch_shape = observed.shape[: observed.dim() - estimator.observations.event_dim]
    if batch_shape:
        raise ValueError(f"x must be one observation, got a batch {tuple(batch_shape)}")
    if num_rounds > 1:
        estimator._joint().log_prior(torch.zeros(1, estimator.space.dim))  # refused now if ever
    return observed
