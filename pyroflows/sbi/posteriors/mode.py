"""The mode of a density, for many observations at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MAX_ITERATIONS = 50
RESOLUTION = 1e-4  # gains in nats, and steps in standard deviations, that are no longer worth it


def climb(
    log_prob: Callable[[Tensor], Tensor], draws: Tensor, heights: Tensor, num_starts: int
) -> Tensor:
    """Climb a density from its highest draws.

    All starts of all observations climb together by L-BFGS, in coordinates in which the draws of
    each observation are white.

    Parameters
    ----------
    log_prob
        Maps vectors ``(S, *batch, D)`` to their log-densities ``(S, *batch)``.
    draws
        Vectors ``(S, *batch, D)``, draws of the density.
    heights
        Their log-densities.
    num_starts
        How many of them to start from.

    Returns
    -------
    Tensor
        The highest points found, ``(*batch, D)``.
    """
    scale = _scale_tril(draws)
    starts = _highest(draws, _or_nothing(heights), num_starts)

    def place(steps: Tensor) -> Tensor:
        return starts + (scale @ steps.unsqueeze(-1)).squeeze(-1)

    steps = torch.zeros_like(starts, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [steps],
        max_iter=MAX_ITERATIONS,
        tolerance_change=RESOLUTION,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = -log_prob(place(steps)).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        ends = torch.cat([starts, place(steps)])
        # Where the climb has left what numbers can bear, its start stands.
        return _highest(ends, _or_nothing(log_prob(ends)), 1)[0]


def _scale_tril(draws: Tensor) -> Tensor:
    """Return a root of the covariance of draws, ``(*batch, D, D)``."""
    # Parameters may all but determine each other, which single precision cannot tell from fully.
    centred = (draws - draws.mean(0)).movedim(0, -2).double()
    covariance = centred.mT @ centred / len(draws)
    jitter = 1e-6 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    return torch.linalg.cholesky(covariance + jitter[..., None, None] * identity).to(draws)


def _or_nothing(heights: Tensor) -> Tensor:
    """Return heights, those that are not finite as the lowest of all."""
    return heights.nan_to_num(-torch.inf, -torch.inf)


def _highest(points: Tensor, heights: Tensor, number: int) -> Tensor:
    index = heights.topk(number, dim=0).indices.unsqueeze(-1)
    return points.gather(0, index.expand(*index.shape[:-1], points.shape[-1]))
