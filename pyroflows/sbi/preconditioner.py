"""What linear regression knows of parameters given observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearGaussian(nn.Module):
    r"""Whiten parameters given features by linear regression.

    .. math:: z = m + A \phi(x) + L w , \qquad w \sim \text{mean } 0 \text{, covariance } I

    over the simulations, with :math:`L` lower triangular. Where parameters and observations are
    jointly normal, ``w`` is standard normal and independent of ``x``: nothing is left to learn.

    Parameters
    ----------
    dim
        Size of ``z``.
    num_features
        Size of :math:`\phi(x)`.

    Examples
    --------
    >>> z, features = torch.randn(100, 2), torch.randn(100, 3)
    >>> linear = LinearGaussian(2, 3).fit(z, features)
    >>> bool(torch.allclose(linear.colour(linear.whiten(z, features), features), z, atol=1e-5))
    True
    """

    loc: Tensor
    slope: Tensor
    scale_tril: Tensor

    def __init__(self, dim: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("slope", torch.zeros(num_features, dim))
        self.register_buffer("scale_tril", torch.eye(dim))

    @torch.no_grad()
    def fit(self, z: Tensor, features: Tensor, ridge: float = 1e-3) -> LinearGaussian:
        """Regress ``z``, shape ``(N, D)``, on standardised features, shape ``(N, F)``."""
        z, features = z.double(), features.double()
        mean, centred = z.mean(0), features - features.mean(0)
        gram = centred.T @ centred / len(z)
        gram += ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        slope = torch.linalg.solve(gram, centred.T @ (z - mean) / len(z))
        residual = z - mean - centred @ slope
        covariance = residual.T @ residual / len(z)
        covariance += 1e-8 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(gram)
        self.loc.copy_(mean - features.mean(0) @ slope)
        self.slope.copy_(slope)
        self.scale_tril.copy_(torch.linalg.cholesky(covariance))
        return self

    def whiten(self, z: Tensor, features: Tensor) -> Tensor:
        """Return ``w``, shape ``(*batch, D)``."""
        rows = (z - self.loc - features @ self.slope).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, rows, upper=False).squeeze(-1)

    def colour(self, w: Tensor, features: Tensor) -> Tensor:
        """Return ``z``, shape ``(*batch, D)``."""
        return self.loc + features @ self.slope + w @ self.scale_tril.T

    @property
    def log_abs_det_jacobian(self) -> Tensor:
        """Return ``log|det dz/dw|``."""
        return self.scale_tril.diagonal().log().sum()
