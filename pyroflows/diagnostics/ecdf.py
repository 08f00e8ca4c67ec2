"""Empirical distribution of ranks, with exact simultaneous bands for the uniform one.

Ranks of true values among the draws of calibrated posteriors are independent and uniform, and so
are other statistics of calibration. They all are tested here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import gammaln, xlogy
from torch import Tensor

_MAX_BINS = 100
_NUM_BISECTIONS = 25


class RankECDF(NamedTuple):
    """Hold an empirical distribution of ranks, minus the uniform one, and its bands.

    Attributes
    ----------
    levels : Tensor, shape (K,)
        Levels between 0 and 1 at which the distributions are compared.
    difference : Tensor, shape ``(K, *event)``
        Share of ranks below each level, minus the level.
    lower, upper : Tensor, shape (K,)
        Bands: if ranks are uniform, a whole curve stays within them, limits included, with the
        stated confidence.

    Examples
    --------
    >>> import torch
    >>> ecdf = rank_ecdf(torch.arange(101), 100)
    >>> bool(((ecdf.lower <= ecdf.difference) & (ecdf.difference <= ecdf.upper)).all())
    True
    """

    levels: Tensor
    difference: Tensor
    lower: Tensor
    upper: Tensor


def rank_ecdf(ranks: Tensor, num_draws: int, confidence: float = 0.95) -> RankECDF:
    r"""Compare the distribution of ranks with the uniform one, with simultaneous bands.

    At levels :math:`z_k = r_k / (L + 1)` with whole :math:`r_k`, the number of :math:`N` uniform
    ranks below :math:`r_k` is exactly binomial. The bands are binomial quantiles at
    :math:`\gamma / 2` and :math:`1 - \gamma / 2` around every level, with :math:`\gamma` adjusted
    until a whole curve stays inside with the stated confidence [1].

    That probability is computed, not simulated: the counts between levels are independent Poisson
    numbers given their sum, so that a recursion over the levels, each step a convolution, gives it
    to machine precision [2]. The counts being discrete, the true confidence is a little larger
    than the stated one.

    Parameters
    ----------
    ranks : Tensor, shape ``(N, *event)``
        Integer ranks from 0 to ``num_draws``, see :func:`~pyroflows.diagnostics.ranks`.
    num_draws : int
        The number :math:`L` of draws that the ranks count, at least 1.
    confidence : float, default 0.95
        Probability between 0 and 1 that a calibrated curve stays inside the bands.

    Returns
    -------
    RankECDF
        On ``min(num_draws, 99)`` levels.

    Raises
    ------
    ValueError
        If ranks lie outside 0 to ``num_draws``, there are none, or ``confidence`` is not between
        0 and 1.

    Notes
    -----
    Costs :math:`O(K N)` for :math:`K` levels, a quarter of a second at :math:`N = 1000`.

    References
    ----------
    [1] Säilynoja, Bürkner, Vehtari, "Graphical test for discrete uniformity and its
        applications in goodness of fit evaluation and multiple sample comparison", Statistics and
        Computing 32, 2022, `arXiv:2103.10522 <https://arxiv.org/abs/2103.10522>`_.
    [2] Moscovich, Nadler, "Fast calculation of boundary crossing probabilities for Poisson
        processes", Statistics and Probability Letters 123, 2017,
        `arXiv:1503.04363 <https://arxiv.org/abs/1503.04363>`_.

    Examples
    --------
    >>> import torch
    >>> levels, difference, lower, upper = rank_ecdf(torch.arange(100), num_draws=99)
    >>> bool((difference == 0).all())
    True
    >>> round(upper.max().item(), 2)
    0.14
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    check_ranks(ranks, num_draws)
    size, (levels, counts) = len(ranks), _counts_below(ranks, num_draws)
    band = _Band(size, levels.numpy())
    lower, upper = band.limits(band.adjusted(1 - confidence))
    return RankECDF(
        levels,
        counts.double() / size - levels.reshape(-1, *[1] * (ranks.ndim - 1)),
        torch.from_numpy(lower).double() / size - levels,
        torch.from_numpy(upper).double() / size - levels,
    )


def uniformity_p_values(ranks: Tensor, num_draws: int) -> Tensor:
    r"""Test whether ranks are uniform: exact p-values of the simultaneous bands.

    The probability that a curve of uniform ranks touches the narrowest bands of
    :func:`rank_ecdf` that hold the observed curve, computed by the same recursion. It does what
    a Kolmogorov-Smirnov test does, with equal sensitivity at all levels, tails included, and for
    discrete ranks.

    Parameters
    ----------
    ranks : Tensor, shape ``(N, *event)``
        Integer ranks from 0 to ``num_draws``.
    num_draws : int
        The number of draws that the ranks count, at least 1.

    Returns
    -------
    Tensor, shape ``(*event)``
        A p-value for each column; below about :math:`10^{-14}` it is known to be tiny only.

    Raises
    ------
    ValueError
        If ranks lie outside 0 to ``num_draws`` or there are none.

    Examples
    --------
    >>> import torch
    >>> uniform, low = torch.arange(100), torch.arange(100) // 2
    >>> (uniformity_p_values(torch.stack([uniform, low], -1), num_draws=99) > 0.01).tolist()
    [True, False]
    """
    check_ranks(ranks, num_draws)
    levels, counts = _counts_below(ranks, num_draws)
    band = _Band(len(ranks), levels.numpy())
    columns = counts.reshape(len(levels), -1).T.numpy()
    p_values = [1 - band.confidence(band.extremity(column)) for column in columns]
    return torch.tensor(p_values, dtype=torch.float64).clamp(min=0).reshape(ranks.shape[1:])


def check_ranks(ranks: Tensor, num_draws: int) -> None:
    """Raise unless ranks are integers from 0 to ``num_draws``."""
    if not isinstance(ranks, Tensor) or ranks.is_floating_point():
        raise TypeError("ranks must be a torch.Tensor of integers")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if ranks.ndim == 0 or ranks.numel() == 0:
        raise ValueError(f"ranks must have shape (N, ...) with N >= 1, got {tuple(ranks.shape)}")
    low, high = ranks.min().item(), ranks.max().item()
    if low < 0 or high > num_draws:
        raise ValueError(
            f"ranks must lie between 0 and num_draws = {num_draws}, got {low} to {high}"
        )


def _counts_below(ranks: Tensor, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return levels ``(K,)`` and the numbers of ranks below them, ``(K, *event)``."""
    edges = bin_edges(num_draws, _MAX_BINS)
    return edges.double() / (num_draws + 1), bin_counts(ranks, edges)[:-1].cumsum(0)


def bin_edges(num_draws: int, max_bins: int) -> Tensor:
    """Return the ranks at which all bins but the first start, in bins as equal as can be."""
    num_bins = min(num_draws + 1, max_bins)
    return torch.arange(1, num_bins) * (num_draws + 1) // num_bins


def bin_counts(ranks: Tensor, edges: Tensor) -> Tensor:
    """Count ranks ``(N, *event)`` in each of the ``K + 1`` bins between edges ``(K,)``."""
    bins = torch.bucketize(ranks.cpu().contiguous(), edges, right=True)
    counts = bins.new_zeros(len(edges) + 1, *ranks.shape[1:])
    return counts.scatter_add_(0, bins, torch.ones_like(bins))


class _Band:
    """Bands around the counts of ``size`` uniform numbers below each of some levels.

    A band is named by its pointwise level: it holds the counts whose two-sided binomial p-value
    exceeds it.
    """

    def __init__(self, size: int, levels: np.ndarray) -> None:
        self.size, self.levels = size, levels
        counts = np.arange(size + 1)
        self._log_factorials = gammaln(counts + 1)
        log_binomials = self._log_factorials[-1] - self._log_factorials - self._log_factorials[::-1]
        z = levels[:, None]
        masses = np.exp(log_binomials + xlogy(counts, z) + xlogy(size - counts, 1 - z))
        below, above = masses.cumsum(1), masses[:, ::-1].cumsum(1)[:, ::-1]
        self._p_values = 2 * np.minimum(below, above)

    def extremity(self, counts: np.ndarray) -> float:
        """Return the smallest pointwise p-value of a curve of counts."""
        return float(self._p_values[np.arange(len(counts)), counts].min())

    def limits(self, pointwise: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the smallest and the largest count inside the band at each level."""
        inside = self._p_values > pointwise
        return inside.argmax(1), self.size - inside[:, ::-1].argmax(1)

    def confidence(self, pointwise: float) -> float:
        """Return the probability that a curve of counts stays inside the band."""
        if not (self._p_values > pointwise).any(1).all():
            return 0.0
        lower, upper = (np.append(limit, self.size) for limit in self.limits(pointwise))
        rates = self.size * np.diff(self.levels, prepend=0, append=1)
        start, paths = 0, np.ones(1)
        for rate, low, high in zip(rates, lower, upper):
            jumps = self._poisson(rate, high - start + 1)
            paths = np.convolve(paths, jumps)[low - start : high - start + 1]
            start = low
        return float(paths[0] / self._poisson(self.size, self.size + 1)[-1])

    def _poisson(self, rate: float, num_counts: int) -> np.ndarray:
        counts = np.arange(num_counts)
        return np.exp(counts * math.log(rate) - self._log_factorials[:num_counts] - rate)

    def adjusted(self, level: float) -> float:
        """Return the pointwise level whose band is left with a probability of ``level`` at most."""
        low, high = math.log(level / len(self.levels)), math.log(level)
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            if self.confidence(math.exp(middle)) >= 1 - level:
                low = middle
            else:
                high = middle
        return math.exp(low)
