"""Sums over importance weights: how many draws they are worth, and the evidence they estimate."""

from __future__ import annotations

import math

from torch import Tensor

from pyroflows.diagnostics.psis import checked_log_weights


def effective_sample_size(log_weights: Tensor) -> float:
    r"""Return the number of equally weighted draws that the weighted draws are worth.

    Kish's :math:`(\sum_s w_s)^2 / \sum_s w_s^2`: :math:`S` if all weights are equal, 1 if one
    weight dominates [1]. A heavy tail that the draws have not seen yet escapes it; see
    :func:`~pyroflows.diagnostics.psis`.

    Parameters
    ----------
    log_weights : Tensor, shape (S,)
        Logarithms of the weights in nats, up to a common constant, raw or smoothed. Minus
        infinity marks a weight of zero.

    Returns
    -------
    float
        A number of draws between 1 and S.

    Raises
    ------
    TypeError, ValueError
        If ``log_weights`` is not a vector that
        :func:`~pyroflows.diagnostics.psis` takes.

    References
    ----------
    [1] Kish, "Survey Sampling", Wiley, 1965.

    Examples
    --------
    >>> import torch
    >>> effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
    3.0
    """
    weights = checked_log_weights(log_weights).softmax(0)
    return 1 / weights.square().sum().item()


def log_evidence(log_weights: Tensor) -> tuple[float, float]:
    r"""Estimate the log evidence from importance weights, with its standard error.

    The estimate is :math:`\log \bar w`, the log of the mean weight. Its standard error is that of
    the mean, carried through the logarithm by the delta method,

    .. math:: \frac{1}{\bar w} \sqrt{\frac{\sum_s (w_s - \bar w)^2}{S (S - 1)}}.

    The mean weight is unbiased; its logarithm lies too low by half the squared standard error on
    average, to first order. Both numbers mean something only if the weights have a finite
    variance: :math:`\hat k < 1/2` in :func:`~pyroflows.diagnostics.psis`.

    Parameters
    ----------
    log_weights : Tensor, shape (S,), S >= 2
        ``log p(data, theta) - log q(theta)`` in nats at independent draws from the normalised
        density ``q``. Minus infinity marks a weight of zero.

    Returns
    -------
    value : float
        The log evidence in nats.
    standard_error : float
        Its standard error in nats.

    Raises
    ------
    TypeError, ValueError
        If ``log_weights`` is not a vector that
        :func:`~pyroflows.diagnostics.psis` takes, or holds a single draw.

    Examples
    --------
    >>> import math, torch
    >>> value, standard_error = log_evidence(torch.tensor([1.0, 3.0]).log())
    >>> round(math.exp(value), 6), round(standard_error, 6)
    (2.0, 0.5)
    """
    checked = checked_log_weights(log_weights)
    size = len(checked)
    if size < 2:
        raise ValueError("log_weights must hold at least 2 draws for a standard error, got 1")
    value = (checked.logsumexp(0) - math.log(size)).item()
    relative_weights = (checked - value).exp()
    return value, (relative_weights.std() / math.sqrt(size)).item()
