"""Densities by flow matching."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.film import FiLMNetwork
from ..model.observations import ObservationSpace
from .coupling import coupling_of
from .marginals import Marginals
from .matching import frozen_noise, squared_error, standard_rate
from .time_sampling import TIME_SAMPLINGS
from .velocity_density import VelocityDensity

MARGINAL_SHARE = 4  # the marginals get a fourth of the steps of the network
MIN_MARGINAL_STEPS = 250  # rough fields are a worse start than that of a normal variable
CONDITION_WEIGHT = 100.0


class FlowMatchingDensity(VelocityDensity):
    r"""Model parameters by a velocity field that carries noise to them.

    The field :math:`v(t, w, x)` is regressed on straight lines from noise to data,

    .. math:: \mathrm{E} \left\| v(t, (1 - t) \epsilon + t w, x) - (w - \epsilon) \right\|^2 ,
        \qquad t \sim U(0, 1), \quad \epsilon \sim \mathcal{N}(0, I) ,

    and its flow from ``t = 0`` to ``t = 1`` maps noise to the posterior [1]. It starts as the field
    of each parameter alone, see :class:`Marginals`, to which a network adds.

    Parameters
    ----------
    dim, observations, embedding
        See :class:`ConditionalDensity`.
    width, num_blocks, dropout
        Size of the network, see :class:`FiLMNetwork`.
    time_sampling
        The times ``t`` to train at: ``"uniform"``; ``"power"``, of density ``2 t``; or
        ``"logit_normal"``. Validation is uniform in time whatever the choice.
    coupling
        Which noise to join to which parameters: ``"independent"``, any to any; or
        ``"optimal_transport"``, which assigns noise to close parameters among rows with alike
        summaries, see :func:`optimal_transport`. Paths get straighter, which saves steps of the
        solver, at the price of a bias that falls with ``condition_weight``. Validation has the same
        coupling, as the field to learn depends on it.
    condition_weight
        Weight of the summaries in the assignment.
    marginals
        Whether to learn the fields of single parameters first. Else, with optimal transport, in
        fewer than 1000 steps, and for vectors of which any entries may be missing, it starts as the
        exact field of a standard normal ``w``.
    mixed_precision
        Whether networks compute in bfloat16 in training: faster on GPUs. Validation, draws and
        densities keep the precision of the weights.
    **solver
        How to solve for the flow: ``num_steps``, ``tolerance``, ``num_probes``, see
        :class:`VelocityDensity`.

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
        time_sampling: str = "uniform",
        coupling: str = "independent",
        condition_weight: float = CONDITION_WEIGHT,
        marginals: bool = True,
        mixed_precision: bool = False,
        **solver: Any,
    ) -> None:
        super().__init__(dim, observations, embedding, **solver)
        if time_sampling not in TIME_SAMPLINGS:
            raise ValueError(
                f"time_sampling must be one of {[*TIME_SAMPLINGS]}, got {time_sampling!r}"
            )
        self.draw_times = TIME_SAMPLINGS[time_sampling]
        self.couple = coupling_of(coupling, condition_weight)
        self.mixed_precision = mixed_precision
        # Transport sees all parameters: it leaves no field of one alone.
        alone = marginals and coupling == "independent" and not self.takes_subsets
        self.marginals = Marginals(dim) if alone else None
        self.network = FiLMNetwork(dim, dim, self.context_dim, width, num_blocks, dropout=dropout)

    def begin(self, z: Tensor, x: Tensor, num_steps: int, seed: int, progress: bool) -> None:
        num_steps //= MARGINAL_SHARE
        if self.marginals is None or num_steps < MIN_MARGINAL_STEPS:
            return
        features = self.features(self.standardizer(self.masking.frozen(x, seed=0)))
        w, prediction = self.linear.whiten(z, features), self._prediction(features)
        self.marginals.fit(w, prediction, num_steps, seed, progress)

    def summary(self, standard: Tensor, features: Tensor) -> Tensor:
        """Return the embedding, and behind it, for the marginals, the linear prediction."""
        embedding = self.embedding(standard)
        if self.marginals is None:
            return embedding
        return torch.cat([embedding, self._prediction(features)], -1)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and summary broadcast to its batch."""
        if self.marginals is None:
            return standard_rate(time).unsqueeze(-1) * w + self.network(w, time, summary)
        embedding, prediction = self._parts(summary)
        start = self.marginals.velocity(time, w, prediction)
        return start + self.network(w, time, embedding)

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        if self.marginals is None:
            return self.dim * standard_rate(time) + self.network.divergence(w, time, summary)
        embedding, prediction = self._parts(summary)
        start = self.marginals.divergence(time, w, prediction)
        return start + self.network.divergence(w, time, embedding)

    def _parts(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding and the prediction."""
        return summary[..., : -self.dim], summary[..., -self.dim :]

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return minus the squared error of the velocity at a random time, one number a row."""
        standard = self.standardizer(x)
        features = self.features(standard)
        w = self.linear.whiten(z, features)
        with self._precision(w.device):
            summary = self.summary(standard, features)
            if self.training:
                time, noise = self.draw_times(w[:, 0]), torch.randn_like(w)
                return -self._squared_error(w, summary, time, noise)
            errors = [self._squared_error(w, summary, *noise) for noise in frozen_noise(w)]
            return -torch.stack(errors).mean(0)

    def _squared_error(self, w: Tensor, summary: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        noise = self.couple(noise, w, summary.detach())
        return squared_error(self._field(summary), w, time, noise)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        """Return the context that networks compute in; what they give is added to full numbers."""
        if self.training and self.mixed_precision:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()
