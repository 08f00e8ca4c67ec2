"""TARP: expected coverage of balls around random points, which needs draws only."""

from __future__ import annotations

import torch
from torch import Tensor

from pyroflows.diagnostics.checks import check_finite, check_matrix, check_tensor, check_varying
from pyroflows.diagnostics.coverage import Coverage
from pyroflows.diagnostics.sbc import ranks


def tarp(draws: Tensor, truth: Tensor, references: Tensor | None = None, seed: int = 0) -> Coverage:
    r"""Compare the credibility of balls around random points with the share of truths they hold.

    For each data set, the ball around a reference point that reaches the true parameters holds a
    share of the posterior draws. That share is uniform if the posterior is exact, jointly for all
    parameters and without a density [1]. A posterior that is too narrow gives a curve above the
    diagonal at low credibility and below it at high credibility (``atc < 0``), one that is too
    wide the reverse.

    Parameters
    ----------
    draws : Tensor, shape (L, N, D)
        ``L`` posterior draws for each of ``N`` simulated data sets.
    truth : Tensor, shape (N, D)
        The parameters that the data sets were simulated from, at least 2. Distances are measured
        in units of their standard deviations.
    references : Tensor, shape (N, D), optional
        Points that depend on the data sets at most, never on their true parameters. By default
        those of another data set, drawn at random: draws from the prior. Points that depend on
        the data can find errors that these cannot.
    seed : int, default 0
        Seed of the references and of the order of ties.

    Returns
    -------
    Coverage
        The curve, its bands, areas and p-value.

    Raises
    ------
    TypeError
        If an argument is not a tensor of floating-point numbers.
    ValueError
        If shapes disagree, entries are not finite, ``truth`` has fewer than 2 rows or a constant
        column.

    Notes
    -----
    The p-value is that of the simultaneous bands of :func:`~pyroflows.diagnostics.rank_ecdf`,
    which does what a Kolmogorov-Smirnov test does. Costs :math:`O(L N D)`.

    References
    ----------
    [1] Lemos, Coogan, Hezaveh, Perreault-Levasseur, "Sampling-based accuracy testing of
        posterior estimators for general inference", ICML 2023,
        `arXiv:2302.03026 <https://arxiv.org/abs/2302.03026>`_.

    Examples
    --------
    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(500, 2, generator=generator)
    >>> truth = x + torch.randn(500, 2, generator=generator)
    >>> draws = x + torch.randn(100, 500, 2, generator=generator)
    >>> tarp(draws, truth).passes()
    True
    >>> tarp(x + (draws - x) / 3, truth).passes()
    False
    """
    check_matrix("truth", truth, "N", "D")
    check_tensor("draws", draws, "L", *truth.shape)
    check_finite("draws", draws)
    if len(truth) < 2:
        raise ValueError("truth must hold at least 2 data sets, got 1")
    check_varying("truth", truth)
    if references is None:
        references = truth[_derangement(len(truth), seed).to(truth.device)]
    check_matrix("references", references, *truth.shape)
    scale, device = truth.std(0), draws.device
    radius = _distance(truth, references, scale)
    return Coverage(
        ranks(_distance(draws, references.to(device), scale.to(device)), radius, seed), len(draws)
    )


def _distance(points: Tensor, references: Tensor, scale: Tensor) -> Tensor:
    return torch.linalg.vector_norm((points - references) / scale, dim=-1)


def _derangement(size: int, seed: int) -> Tensor:
    """Return a random permutation that moves every index: one cycle through all of them."""
    # In a cycle each share is uniform given all parameters and draws that come after it, so that
    # shares are independent up to the closing of the cycle.
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    successors = torch.empty_like(order)
    successors[order] = order.roll(-1)
    return successors
