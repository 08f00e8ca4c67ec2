"""Densities that a velocity field carries noise to: their draws and their logarithms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ...transforms.continuous.trace import by_tangents, derivative_along
from ..model.observations import ObservationSpace
from .conditional import ConditionalDensity
from .ode import Field, Solve

MAX_EXACT_DIM = 64  # numbers of parameters whose divergence is exact by default
NUM_PROBES = 16
CHUNK = 2048  # points, or their derivatives, at a time: what fits in the caches is faster


class SolverError(NamedTuple):
    """State what a solver with twice the steps changes.

    Attributes
    ----------
    mean, largest
        Mean and largest change of a draw, in standard deviations of the draws.
    log_prob_mean, log_prob_largest
        Mean and largest change of the log-density of a draw, in nats.
    log_prob_standard_error
        Mean standard error that random signs leave in the log-density; 0 for exact traces.
    """

    mean: float
    largest: float
    log_prob_mean: float
    log_prob_largest: float
    log_prob_standard_error: float


class VelocityDensity(ConditionalDensity):
    r"""Model parameters by the flow of a velocity field :math:`v(t, w, x)`, noise at its start.

    .. math:: \frac{dw}{dt} = v(t, w, x) , \quad w_0 \sim \mathcal{N}(0, I) , \qquad
        \log q(w_1 \mid x) = \log \mathcal{N}(w_0) - \int_0^1 \mathrm{tr}
        \frac{\partial v}{\partial w}(t, w_t, x) \, dt .

    The trace is exact, at the price of ``D`` derivatives of the field, or the mean over random
    signs :math:`\epsilon` of :math:`\epsilon^\top J \epsilon` [1].

    Parameters
    ----------
    dim, observations, embedding
        See :class:`ConditionalDensity`.
    num_steps, tolerance
        See :class:`Solve`.
    num_probes
        Number of random signs, the same at all times; 0 for the exact trace. Default: 0 for up to
        64 parameters, else 16.

    References
    ----------
    [1] W. Grathwohl, R. T. Q. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. FFJORD: Free-form
        continuous dynamics for scalable reversible generative models.
        `arXiv:1810.01367 <https://arxiv.org/abs/1810.01367>`_, 2018.
    """

    solver: ClassVar[type[Solve]] = Solve

    def __init__(
        self,
        dim: int,
        observations: ObservationSpace,
        embedding: nn.Module | None = None,
        num_steps: int = 12,
        tolerance: float | None = None,
        num_probes: int | None = None,
    ) -> None:
        super().__init__(dim, observations, embedding)
        self._set_solver(num_steps, tolerance, num_probes)

    def _set_solver(self, num_steps: int, tolerance: float | None, num_probes: int | None) -> None:
        if num_probes is None:
            num_probes = 0 if self.dim <= MAX_EXACT_DIM else NUM_PROBES
        if num_probes < 0 or num_probes == 1:
            raise ValueError(f"num_probes must be 0 or at least 2, got {num_probes}")
        self.solve = self.solver(num_steps, tolerance)
        self.num_probes = num_probes

    def with_solver(self, **options: Any) -> VelocityDensity:
        """Return a density of the same weights that is solved with other options."""
        other = copy.copy(self)
        now = {
            "num_steps": self.solve.num_steps,
            "tolerance": self.solve.tolerance,
            "num_probes": self.num_probes,
        }
        if unknown := sorted(options.keys() - now.keys()):
            raise TypeError(f"options of the solver are {sorted(now)}, got {unknown}")
        other._set_solver(**{**now, **options})
        return other

    def summary(self, standard: Tensor, features: Tensor) -> Tensor:
        """Return what the field sees of standardised observations, and of their features."""
        return self.embedding(standard)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the regression sees of observations, and what the field sees of them."""
        standard = self.standardizer(x)
        features = self.features(standard)
        return features, self.summary(standard, features)

    def _prediction(self, features: Tensor) -> Tensor:
        """Return what the regression predicts, in the units of ``w``."""
        return -self.linear.whiten(features.new_zeros(self.dim), features)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and summary broadcast to its batch."""
        raise NotImplementedError

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the trace of the Jacobian of the velocity in ``w``, ``(*batch,)``."""
        return by_tangents(self._field(summary))(time, w)[1]

    @torch.no_grad()
    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        features, summary = self.encode(x)
        noise = torch.randn(num_samples, *summary.shape[:-1], self.dim).to(summary)
        return self.linear.colour(self.carry(noise, summary), features)

    @torch.no_grad()
    def trajectory(self, num_samples: int, times: Sequence[float], x: Tensor) -> Tensor:
        """Return draws of ``z`` on their way from noise, ``(T, num_samples, *batch, D)``.

        Parameters
        ----------
        num_samples
            Number of draws ``S``; with the same random state those of :meth:`sample`.
        times
            ``T`` ascending times between 0, where draws are noise in the scale of the parameters,
            and 1. Each stretch between two of them is solved in as many steps as a whole path.
        x
            Observations ``(*batch, ...)``.

        Raises
        ------
        ValueError
            If there are no times, or they leave 0 to 1 or do not ascend.
        """
        times = [float(time) for time in times]
        if not times or any(a >= b for a, b in pairwise(times)) or times[0] < 0 or times[-1] > 1:
            raise ValueError(f"times must ascend between 0 and 1, and be one at least, got {times}")
        features, summary = self.encode(x)
        w = torch.randn(num_samples, *summary.shape[:-1], self.dim).to(summary)
        states = []
        for start, end in pairwise((0.0, *times)):
            w = w if start == end else self.carry(w, summary, start, end)
            states.append(w)
        return self.linear.colour(torch.stack(states), features)

    def carry(self, noise: Tensor, summary: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """Return where noise ``(*batch, D)`` ends; the summaries broadcast to its batch."""

        def ends(w: Tensor, summary: Tensor) -> tuple[Tensor]:
            return (self.solve(self._field(summary), w, start, end),)

        return _by_parts(ends, noise, summary, CHUNK)[0]

    def push(self, noise: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where noise ``(*batch, D)`` ends, as ``z``, and ``log|det dz/dnoise|``."""
        features, summary = self.encode(x)
        w, changes = self._integrate(noise, summary, 0.0, 1.0)
        log_det = changes.mean(-1) + self.linear.log_abs_det_jacobian(features)
        return self.linear.colour(w, features), log_det

    def pull(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise that ends at ``z``, and ``log|det dz/dnoise|``."""
        noise, changes = self._pull(z, x)
        return noise, -changes.mean(-1)

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        return self.log_prob_and_error(z, x)[0]

    def log_prob_and_error(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density and the standard error that random signs leave in it."""
        noise, changes = self._pull(z, x)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1)
        error = torch.zeros_like(base)
        if self.num_probes:
            error = changes.std(-1) / math.sqrt(self.num_probes)
        return base + changes.mean(-1), error

    def _pull(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of ``z`` and estimates of ``log|det dnoise/dz|``, ``(*batch, K)``."""
        features, summary = self.encode(x)
        noise, changes = self._integrate(self.linear.whiten(z, features), summary, 1.0, 0.0)
        return noise, changes - self.linear.log_abs_det_jacobian(features).unsqueeze(-1)

    def _integrate(
        self, w: Tensor, summary: Tensor, start: float, end: float
    ) -> tuple[Tensor, ...]:
        """Return where points end, and estimates of the change of log volume, ``(*batch, K)``."""

        def ends(w: Tensor, summary: Tensor) -> tuple[Tensor, Tensor]:
            divergences = self._divergences(summary, w)
            return self.solve.integrate(self._field(summary), divergences, w, start, end)

        return _by_parts(ends, w, summary, CHUNK // (self.num_probes or self.dim))

    @torch.no_grad()
    def solver_error(self, num_samples: int, x: Tensor) -> SolverError:
        """Compare with a solver of twice the steps, or a sixteenth of the tolerance."""
        finer = self.with_solver(
            num_steps=2 * self.solve.num_steps,
            tolerance=None if self.solve.tolerance is None else self.solve.tolerance / 16,
        )
        features, summary = self.encode(x)
        noise = torch.randn(num_samples, *summary.shape[:-1], self.dim).to(summary)
        one, other = self.carry(noise, summary), finer.carry(noise, summary)
        change = ((one - other) / other.std(0)).abs()
        z = self.linear.colour(other, features)
        log_prob, error = self.log_prob_and_error(z, x)
        difference = (log_prob - finer.log_prob_and_error(z, x)[0]).abs()
        numbers = (change.mean(), change.max(), difference.mean(), difference.max(), error.mean())
        return SolverError(*(number.item() for number in numbers))

    def _field(self, summary: Tensor) -> Field:
        return lambda time, w: self.velocity(time, w, summary)

    def _divergences(self, summary: Tensor, w: Tensor) -> Field:
        """Return the divergence, or estimates of it, as the last dimension."""
        if not self.num_probes:
            return lambda time, w: self.divergence(time, w, summary).unsqueeze(-1)
        field = self._field(summary)
        generator = torch.Generator().manual_seed(0)  # one density at each call
        signs = torch.randint(0, 2, (self.num_probes, *w.shape), generator=generator)
        probes = (2 * signs - 1).to(w)

        def estimates(time: Tensor, w: Tensor) -> Tensor:
            def along(probe: Tensor) -> Tensor:
                return (derivative_along(field, time, w, probe)[1] * probe).sum(-1)

            return torch.func.vmap(along, out_dims=-1)(probes)

        return estimates


def _by_parts(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], w: Tensor, summary: Tensor, size: int
) -> tuple[Tensor, ...]:
    """Apply a function to points ``(*batch, D)`` and their summaries, about ``size`` at a time.

    Takes the points of few summaries together, as what the network makes of these is made anew in
    each part.
    """
    while summary.dim() > 1 and len(summary) == 1:
        summary = summary[0]
    split = w.dim() - summary.dim()
    leading, paired = w.shape[:split], w.shape[split:-1]
    points = w.reshape(leading.numel(), paired.numel(), w.shape[-1])
    summaries = summary.expand(*paired, *summary.shape[-1:]).reshape(-1, *summary.shape[-1:])
    num_summaries = max(1, size // max(1, len(points)))
    num_points = max(1, size // num_summaries)
    columns = []
    for several, theirs in zip(points.split(num_summaries, 1), summaries.split(num_summaries)):
        rows = [function(part, theirs) for part in several.split(num_points)]
        columns.append([torch.cat(outputs) for outputs in zip(*rows)])
    joined = (torch.cat(outputs, 1) for outputs in zip(*columns))
    return tuple(output.reshape(*w.shape[:-1], output.shape[-1]) for output in joined)
