"""What the covariance of parameters and observations knows given any of the observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_SIZE = 32  # of vectors: each pattern of missing entries costs a factorisation
RIDGE = 1e-6  # relative to the variance of each variable


class SubsetGaussian(nn.Module):
    r"""Whiten parameters given the entries of an observation that are not missing.

    .. math:: z = m_z + \Sigma_{zo} \Sigma_{oo}^{-1} (x_o - m_o) + L_o w , \qquad
        L_o L_o^\top = \Sigma_{zz} - \Sigma_{zo} \Sigma_{oo}^{-1} \Sigma_{oz} ,

    with the entries ``o`` that are there, and mean and covariance of the simulations. Where
    parameters and observations are jointly normal, ``w`` is standard normal and independent of
    ``x``, whatever is missing. Features, here, are the observations themselves, NaN where missing.

    Parameters
    ----------
    dim
        Size ``D`` of ``z``.
    size
        Size ``V`` of ``x``. Each observation costs ``O(V^3 + D^3)``.

    Examples
    --------
    >>> z = torch.randn(100, 2)
    >>> gaussian = SubsetGaussian(2, 3).fit(z, torch.randn(100, 3))
    >>> x = torch.tensor([[1.0, 0.0, 2.0], [1.0, torch.nan, torch.nan]])
    >>> gaussian.colour(torch.randn(5, 2, 2), x).shape
    torch.Size([5, 2, 2])
    """

    loc: Tensor
    x_loc: Tensor
    x_covariance: Tensor
    cross_covariance: Tensor
    z_covariance: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("x_loc", torch.zeros(size))
        # What is left of a variance may be a small difference: covariances are in double precision.
        self.register_buffer("x_covariance", torch.eye(size).double())
        self.register_buffer("cross_covariance", torch.zeros(size, dim).double())
        self.register_buffer("z_covariance", torch.eye(dim).double())

    @torch.no_grad()
    def fit(self, z: Tensor, x: Tensor) -> SubsetGaussian:
        """Read mean and covariance from rows ``(N, D)`` and ``(N, V)`` without missing entries."""
        z, x = z.double(), x.double()
        z_centred, x_centred = z - z.mean(0), x - x.mean(0)
        self.loc.copy_(z.mean(0))
        self.x_loc.copy_(x.mean(0))
        self.x_covariance.copy_(_ridged(x_centred.T @ x_centred / len(x)))
        self.cross_covariance.copy_(x_centred.T @ z_centred / len(x))
        self.z_covariance.copy_(_ridged(z_centred.T @ z_centred / len(x)))
        return self

    def whiten(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ``w``, shape ``(*batch, D)``."""
        mean, scale_tril = self._conditional(x)
        rows = (z - mean).unsqueeze(-1)
        return torch.linalg.solve_triangular(scale_tril, rows, upper=False).squeeze(-1)

    def colour(self, w: Tensor, x: Tensor) -> Tensor:
        """Return ``z``, shape ``(*batch, D)``."""
        mean, scale_tril = self._conditional(x)
        return mean + (scale_tril @ w.unsqueeze(-1)).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor) -> Tensor:
        """Return ``log|det dz/dw|``, shape ``(*batch,)``."""
        return self._conditional(x)[1].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @torch.no_grad()
    def _conditional(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and Cholesky factor of the parameters given what is there."""
        there = (~x.isnan()).double()
        pairs = there.unsqueeze(-1) * there.unsqueeze(-2)
        # Missing entries become variables of their own, uncorrelated with all others.
        covariance = pairs * self.x_covariance + torch.diag_embed(1 - there)
        cross = there.unsqueeze(-1) * self.cross_covariance
        slope = torch.cholesky_solve(cross, torch.linalg.cholesky(covariance))
        deviation = (x - self.x_loc).nan_to_num().double()
        mean = self.loc + (deviation.unsqueeze(-2) @ slope).squeeze(-2)
        scale_tril = torch.linalg.cholesky(self.z_covariance - cross.mT @ slope)
        return mean.to(self.loc), scale_tril.to(self.loc)


def _ridged(covariance: Tensor) -> Tensor:
    variance = covariance.diagonal()
    return covariance + RIDGE * torch.diag(torch.where(variance > 0, variance, 1.0))
