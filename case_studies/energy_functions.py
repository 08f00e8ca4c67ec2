"""The four energies in the plane that flows were first fitted to, with their exact normalisers.

Densities proportional to :math:`e^{-U}` after Rezende and Mohamed [1]: a ring with two bright
sides, a sine wave, and two ways for a wave to split. The waves would go on for ever, so there the
first coordinate is confined to [-4, 4].

[1] D. J. Rezende, S. Mohamed. Variational inference with normalizing flows. arXiv:1505.05770, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

BOUND = 4.0  # of the first coordinate of the waves


@dataclass(frozen=True)
class Energy:
    """Hold an energy, the logarithm of its normaliser, and where its first coordinate lives.

    Attributes
    ----------
    potential
        Maps points ``(*batch, 2)`` to energies ``(*batch,)``.
    log_normaliser
        :math:`\\log \\int e^{-U}`, by quadrature (:func:`log_normaliser_by_quadrature`).
    bounded
        Whether the first coordinate is confined to [-4, 4].
    """

    potential: Callable[[Tensor], Tensor]
    log_normaliser: float
    bounded: bool = True

    def model(self, inverse_temperature: Tensor) -> None:
        """Sample a point from flat priors and weight it by the energy: a Pyro model.

        Parameters
        ----------
        inverse_temperature
            A number that multiplies the energy, 1 for the target itself.
        """
        zero = torch.zeros_like(inverse_temperature)
        anywhere = dist.Normal(zero, 1.0).mask(False)  # a flat prior that knows where to start
        inside = dist.Uniform(zero - BOUND, zero + BOUND).mask(False)
        z1 = pyro.sample("z1", inside if self.bounded else anywhere)
        z2 = pyro.sample("z2", anywhere)
        energy = self.potential(torch.stack([z1, z2], -1))
        pyro.factor("energy", -inverse_temperature * energy)


def _ring(z: Tensor) -> Tensor:
    sides = torch.stack([z[..., 0] - 2, z[..., 0] + 2])
    bright = (-0.5 * (sides / 0.6).square()).logsumexp(0)
    return 0.5 * ((z.norm(dim=-1) - 2) / 0.4).square() - bright


def _wave(z: Tensor) -> Tensor:
    return -_strand(z, 0.0, 0.4)


def _bump(z: Tensor) -> Tensor:
    bump = 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6).square())
    return -torch.logaddexp(_strand(z, 0.0, 0.35), _strand(z, bump, 0.35))


def _step(z: Tensor) -> Tensor:
    step = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    return -torch.logaddexp(_strand(z, 0.0, 0.4), _strand(z, step, 0.35))


def _strand(z: Tensor, shift: Tensor | float, scale: float) -> Tensor:
    wave = torch.sin(2 * math.pi * z[..., 0] / 4)
    return -0.5 * ((z[..., 1] - wave + shift) / scale).square()


ENERGIES = {
    "U1": Energy(_ring, 1.87750, bounded=False),
    "U2": Energy(_wave, 2.08209),
    "U3": Energy(_bump, 2.64171),
    "U4": Energy(_step, 2.71070),
}


def log_normaliser_by_quadrature(energy: Energy, cells: int = 800) -> float:
    """Integrate an energy's density by the midpoint rule.

    Examples
    --------
    >>> round(log_normaliser_by_quadrature(ENERGIES["U2"]), 5)
    2.08209
    """
    midpoints = 2 * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 1
    width, height = (BOUND if energy.bounded else 8.0), 8.0
    z = torch.cartesian_prod(width * midpoints, height * midpoints)
    cell = 4 * width * height / cells**2
    return (-energy.potential(z)).logsumexp(0).item() + math.log(cell)
