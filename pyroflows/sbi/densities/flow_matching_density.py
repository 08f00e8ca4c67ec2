"""Densities by flow matching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.film import FiLMNetwork
from ..model.observations import ObservationSpace
from .coupling import coupling_of
from .time_sampling import TIME_SAMPLINGS
from .velocity_density import VelocityDensity

VALIDATION_REPEATS = 4
CONDITION_WEIGHT = 100.0


class FlowMatchingDensity(VelocityDensity):
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
        self.network = FiLMNetwork(dim, dim, self.context_dim, width, num_blocks, dropout=dropout)

    def velocity(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        """Return the velocity of ``w``; time and summary broadcast to its batch."""
        return _rate(time).unsqueeze(-1) * w + self.network(w, time, summary)

    def divergence(self, time: Tensor, w: Tensor, summary: Tensor) -> Tensor:
        return self.dim * _rate(time) + self.network.divergence(w, time, summary)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return minus the squared error of the velocity at a random time, one number a row."""
        standard = self.standardizer(x)
        w = self.linear.whiten(z, self.features(standard))
        with self._precision(w.device):
            summary = self.embedding(standard)
            if self.training:
                time, noise = self.draw_times(w[:, 0]), torch.randn_like(w)
                return -self._squared_error(w, summary, time, noise)
            errors = [self._squared_error(w, summary, *noise) for noise in _frozen_noise(w)]
            return -torch.stack(errors).mean(0)

    def _squared_error(self, w: Tensor, summary: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        noise = self.couple(noise, w, summary.detach())
        between = torch.lerp(noise, w, time.unsqueeze(-1))
        return (self.velocity(time, between, summary) - (w - noise)).square().sum(-1)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        """Return the context that networks compute in; what they give is added to full numbers."""
        if self.training and self.mixed_precision:
            return torch.autocast(device.type, torch.bfloat16)
        return nullcontext()


def _rate(time: Tensor) -> Tensor:
    """Return the field, over ``w``, whose flow leaves a normal variable as it is at both ends."""
    return (2 * time - 1) / (time.square() + (1 - time).square())


def _frozen_noise(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield times and noise that are the same at each validation, times evenly spread."""
    generator = torch.Generator().manual_seed(0)
    for i in range(VALIDATION_REPEATS):
        time = (torch.rand(len(w), generator=generator) + i) / VALIDATION_REPEATS
        noise = torch.randn(w.shape, generator=generator)
        yield time.to(w), noise.to(w)
