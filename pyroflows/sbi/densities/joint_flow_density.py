"""Densities of any parameters and observations given any others, by flow matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.masking import Masking
from ..model.observations import ObservationSpace, Standardizer
from .flow_matching_density import FlowMatchingDensity
from .joint_gaussian import JointGaussian
from .outliers import ObservationCheck
from .velocity_density import SolverError, VelocityDensity

POSTERIOR_SHARE = 0.5  # of the masks in training; the others are of four kinds in equal shares
RATES = (0.3, 0.7)  # at which entries are free at random
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class JointFlowDensity(FlowMatchingDensity):
    r"""Model vectors of parameters and observations by one velocity field for all conditionings.

    A vector :math:`u` holds all entries, standardised; a condition is such a vector with NaN for
    the free entries :math:`f`, those to model given the others, :math:`c`. In training each vector
    gets a random choice [1] and the field, which knows it, moves the free entries alone,

    .. math:: \mathrm{E} \left\| v_f(t, (1 - t) \epsilon_f + t w_f, u_c) - (w_f - \epsilon_f)
        \right\|^2 ,

    with ``w`` the residual of the regression on what is given, see :class:`JointGaussian`.

    Parameters
    ----------
    dim
        Number ``D`` of unconstrained parameters, the first entries of a vector.
    observations
        The observations, its other entries, as one vector each.
    **options
        See :class:`FlowMatchingDensity`.

    References
    ----------
    [1] M. Gloeckler, M. Deistler, C. Weilbach, F. Wood, J. H. Macke. All-in-one simulation-based
        inference. `arXiv:2404.09636 <https://arxiv.org/abs/2404.09636>`_, 2024.
    """

    standardizer: InvertibleStandardizer
    linear: JointGaussian  # type: ignore[assignment]

    def __init__(self, dim: int, observations: ObservationSpace, **options: Any) -> None:
        total = dim + observations.size
        conditions = ObservationSpace({"all": torch.Size([total])}, missing="random")
        super().__init__(total, conditions, None, marginals=False, **options)
        self.num_parameters = dim
        self.standardizer = InvertibleStandardizer(total)
        self.linear = JointGaussian(total)
        incomplete = ObservationSpace(observations.shapes, missing="random")
        self.check = ObservationCheck(incomplete)
        self.masking = Masking(incomplete)

    @torch.no_grad()
    def prepare(self, z: Tensor, x: Tensor) -> None:
        self.check.fit(self.masking.frozen(x, seed=0))
        vectors = torch.cat([z, x], -1)
        self.linear.fit(self.standardizer.fit(vectors)(vectors))

    def features(self, x: Tensor) -> Tensor:
        return self.embedding(x)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        free = summary[..., self.dim :]
        return free * super().velocity(time, free * w, summary)

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        # That of the network itself would count given entries.
        return VelocityDensity.divergence(self, time, w, summary)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return minus the squared error, in validation that of parameters given observations.

        What noise adds in given entries depends on no weight.
        """
        vectors = torch.cat([z, x], -1)
        condition = self._condition(x)
        if self.training:
            free = _free_entries(condition.isnan())
            condition = vectors.masked_fill(free, torch.nan)
        return super().score(self.standardizer(vectors), condition)

    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        return self.complete(num_samples, self._condition(x))[..., : self.num_parameters]

    def trajectory(self, num_samples: int, times: Sequence[float], x: Tensor) -> Tensor:
        path = super().trajectory(num_samples, times, self._condition(x))
        return self.standardizer.inverse(path)[..., : self.num_parameters]

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("x must hold no NaN: with missing entries there are draws, no density")
        batch_shape = torch.broadcast_shapes(z.shape[:-1], x.shape[:-1])
        parts = [part.expand(*batch_shape, part.shape[-1]) for part in (z, x)]
        return self.log_prob_of_free(torch.cat(parts, -1), self._condition(x))

    def complete(self, num_samples: int, condition: Tensor) -> Tensor:
        """Return vectors ``(num_samples, *batch, D + V)`` that agree with a condition."""
        return self.standardizer.inverse(super().sample(num_samples, condition))

    def log_prob_of_free(self, vectors: Tensor, condition: Tensor) -> Tensor:
        """Return the log-density of the free entries of vectors, given their other entries."""
        free = condition.isnan()
        log_prob = self.log_prob_and_error(self.standardizer(vectors), condition)[0]
        # Given entries of w are 0: their density under the noise is taken back.
        zeros = HALF_LOG_TWO_PI * (~free).sum(-1)
        scale = (free * self.standardizer.log_derivative(vectors)).sum(-1)
        return log_prob + zeros + scale

    def solver_error(self, num_samples: int, x: Tensor) -> SolverError:
        condition = self._condition(x)
        error = super().solver_error(num_samples, condition)
        # Given entries never change: the mean is that of the free ones.
        return error._replace(mean=error.mean / condition.isnan().double().mean().item())

    def _condition(self, x: Tensor) -> Tensor:
        """Return observations as conditions, in which all parameters are free."""
        return F.pad(x, (self.num_parameters, 0), value=torch.nan)


class InvertibleStandardizer(Standardizer):
    """Bring vectors to scale, and back."""

    def inverse(self, u: Tensor) -> Tensor:
        """Return vectors of standardised vectors."""
        inner = u * self.scale + self.loc
        return torch.where(self.compressed > 0, inner.sinh(), inner) * self.spread + self.median

    def log_derivative(self, x: Tensor) -> Tensor:
        """Return ``log(du/dx)``, entry by entry."""
        inner = (x - self.median) / self.spread
        compression = torch.where(self.compressed > 0, -0.5 * inner.square().log1p(), 0.0)
        return compression - (self.scale * self.spread).log()


def _free_entries(parameters: Tensor) -> Tensor:
    """Draw which entries are free: parameters, observations, all, or a random choice."""
    random = [torch.rand(parameters.shape, device=parameters.device) < rate for rate in RATES]
    choices = torch.stack([parameters, ~parameters, torch.ones_like(parameters), *random])
    share = (1 - POSTERIOR_SHARE) / (len(choices) - 1)
    shares = torch.tensor([POSTERIOR_SHARE] + [share] * (len(choices) - 1))
    kinds = torch.multinomial(shares, len(parameters), replacement=True).to(parameters.device)
    return choices[kinds, torch.arange(len(parameters), device=parameters.device)]
