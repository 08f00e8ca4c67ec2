"""Densities whose velocity field carries noise along nearly straight lines."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from ...distributions.maximum_likelihood import DensityFit, Rows, Settings, maximize_likelihood
from ...nn.film import FiLMNetwork
from ..model.observations import ObservationSpace
from .flow_matching_density import FlowMatchingDensity
from .matching import frozen_noise, squared_error
from .midpoint import MidpointSolve
from .velocity_density import VelocityDensity

SMALLEST_SCALE = 1e-6  # entries of summaries that vary less than this do not vary


class StraightField(nn.Module):
    r"""Carry noise along the lines to where another flow carries it, given a summary.

    The field is zero where that flow leaves noise in place, and starts as such.

    Parameters
    ----------
    dim
        Number of entries ``D`` of ``w``.
    summary_dim
        Size ``C`` of the summaries.
    width, num_blocks
        Size of the network, see :class:`FiLMNetwork`.

    Examples
    --------
    >>> field = StraightField(2, summary_dim=3, width=16, num_blocks=1)
    >>> field.velocity(torch.tensor(0.5), torch.randn(7, 2), torch.randn(7, 3)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, dim: int, summary_dim: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(summary_dim))
        self.register_buffer("scale", torch.ones(summary_dim))
        self.network = FiLMNetwork(dim, dim, summary_dim, width, num_blocks)

    @property
    def module(self) -> StraightField:
        """Return what the training loop changes."""
        return self

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and summary broadcast to its batch."""
        return self.network(w, time, (summary - self.loc) / self.scale)

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the trace of the Jacobian of the velocity in ``w``, ``(*batch,)``."""
        return self.network.divergence(w, time, (summary - self.loc) / self.scale)

    def score(self, lines: Tensor, summary: Tensor) -> Tensor:
        """Return minus the squared error of the velocity at random times, one number a line."""
        noise, end = lines.chunk(2, -1)

        def error(time: Tensor) -> Tensor:
            return squared_error(lambda t, w: self.velocity(t, w, summary), end, time, noise)

        if self.training:
            return -error(torch.rand_like(noise[:, 0]))
        return -torch.stack([error(time) for time, _ in frozen_noise(end)]).mean(0)

    def fit(
        self,
        training: Rows,
        validation: Rows,
        settings: Settings,
        progress: bool = False,
        checkpoint: str | Path | None = None,
    ) -> DensityFit:
        """Learn from lines, noise and then its end, ``(N, 2 D)``, and summaries ``(N, C)``."""
        assert training.context is not None
        self.loc.copy_(training.context.mean(0))
        scale = training.context.std(0)
        self.scale.copy_(torch.where(scale > SMALLEST_SCALE, scale, 1.0))
        return maximize_likelihood(self, training, validation, settings, None, progress, checkpoint)


class StraightDensity(VelocityDensity):
    r"""Model parameters by a field that carries noise to the draws of another one, straight ahead.

    With :math:`T_x` the map of noise to draws of a trained field, this one is regressed on the
    lines between them [1],

    .. math:: \mathrm{E} \left\| v(t, (1 - t) \epsilon + t T_x(\epsilon), x) - (T_x(\epsilon) -
        \epsilon) \right\|^2 , \qquad t \sim U(0, 1), \quad \epsilon \sim \mathcal{N}(0, I) .

    Each noise has one end instead of any, so that its paths are straight where lines do not cross,
    and few steps follow them. Its flow has the distribution of the other, as far as it is learned.

    Observations are standardised, summarised and regressed on as for the other field, by a copy of
    its modules that training leaves as they are: :math:`T_x` knows nothing else of them.

    Parameters
    ----------
    curved
        The density of the other field.
    observations
        The observations, as the simulator gives them.
    num_steps
        Number of steps of the solver, two evaluations each, see :class:`MidpointSolve`.

    References
    ----------
    [1] X. Liu, C. Gong, Q. Liu. Flow straight and fast: learning to generate and transfer data with
        rectified flow. `arXiv:2209.03003 <https://arxiv.org/abs/2209.03003>`_, 2022.
    """

    solver = MidpointSolve

    def __init__(
        self, curved: FlowMatchingDensity, observations: ObservationSpace, num_steps: int = 2
    ) -> None:
        probes = curved.num_probes
        super().__init__(curved.dim, observations, curved.embedding, num_steps, None, probes)
        self.check = copy.deepcopy(curved.check)
        self.standardizer = copy.deepcopy(curved.standardizer)
        self.linear = copy.deepcopy(curved.linear)
        summary_dim, network = self.context_dim + self.dim, curved.network
        field = StraightField(self.dim, summary_dim, network.width, len(network.first))
        self.field = field.to(self.linear.loc)

    def summary(self, standard: Tensor, features: Tensor) -> Tensor:
        """Return the embedding, and behind it what the regression predicts, in units of ``w``."""
        return torch.cat([self.embedding(standard), self._prediction(features)], -1)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        return self.field.velocity(time, w, summary)

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        return self.field.divergence(time, w, summary)
