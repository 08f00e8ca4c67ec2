"""Leave-one-out cross-validation from draws of an approximate posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyroflows.diagnostics.checks import check_tensor
from pyroflows.diagnostics.frames import frame
from pyroflows.diagnostics.psis import checked_log_weights, psis


@dataclass(frozen=True, eq=False, repr=False)
class LOO:
    r"""Hold how well each observation is predicted by all others.

    Attributes
    ----------
    elpd_i : Tensor, shape ``(*shape)``
        Log predictive density of each observation given the others,
        :math:`\log p(y_i | y_{-i})`, in nats.
    lpd_i : Tensor, shape ``(*shape)``
        The same given all observations, :math:`\log p(y_i | y)`.
    mcse_i : Tensor, shape ``(*shape)``
        Monte Carlo standard errors of ``elpd_i``.
    khat : Tensor, shape ``(*shape)``
        Tail index of the importance weights that leave an observation out.
    num_draws : int
        Number of draws.
    dims : tuple of str
        Names of the dimensions in ``shape``.

    Examples
    --------
    >>> from torch.distributions import Normal
    >>> y, mean = torch.tensor([-1.0, 0.0, 1.5]), Normal(0.2, 0.5).sample((1000,))
    >>> loo(Normal(mean.unsqueeze(-1), 1.0).log_prob(y)).elpd_i.shape
    torch.Size([3])
    """

    elpd_i: Tensor
    lpd_i: Tensor
    mcse_i: Tensor
    khat: Tensor
    num_draws: int
    dims: tuple[str, ...]

    @property
    def elpd(self) -> float:
        """Return the sum over observations: what models are compared by."""
        return self.elpd_i.sum().item()

    @property
    def standard_error(self) -> float:
        """Return the standard error of ``elpd`` as an estimate for new observations like these."""
        return math.sqrt(self.elpd_i.numel() * self.elpd_i.var(correction=0).item())

    @property
    def mcse(self) -> float:
        """Return the Monte Carlo standard error of ``elpd``, of observations one by one."""
        return self.mcse_i.square().sum().sqrt().item()

    @property
    def p(self) -> float:
        """Return how much better observations are predicted when seen: the effective parameters."""
        return (self.lpd_i - self.elpd_i).sum().item()

    @property
    def khat_limit(self) -> float:
        """Return the k-hat above which so many draws are too few."""
        return min(1 - 1 / math.log10(self.num_draws), 0.7)

    @property
    def is_reliable(self) -> bool:
        """Tell whether every observation can be left out by weights."""
        return bool((self.khat <= self.khat_limit).all())

    def summary(self) -> pd.DataFrame:
        """Tabulate observations, a row each; the sums are in ``attrs``."""
        columns = {
            "elpd": self.elpd_i,
            "mcse": self.mcse_i,
            "p": self.lpd_i - self.elpd_i,
            "khat": self.khat,
        }
        table = frame(columns, self.dims)
        table.attrs.update(elpd=self.elpd, standard_error=self.standard_error, p=self.p)
        return table

    def to_arviz(self, coords: Mapping[str, Sequence[Any]] | None = None) -> Any:
        """Return what ArviZ's own ``loo`` returns, for ``compare`` and ``plot_khat``.

        Parameters
        ----------
        coords
            Labels of dimensions.

        Returns
        -------
        arviz.ELPDData
            With pointwise values.
        """
        from pyroflows.arviz import elpd_data  # imported late: importing arviz takes seconds

        return elpd_data(
            self.elpd_i.numpy(),
            self.khat.numpy(),
            p=self.p,
            num_draws=self.num_draws,
            khat_limit=self.khat_limit,
            dims=self.dims,
            coords=coords,
        )

    def __repr__(self) -> str:
        return (
            f"LOO(elpd={self.elpd:.2f}, standard_error={self.standard_error:.2f}, p={self.p:.2f}, "
            f"largest khat={self.khat.max().item():.2f} of {self.khat.numel()})"
        )


def loo(
    log_likelihood: Tensor,
    log_weights: Tensor | None = None,
    dims: Sequence[str] | None = None,
) -> LOO:
    r"""Predict each observation from all others, by weighting draws instead of fitting again.

    Draws :math:`\theta_s` from an approximation :math:`q` of the posterior are draws from the
    posterior without observation :math:`i` when weighted by

    .. math:: w_{is} \propto
        \frac{p(\theta_s, y)}{q(\theta_s)} \cdot \frac{1}{p(y_i | \theta_s)},

    which corrects the approximation and leaves the observation out at once [1]. The weights of
    each observation are smoothed [2], and

    .. math:: \log p(y_i | y_{-i}) \approx
        \log \frac{\sum_s w_{is}\, p(y_i | \theta_s)}{\sum_s w_{is}} .

    Parameters
    ----------
    log_likelihood
        :math:`\log p(y_i | \theta_s)` in nats, shape ``(S, *shape)`` with one dimension or more
        of observations, which are independent given the parameters.
    log_weights
        :math:`\log p(\theta_s, y) - \log q(\theta_s)` up to a constant, shape ``(S,)``. Default:
        equal, for independent draws from the posterior itself.
    dims
        Names of the dimensions in ``shape``. Default: ``observation_dim_0``, ...

    Returns
    -------
    LOO
        Pointwise results, on the CPU in double precision.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        If shapes disagree, there is NaN, or a likelihood is zero or infinite where there is weight.

    Notes
    -----
    Costs one :func:`~pyroflows.diagnostics.psis` for each observation.

    References
    ----------
    [1] M. Magnusson, M. R. Andersen, J. Jonasson, A. Vehtari. Bayesian leave-one-out
        cross-validation for large data. ICML 2019,
        `arXiv:1904.10679 <https://arxiv.org/abs/1904.10679>`_.
    [2] A. Vehtari, A. Gelman, J. Gabry. Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC. Statistics and Computing 27, 2017,
        `arXiv:1507.04544 <https://arxiv.org/abs/1507.04544>`_.

    Examples
    --------
    A normal mean with a flat prior and unit noise: without one of four observations, its posterior
    is that of the other three. The approximation is too wide, and does not know of the data:

    >>> import torch
    >>> from torch.distributions import Normal
    >>> y, draws = torch.tensor([-1.0, 0.0, 0.5, 1.5]), Normal(0.0, 1.0).sample((20_000,))
    >>> log_likelihood = Normal(draws.unsqueeze(-1), 1.0).log_prob(y)
    >>> result = loo(log_likelihood, log_likelihood.sum(-1) - Normal(0.0, 1.0).log_prob(draws))
    >>> exact = Normal((y.sum() - y) / 3, (1 + 1 / 3) ** 0.5).log_prob(y).sum().item()
    >>> abs(result.elpd - exact) < 0.1, result.is_reliable
    (True, True)
    """
    check_tensor("log_likelihood", log_likelihood, "S", "N")
    shape = log_likelihood.shape[1:]
    names = [f"observation_dim_{i}" for i in range(len(shape))] if dims is None else dims
    if len(names) != len(shape):
        raise ValueError(f"dims must name {len(shape)} dimensions, {tuple(shape)}, got {dims}")
    # By observation, in double precision: a weight is a difference of large numbers.
    rows = log_likelihood.detach().to("cpu", torch.float64).reshape(len(log_likelihood), -1).T
    base = torch.zeros(rows.shape[1]) if log_weights is None else log_weights
    check_tensor("log_weights", base, rows.shape[1])
    base = checked_log_weights(base)
    is_zero = base == -torch.inf
    if not bool(rows[:, ~is_zero].isfinite().all()):
        raise ValueError("log_likelihood must be finite at draws that log_weights give weight")
    rows = rows.masked_fill(is_zero, -torch.inf)
    posterior, _ = psis(base)
    pointwise = [_left_out(row, torch.where(is_zero, base, base - row)) for row in rows]
    elpd, mcse, khat = torch.tensor(pointwise, dtype=torch.float64).reshape(-1, 3).unbind(-1)
    lpd = (posterior + rows).logsumexp(-1)
    elpd, lpd, mcse, khat = (each.reshape(shape) for each in (elpd, lpd, mcse, khat))
    return LOO(elpd, lpd, mcse, khat, len(log_likelihood), tuple(names))


def _left_out(log_likelihood: Tensor, log_weights: Tensor) -> tuple[float, float, float]:
    """Return the log predictive density of an observation, its standard error, and k-hat."""
    smoothed, khat = psis(log_weights)
    elpd = (smoothed + log_likelihood).logsumexp(0)
    deviations = smoothed.exp() * ((log_likelihood - elpd).exp() - 1)
    return elpd.item(), deviations.square().sum().sqrt().item(), khat
