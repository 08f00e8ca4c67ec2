"""What linear regression knows of parameters given observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_FEATURES = 500  # more are replaced by as many of their principal components
COMPONENT_ROWS = 2000  # the rows that components are read from
NUM_RIDGES = 25
SMALLEST_POWER = 1e-13  # of a direction, relative to the largest: less is rounding error
MAX_FREEDOM = 0.1  # degrees of freedom a row, at most: what is whitened is what was regressed on
REWEIGHTINGS = 3
LOG_CHI_SQUARE = -1.2704  # mean of the logarithm of a squared standard normal variable


class LinearGaussian(nn.Module):
    r"""Whiten parameters given features by linear regression.

    .. math:: z = m + A \phi(x) + e^{\Gamma \psi(x)} \odot L w ,
        \qquad w \sim \text{mean } 0 \text{, covariance } I

    over the simulations, with :math:`L` lower triangular and :math:`\psi` the last features, those
    that say how much was observed. Where parameters and observations are jointly normal, ``w`` is
    standard normal and independent of ``x``: nothing is left to learn.

    Slopes are shrunk by a ridge for each parameter, chosen by generalised cross-validation [1], so
    that any number of features is safe.

    Parameters
    ----------
    dim
        Size ``D`` of ``z``.
    num_features
        Size ``F`` of :math:`\phi(x)`.
    num_scaling
        Size of :math:`\psi(x)`. Default: 0, the same scale for all.

    References
    ----------
    [1] G. H. Golub, M. Heath, G. Wahba. Generalized cross-validation as a method for choosing a
        good ridge parameter. Technometrics 21, 1979.

    Examples
    --------
    >>> z, features = torch.randn(100, 2), torch.randn(100, 3)
    >>> linear = LinearGaussian(2, 3).fit(z, features)
    >>> bool(torch.allclose(linear.colour(linear.whiten(z, features), features), z, atol=1e-5))
    True
    """

    loc: Tensor
    slope: Tensor
    scale_slope: Tensor
    scale_tril: Tensor

    def __init__(self, dim: int, num_features: int, num_scaling: int = 0) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("slope", torch.zeros(num_features, dim))
        self.register_buffer("scale_slope", torch.zeros(num_scaling, dim))
        self.register_buffer("scale_tril", torch.eye(dim))

    @torch.no_grad()
    def fit(self, z: Tensor, features: Tensor) -> LinearGaussian:
        """Regress ``z``, shape ``(N, D)``, on features, shape ``(N, F)``; costs ``O(N F^2)``."""
        z, features = z.double(), features.double()
        scaling = features[:, features.shape[1] - len(self.scale_slope) :]
        log_scale = torch.zeros_like(z)
        loc, slope, freedom = _regress(z, features)
        if len(self.scale_slope):
            for _ in range(REWEIGHTINGS):
                residual = z - loc - features @ slope
                log_scale = self._fit_scale(residual, scaling)
                weight = (-2 * log_scale.mean(1)).exp()
                loc, slope, freedom = _regress(z, features, weight)
        residual = (z - loc - features @ slope) / log_scale.exp()
        residual = residual / (1 - freedom / len(z))  # as large as that of new rows
        covariance = residual.T @ residual / len(z)
        covariance += 1e-8 * covariance.diagonal().mean() * torch.eye(len(covariance)).to(z)
        self.loc.copy_(loc)
        self.slope.copy_(slope)
        self.scale_tril.copy_(torch.linalg.cholesky(covariance))
        return self

    def _fit_scale(self, residual: Tensor, scaling: Tensor) -> Tensor:
        """Regress the logarithm of squared residuals; return half of what is fitted."""
        tiny = torch.finfo(residual.dtype).tiny
        log_square = residual.square().clamp(min=tiny).log() - LOG_CHI_SQUARE
        _, slope, _ = _regress(log_square, scaling)
        self.scale_slope.copy_(slope / 2)
        return scaling @ slope / 2

    def whiten(self, z: Tensor, features: Tensor) -> Tensor:
        """Return ``w``, shape ``(*batch, D)``."""
        residual = (z - self.loc - features @ self.slope) / self._log_scale(features).exp()
        rows = residual.reshape(residual.shape[:-1].numel(), residual.shape[-1])
        # One matrix with many right-hand sides: a batch of solves takes five times as long.
        w = torch.linalg.solve_triangular(self.scale_tril.T, rows, upper=True, left=False)
        return w.reshape(residual.shape)

    def colour(self, w: Tensor, features: Tensor) -> Tensor:
        """Return ``z``, shape ``(*batch, D)``."""
        residual = self._log_scale(features).exp() * (w @ self.scale_tril.T)
        return self.loc + features @ self.slope + residual

    def log_abs_det_jacobian(self, features: Tensor) -> Tensor:
        """Return ``log|det dz/dw|``, shape ``(*batch,)``."""
        return self._log_scale(features).sum(-1) + self.scale_tril.diagonal().log().sum()

    def _log_scale(self, features: Tensor) -> Tensor:
        return features[..., features.shape[-1] - len(self.scale_slope) :] @ self.scale_slope


def _regress(
    z: Tensor, features: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return intercepts, slopes and degrees of freedom of a regression of each column of ``z``."""
    weight = torch.ones_like(z[:, 0]) if weight is None else weight / weight.mean()
    z_mean, mean = (weight @ z) / len(z), (weight @ features) / len(z)
    root = weight.sqrt().unsqueeze(-1)
    target, centred = root * (z - z_mean), root * (features - mean)
    components = _components(centred)
    slope, freedom = _ridge(target, centred if components is None else centred @ components)
    if components is not None:
        slope = components @ slope
    return z_mean - mean @ slope, slope, freedom


def _components(centred: Tensor) -> Tensor | None:
    """Return the directions to reduce the features to, ``None`` where they are few."""
    if centred.shape[1] <= MAX_FEATURES:
        return None
    rows = centred[:COMPONENT_ROWS].float()
    number = min(MAX_FEATURES, len(rows))
    return torch.pca_lowrank(rows, number, center=False)[2].to(centred)


def _ridge(z: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes and degrees of freedom that generalise best, column by column."""
    number = len(z)
    power, directions = torch.linalg.eigh(centred.T @ centred / number)
    top = power[-1].clamp(min=torch.finfo(power.dtype).tiny)
    power = power.clamp(min=SMALLEST_POWER * top)
    covariance = directions.T @ (centred.T @ z) / number
    ridges = top * torch.logspace(-9, 2, NUM_RIDGES, dtype=z.dtype, device=z.device)
    kept = power / (power + ridges.unsqueeze(-1))  # (ridges, directions)
    freedom = 1 + kept.sum(-1)
    explained = (1 - (1 - kept).square()) @ (covariance.square() / power.unsqueeze(-1))
    error = (z.square().mean(0) - explained).clamp(min=0)
    score = error / (1 - freedom.unsqueeze(-1) / number).square()
    score[freedom > max(MAX_FREEDOM * number, freedom.min())] = torch.inf
    best = score.argmin(0)
    return directions @ (covariance * (kept[best].T / power.unsqueeze(-1))), freedom[best]
