"""Pareto-smoothed importance sampling: how far a set of importance weights can be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MINIMUM_TAIL = 5
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    r"""Smooth the largest importance weights and estimate the shape of their tail.

    A generalised Pareto distribution

    .. math:: \Pr(W - u > y \mid W > u) = (1 + \hat k\, y / \hat\sigma)^{-1 / \hat k}

    is fitted to the excesses of the :math:`M = \lceil\min(S / 5,\, 3\sqrt{S})\rceil` largest of
    :math:`S` weights over the next largest one, :math:`u`. Those weights are replaced by the
    expected order statistics :math:`u + F^{-1}((i - 1/2) / M)` of the fit, none larger than the
    largest raw weight, and all weights are normalised [1]. The fit is the empirical Bayes
    estimate of Zhang and Stephens [2], with a weak prior that draws :math:`\hat k` towards 1/2
    like ten further observations.

    Weights have finite moments of every order below :math:`1 / \hat k`. Estimates are good for
    :math:`\hat k \lesssim \min(1 - 1 / \log_{10} S,\, 0.7)`; above 0.7 they need impractically
    many draws, and above 1 the weights have no mean to converge to.

    Parameters
    ----------
    log_weights : Tensor, shape (S,)
        Logarithms of the importance weights in nats, up to a common constant:
        ``log p(theta) - log q(theta)`` at independent draws from ``q``. Minus infinity marks a
        weight of zero.

    Returns
    -------
    smoothed : Tensor, shape (S,)
        Smoothed and normalised log weights in the order, dtype and device of the input; their
        ``logsumexp`` is 0. Gradients do not flow through them.
    khat : float
        The tail shape. Two values are given without a fit, and the weights are then only
        normalised:

        * infinity if fewer than five weights make up the tail, which says nothing about its
          shape: always with 20 draws or fewer, otherwise through ties at ``u`` or zero weights.
        * 0 if more than 20 draws show no tail: none exceeds ``u`` by more than a relative
          :math:`\sqrt\epsilon` of the input's dtype, because the weights agree up to rounding,
          as at a perfect fit, or are tied at their maximum. Such weights are bounded; any
          value of ``khat`` below 0 says the same.

    Raises
    ------
    TypeError
        If ``log_weights`` is not a tensor of floating-point numbers.
    ValueError
        If ``log_weights`` is not one-dimensional, is empty, holds NaN or plus infinity, or holds
        only zero weights.

    Notes
    -----
    Costs one sort and :math:`O(M (30 + \sqrt M))` operations in double precision on the CPU:
    about 15 milliseconds on one thread for :math:`10^5` draws.

    References
    ----------
    [1] Vehtari, Simpson, Gelman, Yao, Gabry, "Pareto smoothed importance sampling", Journal of
        Machine Learning Research 25(72), 2024, arXiv:1507.02646.
    [2] Zhang, Stephens, "A new and efficient estimation method for the generalized Pareto
        distribution", Technometrics 51(3), 2009, doi:10.1198/tech.2009.08017.

    Examples
    --------
    The reciprocals of uniform quantiles follow a Pareto distribution of shape 1, and a power of
    them has that power as its shape:

    >>> import torch
    >>> quantiles = torch.arange(0.5, 10_000) / 10_000
    >>> smoothed, khat = psis(-0.4 * quantiles.log())
    >>> round(khat, 1)
    0.4
    >>> bool(smoothed.logsumexp(0).abs() < 1e-5)
    True
    """
    raw = checked_log_weights(log_weights)
    smoothed, khat = _smooth_tail(raw - raw.max(), torch.finfo(log_weights.dtype).eps ** 0.5)
    return (smoothed - smoothed.logsumexp(0)).to(log_weights), khat


def checked_log_weights(log_weights: Tensor) -> Tensor:
    """Return log weights in double precision on the CPU, or say what is wrong with them.

    The CPU, because the work on a vector of draws is small and some devices lack double precision.
    """
    if not isinstance(log_weights, Tensor):
        raise TypeError(f"log_weights must be a torch.Tensor, got {type(log_weights).__name__}")
    if not log_weights.is_floating_point():
        raise TypeError(f"log_weights must be of a floating-point dtype, got {log_weights.dtype}")
    if log_weights.ndim != 1 or len(log_weights) == 0:
        shape = tuple(log_weights.shape)
        raise ValueError(f"log_weights must have shape (S,) with S >= 1, got shape {shape}")
    checked = log_weights.detach().to("cpu", torch.float64)
    invalid = checked.isnan() | (checked == torch.inf)
    if invalid.any():
        raise ValueError(
            "log_weights must be finite or minus infinity, got NaN or plus infinity in "
            f"{int(invalid.sum())} of {len(checked)} entries"
        )
    if checked.max() == -torch.inf:
        raise ValueError(
            "log_weights must hold at least one finite entry, got only minus infinity: "
            "every weight is zero"
        )
    return checked


def tail_size(num_weights: int) -> int:
    """Return how many of so many weights make up their tail.

    Examples
    --------
    >>> tail_size(100), tail_size(10_000)
    (20, 300)
    """
    return math.ceil(min(num_weights / 5, 3 * math.sqrt(num_weights)))


def _smooth_tail(log_weights: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """Replace the tail of log weights whose maximum is 0; return them with the tail's shape."""
    num_in_tail = tail_size(len(log_weights))
    if num_in_tail < _MINIMUM_TAIL:
        return log_weights, math.inf
    ascending, order = log_weights.sort(stable=True)
    threshold = max(ascending[-num_in_tail - 1].item(), _LOG_TINY)
    if -threshold <= tolerance:
        return log_weights, 0.0
    is_tail = ascending > threshold
    tail = ascending[is_tail]
    if len(tail) < _MINIMUM_TAIL:
        return log_weights, math.inf
    # Weights are measured in units of the threshold: expm1 keeps the smallest excesses exact.
    shape, scale = _fit_generalised_pareto((tail - threshold).expm1())
    levels = (torch.arange(len(tail), dtype=tail.dtype) + 0.5) / len(tail)
    quantiles = _generalised_pareto_quantiles(levels, shape, scale)
    smoothed = log_weights.clone()
    smoothed[order[is_tail]] = (threshold + quantiles.log1p()).clamp(max=0.0)
    return smoothed, shape


def _fit_generalised_pareto(excesses: Tensor) -> tuple[float, float]:
    """Return the shape and scale of positive excesses, given in ascending order.

    With ``slope = -shape / scale``, the likelihood at its best shape depends on the slope alone;
    the estimate averages the slope over a grid, weighted by that profile likelihood.
    """
    size = len(excesses)
    grid_size = 30 + math.isqrt(size)
    steps = torch.arange(grid_size, dtype=excesses.dtype) + 0.5
    first_quartile = excesses[int(size / 4 + 0.5) - 1]
    slopes = 1 / excesses[-1] + (1 - (grid_size / steps).sqrt()) / (3 * first_quartile)
    shapes, scales = _profile(slopes, excesses)
    weights = (-size * (scales.log() + shapes)).softmax(0)
    shape, scale = _profile((weights * slopes).sum().unsqueeze(0), excesses)
    prior_size, prior_shape = 10, 0.5
    shape = (size * shape + prior_size * prior_shape) / (size + prior_size)
    return shape.item(), scale.item()


def _profile(slopes: Tensor, excesses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the most likely shape and scale for each slope."""
    shapes = (-slopes.unsqueeze(-1) * excesses).log1p().mean(-1)
    # A slope of zero is the exponential distribution, whose scale is the mean.
    return shapes, torch.where(slopes == 0, excesses.mean(), -shapes / slopes)


def _generalised_pareto_quantiles(levels: Tensor, shape: float, scale: float) -> Tensor:
    exponential = -(-levels).log1p()
    if abs(shape) < torch.finfo(levels.dtype).eps:
        return scale * exponential
    return scale * (shape * exponential).expm1() / shape
