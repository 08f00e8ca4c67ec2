"""The eight toy densities in the plane that flows are tried on, with their exact entropies.

The shapes are those of FFJORD [1]; draws are independent where its generators put points on a
regular grid. All densities are known: most are points spread evenly over curves plus noise, a
mixture over the position on the curve, integrated here by Gauss-Legendre quadrature. The entropy is
the least test negative log-likelihood that any model can reach, so the excess of a model over it is
its Kullback-Leibler divergence from the truth.

[1] W. Grathwohl, R. T. Q. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud. FFJORD: Free-form
    continuous dynamics for scalable reversible generative models. arXiv:1810.01367, 2018.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import pyroflows as pf
from pyroflows.arviz import build

CHUNK = 512  # points whose density is computed at a time
TEST_CHUNK = 10_000  # the same for models
NUM_EXPORTED = 2000
NEWTON_STEPS = 10


class Toy(ABC):
    """Hold a density in the plane: draws, log-density and entropy.

    Attributes
    ----------
    entropy
        In nats, by quadrature of the density (:func:`entropy_by_quadrature`) or in closed form.
    """

    entropy: float

    def sample(self, num_draws: int, seed: int = 0) -> Tensor:
        """Return independent draws ``(num_draws, 2)`` in the default dtype."""
        generator = torch.Generator().manual_seed(seed)
        return self._draw(num_draws, generator).to(torch.get_default_dtype())

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density ``(*batch,)`` at points ``(*batch, 2)``."""
        rows = x.reshape(-1, 2).split(CHUNK)
        return torch.cat([self._log_density(row) for row in rows]).reshape(x.shape[:-1])

    @abstractmethod
    def _draw(self, num_draws: int, generator: Generator) -> Tensor: ...

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class NoisyCurves(Toy):
    r"""Spread points over curves and add noise: :math:`x = c_k(u) + s\,\epsilon + w\,\delta`.

    Here :math:`k` is one of ``K`` curves, :math:`u \sim U(0, 1)`, :math:`\epsilon \sim N(0, I)` and
    :math:`\delta` uniform on the unit square around the origin.

    Attributes
    ----------
    curves
        Maps ``u`` of shape ``(N,)`` to points ``(N, K, 2)``.
    entropy
        In nats.
    scale, width
        The noise: :math:`s` and :math:`w`.
    num_nodes
        Number of nodes of the quadrature over :math:`u`.
    """

    curves: Callable[[Tensor], Tensor]
    entropy: float
    scale: float
    width: float = 0.0
    num_nodes: int = 512

    def _draw(self, num_draws: int, generator: Generator) -> Tensor:
        u = torch.rand(num_draws, generator=generator, dtype=torch.float64)
        points = self.curves(u)
        index = torch.randint(points.shape[1], (num_draws,), generator=generator)
        normal = torch.randn(num_draws, 2, generator=generator, dtype=torch.float64)
        uniform = torch.rand(num_draws, 2, generator=generator, dtype=torch.float64) - 0.5
        return points[torch.arange(num_draws), index] + self.scale * normal + self.width * uniform

    def _log_density(self, x: Tensor) -> Tensor:
        nodes, weights = np.polynomial.legendre.leggauss(self.num_nodes)
        centres = self.curves(torch.from_numpy(nodes + 1) / 2).to(x)
        log_weights = torch.from_numpy(weights / 2).log().to(x) - math.log(centres.shape[1])
        log_joint = log_weights.repeat_interleave(centres.shape[1])
        for i in range(2):
            log_joint = log_joint + self._log_noise(x[:, i, None] - centres[..., i].flatten())
        return log_joint.logsumexp(-1)

    def _log_noise(self, offset: Tensor) -> Tensor:
        if not self.width:
            normal = -0.5 * (offset / self.scale).square()
            return normal - math.log(self.scale * math.sqrt(2 * math.pi))
        # The difference of two lower tails, which keeps its digits.
        near = torch.special.log_ndtr((self.width / 2 - offset.abs()) / self.scale)
        far = torch.special.log_ndtr((-self.width / 2 - offset.abs()) / self.scale)
        return near + torch.log(-torch.expm1(far - near)) - math.log(self.width)


@dataclass(frozen=True)
class Checkerboard(Toy):
    """Fill every other cell of a board of 4 x 4 cells of side 2."""

    entropy: float = math.log(32)

    def _draw(self, num_draws: int, generator: Generator) -> Tensor:
        inside = torch.rand(num_draws, 2, generator=generator, dtype=torch.float64)
        column, half = torch.randint(4, (num_draws, 2), generator=generator).unbind(-1)
        row = 2 * (half % 2) + column % 2
        return 2 * (inside + torch.stack([column, row], -1)) - 4

    def _log_density(self, x: Tensor) -> Tensor:
        column, row = (x / 2).floor().unbind(-1)
        filled = (x.abs().amax(-1) < 4) & ((column + row) % 2 == 0)
        return torch.where(filled, x.new_tensor(-math.log(32)), -math.inf)


@dataclass(frozen=True)
class Pinwheel(Toy):
    r"""Bend five normal clouds into vanes: a cloud's point :math:`(a, b)` turns by an angle.

    .. math:: x = 2 R_k(a)^T (a, b)^T, \qquad a \sim N(1, 0.3), \quad b \sim N(0, 0.1)

    with :math:`R_k(a)` the rotation by :math:`\alpha_k(a) = 2 \pi k / 5 + e^a / 4`. The Jacobian
    determinant of :math:`x / 2` is :math:`1 + b e^a / 4`, and :math:`a` is the root of
    :math:`a = r \cos(\phi + \alpha_k(a))` for the point with polar coordinates :math:`2 r, \phi`.
    """

    entropy: float = 2.3178

    def _draw(self, num_draws: int, generator: Generator) -> Tensor:
        noise = torch.randn(num_draws, 2, generator=generator, dtype=torch.float64)
        a, b = 1 + 0.3 * noise[:, 0], 0.1 * noise[:, 1]
        angle = self._angle(a, torch.randint(5, (num_draws,), generator=generator))
        cos, sin = angle.cos(), angle.sin()
        return 2 * torch.stack([a * cos + b * sin, b * cos - a * sin], -1)

    def _log_density(self, x: Tensor) -> Tensor:
        vane = torch.arange(5, device=x.device)
        radius = x.norm(dim=-1, keepdim=True) / 2
        phi = torch.atan2(x[:, 1:], x[:, :1])
        a = radius.expand(-1, 5)  # b is small wherever there is mass
        for _ in range(NEWTON_STEPS):
            angle = phi + self._angle(a, vane)
            slope = 1 + radius * angle.sin() * a.exp() / 4
            a = torch.clamp(a - (a - radius * angle.cos()) / slope, -radius, radius)
        angle = phi + self._angle(a, vane)
        b = radius * angle.sin()
        log_normal = -0.5 * (((a - 1) / 0.3).square() + (b / 0.1).square())
        log_det = (1 + b * a.exp() / 4).abs().log() + math.log(4)
        solved = (a - radius * angle.cos()).abs() <= 1e-4 * radius
        log_terms = torch.where(solved, log_normal - log_det, -math.inf)
        return log_terms.logsumexp(-1) - math.log(2 * math.pi * 0.3 * 0.1 * 5)

    @staticmethod
    def _angle(a: Tensor, vane: Tensor) -> Tensor:
        return 2 * math.pi / 5 * vane + a.exp() / 4


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """Return the points with the given polar coordinates."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _circles(radii: Sequence[float]) -> Callable[[Tensor], Tensor]:
    def curves(u: Tensor) -> Tensor:
        return polar(torch.tensor(radii, dtype=u.dtype), 2 * math.pi * u.unsqueeze(-1))

    return curves


def _eight_points(u: Tensor) -> Tensor:
    radius = torch.full((8,), 4 / 1.414, dtype=u.dtype)
    points = polar(radius, math.pi / 4 * torch.arange(8, dtype=u.dtype))
    return points.expand(len(u), 8, 2)


def _moons(u: Tensor) -> Tensor:
    upper = polar(torch.ones_like(u), math.pi * u)
    lower = upper.new_tensor([1.0, 0.5]) - upper
    return 2 * torch.stack([upper, lower], 1) + upper.new_tensor([-1.0, -0.2])


def _swissroll(u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)
    return polar(angle / 5, angle).unsqueeze(1)


def _spirals(u: Tensor) -> Tensor:
    angle = 3 * math.pi * u.sqrt()
    # A box [0, 1/2]^2 of noise becomes one around the origin.
    arm = (polar(-angle, -angle) + 0.25) / 3
    return torch.stack([arm, -arm], 1)


TOYS: dict[str, Toy] = {
    "moons": NoisyCurves(_moons, 2.3939, scale=0.2, num_nodes=128),
    "8gaussians": NoisyCurves(_eight_points, 2.8319, scale=0.5 / 1.414, num_nodes=1),
    "pinwheel": Pinwheel(),
    "swissroll": NoisyCurves(_swissroll, 2.6696, scale=0.2, num_nodes=320),
    "rings": NoisyCurves(_circles([0.75, 1.5, 2.25, 3.0]), 2.6232, scale=0.08),
    "circles": NoisyCurves(_circles([1.5, 3.0]), 3.2681, scale=0.24, num_nodes=192),
    "2spirals": NoisyCurves(_spirals, 2.6455, scale=0.1, width=1 / 6, num_nodes=320),
    "checkerboard": Checkerboard(),
}


def entropy_by_quadrature(toy: Toy, cells: int = 600, bound: float = 6.0) -> tuple[float, float]:
    """Integrate a density and its entropy over ``[-bound, bound]^2`` by the midpoint rule.

    The midpoint rule is as good as exact once the cells are smaller than half the noise.

    Parameters
    ----------
    toy
        The density.
    cells
        Number of cells along each axis.
    bound
        Half the side of the square.

    Returns
    -------
    tuple
        The total mass, which should be one, and the entropy in nats.
    """
    side = 2 * bound / cells
    centres = (torch.arange(cells, dtype=torch.float64) + 0.5) * side - bound
    log_prob = toy.log_prob(torch.cartesian_prod(centres, centres))
    mass = log_prob.exp() * side**2
    return mass.sum().item(), -(torch.special.xlogy(mass, log_prob.exp())).sum().item()


@torch.no_grad()
def divergence(model: pf.Flow, toy: Toy, test: Tensor) -> dict[str, float]:
    """Compare a model with a toy density on test points ``(N, 2)`` drawn from the toy.

    Returns
    -------
    dict
        The test negative log-likelihood ``"NLL"`` with its ``"standard error"``, and the
        Kullback-Leibler divergence ``"KL"`` from toy to model: its excess over the entropy.
    """
    losses = -torch.cat([model.log_prob(rows) for rows in test.split(TEST_CHUNK)]).double()
    mean = losses.mean().item()
    error = losses.std().item() / math.sqrt(len(losses))
    return {"NLL": mean, "standard error": error, "KL": mean - toy.entropy}


@torch.no_grad()
def to_arviz(models: Mapping[str, pf.Flow], toy: Toy, seed: int) -> Any:
    """Return draws of models, and data from the toy that they learned, as an ArviZ object.

    A density has no posterior: new data are what it predicts.
    """
    size = torch.Size([1, NUM_EXPORTED])
    draws = {name: model.sample(size).cpu().numpy() for name, model in models.items()}
    data = toy.sample(NUM_EXPORTED, seed).numpy()
    dims = {"data": ["row", "coordinate"], **{name: ["coordinate"] for name in draws}}
    return build({"posterior_predictive": draws, "observed_data": {"data": data}}, dims=dims)
