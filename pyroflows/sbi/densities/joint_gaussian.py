"""What the covariance of parameters and observations knows of some entries given others."""

from __future__ import annotations

import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

RIDGE = 1e-5  # added to correlation matrices: what single precision resolves


class JointGaussian(nn.Module):
    r"""Whiten the free entries of a vector given the others, as if all were jointly normal.

    With the precision matrix :math:`P` of standardised vectors :math:`u`, free entries :math:`f`
    and given ones :math:`c`,

    .. math:: w_f = K^\top (u_f - m_f) , \qquad K K^\top = P_{ff} , \quad
        m_f = -P_{ff}^{-1} P_{fc} u_c .

    Where the vectors are jointly normal, ``w`` is standard normal and independent of what is
    given, for any choice of it. Given entries of ``w`` are 0. Costs ``O(D^3)`` for each choice.

    Features, here, are the vectors with 0 for free entries, and behind them 1 for each of these:
    see :class:`MarkMissing`.

    Parameters
    ----------
    dim
        Size ``D`` of the vectors.

    References
    ----------
    [1] O. Ledoit, M. Wolf. A well-conditioned estimator for large-dimensional covariance matrices.
        Journal of Multivariate Analysis 88(2), 2004.

    Examples
    --------
    >>> vectors = torch.randn(100, 3).cumsum(-1)
    >>> features = torch.tensor([2.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    >>> gaussian = JointGaussian(3).fit(vectors)
    >>> gaussian.colour(torch.randn(5, 3), features)[:, 0]
    tensor([2., 2., 2., 2., 2.])
    """

    loc: Tensor
    precision: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("precision", torch.eye(dim))

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> JointGaussian:
        """Read mean and covariance from standardised vectors, shape ``(N, D)``.

        The covariance is shrunk as Ledoit and Wolf [1] do, so that few vectors are enough.
        """
        rows = vectors.double()
        covariance = torch.as_tensor(ledoit_wolf(rows.cpu().numpy())[0]).to(rows)
        covariance += RIDGE * torch.eye(len(covariance)).to(covariance)
        self.loc.copy_(rows.mean(0))
        self.precision.copy_(torch.linalg.inv(covariance))
        return self

    def whiten(self, vectors: Tensor, features: Tensor) -> Tensor:
        """Return ``w``, shape ``(*batch, D)``."""
        factor, shift = self._conditional(features)
        free = features[..., self._is_free]
        centred = (free * (vectors - self.loc)).unsqueeze(-1)
        return free * (factor.mT @ centred).squeeze(-1) + shift

    def colour(self, w: Tensor, features: Tensor) -> Tensor:
        """Return the vectors, given entries included, shape ``(*batch, D)``."""
        factor, shift = self._conditional(features)
        free = features[..., self._is_free]
        rows = (free * w - shift).unsqueeze(-1)
        residual = torch.linalg.solve_triangular(factor.mT, rows, upper=True).squeeze(-1)
        return free * (self.loc + residual) + self._given(features)

    def log_abs_det_jacobian(self, features: Tensor) -> Tensor:
        """Return ``log|det du/dw|`` of the free entries, shape ``(*batch,)``."""
        return -self._conditional(features)[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def _conditional(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``K``, the identity in given entries, and the shift of ``w`` that they cause."""
        free = features[..., self._is_free]
        centred = self._given(features) - (1 - free) * self.loc
        both = free.unsqueeze(-1) * free.unsqueeze(-2)
        factor = torch.linalg.cholesky(both * self.precision + torch.diag_embed(1 - free))
        pull = (free * (centred @ self.precision)).unsqueeze(-1)
        return factor, torch.linalg.solve_triangular(factor, pull, upper=False).squeeze(-1)

    @property
    def _is_free(self) -> slice:
        return slice(len(self.loc), None)

    def _given(self, features: Tensor) -> Tensor:
        return features[..., : len(self.loc)]
