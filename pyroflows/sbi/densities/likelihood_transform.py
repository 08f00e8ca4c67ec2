"""A flow of observations given parameters, in units of the simulations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import flows
from ...nn.residual_mlp import ResidualMLP
from ...transforms import FlowTransform
from ..model.observations import Standardizer
from ..model.space import ParameterSpace

SUMMARY_DIM = 64
MAX_CORRELATED = 32  # entries; the matrix of more is diagonal
RIDGE = 1e-4  # of the regression, on standardised features


class LikelihoodTransform(FlowTransform):
    r"""Map noise to an observation, given unconstrained parameters.

    .. math:: s(x) = A \phi(z) + b + r \odot \left[ m(\phi(z)) + P(\phi(z))^{-1}
        f(u; \phi(z), e(\phi(z))) \right]

    with standardised observations :math:`s(x)`, standardised parameters :math:`\phi(z)`, both
    unconstrained and constrained, and a flow :math:`f`. One network gives a shift :math:`m`, a
    lower triangular matrix :math:`P`, and a summary :math:`e` for the flow. Where noise is normal,
    its mean and covariance any functions of the parameters, the network is all that it takes:
    correlations that change with the parameters are learned from far fewer simulations than by a
    flow alone. The linear part, a regression to begin with, is learned with the rest.

    Parameters
    ----------
    space
        The parameters.
    size
        Number of entries ``V`` of an observation. With more than 32, the matrix is diagonal.
    flow
        Name of a registered flow.
    **options
        Options of the flow.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> space = ParameterSpace({"theta": (dist.Uniform(-1.0, 1.0), torch.Size([2]))})
    >>> LikelihoodTransform(space, 3).condition(torch.randn(7, 2))(torch.randn(7, 3)).shape
    torch.Size([7, 3])
    """

    residual_scale: Tensor

    def __init__(self, space: ParameterSpace, size: int, flow: str = "maf", **options: Any) -> None:
        super().__init__(size, space.dim)
        self.features = ParameterFeatures(space)
        self.units = Standardizer(size)
        self.linear = nn.Linear(self.features.size, size)
        self.register_buffer("residual_scale", torch.ones(size))
        num_below = size * (size - 1) // 2 if size <= MAX_CORRELATED else 0
        self.sizes = [size, size, num_below, SUMMARY_DIM]
        # One pass for a whole set, while the flow takes one for each element: it may be large.
        self.network = ResidualMLP(self.features.size, sum(self.sizes))
        with torch.no_grad():
            for parameter in self.network.output.parameters():
                parameter[:-SUMMARY_DIM].zero_()
        self.flow = flows.flow(flow, size, self.features.size + SUMMARY_DIM, **options)

    @torch.no_grad()
    def prepare(self, x: Tensor, z: Tensor) -> None:
        """Take units and the regression from simulations, ``(N, n, V)`` and ``(N, D)``."""
        self.units.fit(x)
        self.features.fit(z)
        standard, features = self.units(x), self.features(z)
        design = torch.cat([features, torch.ones_like(features[:, :1])], -1).double()
        gram = design.T @ design / len(design) + RIDGE * torch.eye(design.shape[1]).to(design)
        weight = torch.linalg.solve(gram, design.T @ standard.mean(1).double() / len(design))
        self.linear.weight.copy_(weight[:-1].T)
        self.linear.bias.copy_(weight[-1])
        residual = standard - self.linear(features).unsqueeze(1)
        self.residual_scale.copy_(residual.flatten(0, 1).std(0))

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        normal, condition = self._given(context)
        white, log_det = self.flow.forward_and_log_det(x, condition)
        y = self._in_data_units(normal.colour(white))
        return y, log_det - normal.log_det - self._log_derivative(y)

    def inverse_and_log_det(
        self, y: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        normal, condition = self._given(context)
        x, log_det = self.flow.inverse_and_log_det(normal.whiten(self.units(y)), condition)
        return x, log_det + normal.log_det + self._log_derivative(y)

    def _given(self, z: Tensor | None) -> tuple[_Normal, Tensor]:
        """Return the normal distribution to begin with, and what the flow is conditioned on."""
        features = self.features(z)
        outputs = self.network(features).split(self.sizes, -1)
        shift, log_precision, below, summary = outputs
        loc = self.linear(features) + self.residual_scale * shift
        normal = _Normal(loc, log_precision - self.residual_scale.log(), below)
        return normal, torch.cat([features, summary], -1)

    def _in_data_units(self, standard: Tensor) -> Tensor:
        units = self.units
        inner = units.loc + units.scale * standard
        return units.median + units.spread * torch.where(units.compressed > 0, inner.sinh(), inner)

    def _log_derivative(self, y: Tensor) -> Tensor:
        """Return ``log|det|`` of the way from data to standardised data."""
        units = self.units
        inner = (y - units.median) / units.spread
        compression = torch.where(units.compressed > 0, -0.5 * inner.square().log1p(), 0.0)
        return (compression - (units.scale * units.spread).log()).sum(-1)


class _Normal(NamedTuple):
    r"""Whiten by :math:`(I + B) \, \mathrm{diag}(e^p) (s - \mu)`, B strictly lower triangular."""

    loc: Tensor
    log_precision: Tensor
    below: Tensor

    @property
    def log_det(self) -> Tensor:
        return self.log_precision.sum(-1)

    def whiten(self, standard: Tensor) -> Tensor:
        scaled = (standard - self.loc) * self.log_precision.exp()
        if self.below.shape[-1] == 0:
            return scaled
        return (self._matrix() @ scaled.unsqueeze(-1)).squeeze(-1)

    def colour(self, white: Tensor) -> Tensor:
        if self.below.shape[-1] > 0:
            rows = white.unsqueeze(-1)
            white = torch.linalg.solve_triangular(
                self._matrix(), rows, upper=False, unitriangular=True
            ).squeeze(-1)
        return self.loc + white * (-self.log_precision).exp()

    def _matrix(self) -> Tensor:
        size = self.loc.shape[-1]
        row, column = torch.tril_indices(size, size, -1, device=self.loc.device)
        matrix = torch.eye(size).to(self.below).repeat(*self.below.shape[:-1], 1, 1)
        matrix[..., row, column] = self.below
        return matrix


class ParameterFeatures(nn.Module):
    """Turn unconstrained parameters into what networks read: both spaces, standardised.

    What is smooth in the parameters themselves may be steep in unconstrained ones near a bound, and
    the other way round. Sites that have no bounds come once.

    Parameters
    ----------
    space
        The parameters.

    Examples
    --------
    >>> import pyro.distributions as dist
    >>> space = ParameterSpace({"theta": (dist.Uniform(-1.0, 1.0), torch.Size([2]))})
    >>> ParameterFeatures(space)(torch.zeros(3, 2)).shape
    torch.Size([3, 4])
    """

    def __init__(self, space: ParameterSpace) -> None:
        super().__init__()
        self.space = space
        probe = torch.linspace(-1.0, 1.0, 5).unsqueeze(-1).expand(5, space.dim)
        values, parts = space.constrain(probe), probe.split(space.sizes, -1)
        self.bounded = [
            name
            for name, part in zip(space.names, parts, strict=True)
            if not torch.equal(values[name].reshape(len(part), -1), part)
        ]
        self.size = self._both(probe).shape[-1]
        self.units = Standardizer(self.size)

    def fit(self, z: Tensor) -> None:
        """Read the scales from draws, shape ``(N, D)``."""
        self.units.fit(self._both(z))

    def forward(self, z: Tensor) -> Tensor:
        """Return features ``(*batch, F)`` of vectors ``(*batch, D)``."""
        return self.units(self._both(z))

    def _both(self, z: Tensor) -> Tensor:
        values = self.space.constrain(z)
        batch_shape, shapes = z.shape[:-1], self.space.shapes
        constrained = [
            values[name].reshape((*batch_shape, shapes[name].numel())) for name in self.bounded
        ]
        return torch.cat([z, *constrained], -1)
