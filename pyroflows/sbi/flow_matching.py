"""Posteriors by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from ..nn.film import FiLMNetwork
from .conditional import ConditionalDensity
from .estimator import Estimator
from .observations import ObservationSpace

VALIDATION_REPEATS = 4


class FlowMatchingDensity(ConditionalDensity):
    r"""Model parameters by a velocity field that carries noise to them.

    The field :math:`v(t, w, x)` is regressed on straight lines from noise to data,

    .. math:: \mathrm{E} \left\| v(t, (1 - t) \epsilon + t w, x) - (w - \epsilon) \right\|^2 ,
        \qquad t \sim U(0, 1), \quad \epsilon \sim \mathcal{N}(0, I) ,

    and its flow from ``t = 0`` to ``t = 1`` maps noise to the posterior [1]. It starts as the exact
    field of a standard normal ``w``, to which a network adds.

    Parameters
    ----------
    dim, observations, embedding
        See :class:`ConditionalDensity`.
    width, num_blocks, dropout
        Size of the network, see :class:`FiLMNetwork`.
    num_steps
        Steps of the fourth-order Runge-Kutta solver.

    References
    ----------
    [1] Y. Lipman, R. T. Q. Chen, H. Ben-Hamu, M. Nickel, M. Le. Flow matching for generative
        modeling. `arXiv:2210.02747 <https://arxiv.org/abs/2210.02747>`_, 2022.
    """

    def __init__(
        self,
        dim: int,
        observations: ObservationSpace,
        embedding: nn.Module | None = None,
        width: int = 128,
        num_blocks: int = 3,
        dropout: float = 0.0,
        num_steps: int = 12,
    ) -> None:
        super().__init__(dim, observations, embedding)
        self.num_steps = num_steps
        self.network = FiLMNetwork(dim, dim, self.context_dim, width, num_blocks, dropout=dropout)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and summary broadcast to its batch."""
        # The field whose flow leaves a standard normal variable as it is at both ends.
        rate = (2 * time - 1) / (time.square() + (1 - time).square())
        return rate.unsqueeze(-1) * w + self.network(w, time, summary)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return minus the squared error of the velocity at a random time, one number a row."""
        standard = self.standardizer(x)
        w = self.linear.whiten(z, self.features(standard))
        summary = self.embedding(standard)
        if self.training:
            return -self._squared_error(w, summary, torch.rand_like(w[:, 0]), torch.randn_like(w))
        errors = [self._squared_error(w, summary, *noise) for noise in _frozen_noise(w)]
        return -torch.stack(errors).mean(0)

    def _squared_error(self, w: Tensor, summary: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        between = torch.lerp(noise, w, time.unsqueeze(-1))
        return (self.velocity(time, between, summary) - (w - noise)).square().sum(-1)

    @torch.no_grad()
    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        standard = self.standardizer(x)
        summary = self.embedding(standard)
        w = torch.randn(num_samples, *summary.shape[:-1], self.dim).to(summary)
        step = 1 / self.num_steps
        for i in range(self.num_steps):
            w = _runge_kutta(
                lambda time, w: self.velocity(time, w, summary),
                summary.new_tensor(i * step),
                w,
                step,
            )
        return self.linear.colour(w, self.features(standard))

    @torch.no_grad()
    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        standard = self.standardizer(x)
        summary = self.embedding(standard)
        w = self.linear.whiten(z, self.features(standard))
        summary = summary.expand(*w.shape[:-1], summary.shape[-1])
        state = torch.cat([w, torch.zeros_like(w[..., :1])], -1)

        def velocity_and_divergence(time: Tensor, state: Tensor) -> Tensor:
            return torch.cat(self._velocity_and_divergence(time, state[..., :-1], summary), -1)

        step = -1 / self.num_steps
        for i in range(self.num_steps):
            time = summary.new_tensor(1 + i * step)
            state = _runge_kutta(velocity_and_divergence, time, state, step)
        noise, change = state[..., :-1], state[..., -1]
        base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
        return base + change - self.linear.log_abs_det_jacobian

    def _velocity_and_divergence(
        self, time: Tensor, w: Tensor, summary: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity and its divergence, by ``D`` forward-mode derivatives."""

        def along(direction: Tensor) -> tuple[Tensor, Tensor]:
            tangent = direction.expand_as(w)
            result = jvp(lambda w: self.velocity(time, w, summary), (w,), (tangent,))
            velocity, change = cast(tuple[Tensor, Tensor], result)
            return velocity, (change * tangent).sum(-1, keepdim=True)

        velocities, slopes = cast(Any, vmap(along))(torch.eye(self.dim).to(w))
        return velocities[0], slopes.sum(0)


def _runge_kutta(
    field: Callable[[Tensor, Tensor], Tensor], time: Tensor, state: Tensor, step: float
) -> Tensor:
    first = field(time, state)
    second = field(time + step / 2, state + step / 2 * first)
    third = field(time + step / 2, state + step / 2 * second)
    fourth = field(time + step, state + step * third)
    return state + step / 6 * (first + 2 * second + 2 * third + fourth)


def _frozen_noise(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield times and noise that are the same at each validation, times evenly spread."""
    generator = torch.Generator().manual_seed(0)
    for i in range(VALIDATION_REPEATS):
        time = (torch.rand(len(w), generator=generator) + i) / VALIDATION_REPEATS
        noise = torch.randn(w.shape, generator=generator)
        yield time.to(w), noise.to(w)


class FlowMatching(Estimator):
    """Learn the posterior of a simulator's parameters by flow matching.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`.
    embedding
        A module that summarises one observation. Default: the observation itself, or a permutation
        invariant network for observations in a plate.
    device
        Where to train. Default: the CPU.
    **options
        Options of :class:`FlowMatchingDensity`: ``width``, ``num_blocks``, ``dropout``,
        ``num_steps``.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = FlowMatching(simulator)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> posterior.sample(100, x=torch.tensor(1.0))["theta"].shape
    torch.Size([100])
    """

    def density(self, dim: int, observations: ObservationSpace, num_simulations: int) -> Any:
        """Build the density to train."""
        options = {**_size(num_simulations), **self.options}
        return FlowMatchingDensity(dim, observations, self.embedding, **options)


def _size(num_simulations: int) -> dict[str, Any]:
    """Return the size of network that so many simulations can bear."""
    if num_simulations < 3000:
        return {"width": 64, "num_blocks": 2, "dropout": 0.1}
    return {"width": 128, "num_blocks": 3}
