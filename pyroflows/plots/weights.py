"""Tails of importance weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from ..diagnostics.psis import psis, tail_size
from .arrays import as_array
from .style import axes_or_new, by_label, show_legend, with_styles

ROUNDING = 1e-9
LEAST_WEIGHT = 1e-2  # of the weights shown, in units of their mean


def plot_weight_tail(
    log_weights: Mapping[str, ArrayLike] | ArrayLike, ax: Axes | None = None
) -> Axes:
    r"""Draw how often importance weights exceed a multiple of their mean, on logarithmic scales.

    The largest weights follow a generalised Pareto distribution, drawn as a thin black line, whose
    tail is straight, of slope :math:`-1 / \hat k`: the flatter, the less weighted averages can be
    trusted. Legends tell :math:`\hat k`, see :func:`~pyroflows.diagnostics.psis`; above 0.7 they
    need impractically many draws [1].

    Parameters
    ----------
    log_weights
        Log-weights in nats, shape ``(S,)``, up to a constant, or several by label, such as
        ``result.log_weights``. Minus infinity marks a weight of zero.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With a line for each set of weights, followed by that of its fitted tail unless there is
        no tail to fit.

    Raises
    ------
    ValueError
        If the shape is wrong, there is NaN or plus infinity, or all weights are zero.

    References
    ----------
    [1] A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry. Pareto smoothed importance sampling.
        `arXiv:1507.02646 <https://arxiv.org/abs/1507.02646>`_, 2015.

    Examples
    --------
    >>> quantiles = np.arange(0.5, 10_000) / 10_000
    >>> ax = plot_weight_tail({"guide": -0.4 * np.log(quantiles)})
    >>> [line.get_label() for line in ax.lines]
    ['guide, $\\hat k$ = 0.40', '_fitted tail']
    """
    tails = {
        label: _Tail(as_array(f"log_weights[{label!r}]" if label else "log_weights", values, "S"))
        for label, values in by_label(log_weights).items()
    }
    ax = axes_or_new(ax)
    for label, tail, style in with_styles(tails):
        of_khat = f"$\\hat k$ = {tail.khat:.2f}"
        name = f"{label}, {of_khat}" if label else of_khat
        ax.plot(*tail.empirical(), linestyle=style, label=name)
        if tail.is_fitted:
            ax.plot(*tail.fitted(), color="black", linewidth=0.8, label="_fitted tail")
    ax.set(xscale="log", yscale="log")
    ax.set_xlim(left=LEAST_WEIGHT)
    ax.set(xlabel="importance weight / mean weight", ylabel="fraction of draws beyond")
    show_legend(ax)
    return ax


class _Tail:
    """Weights in units of their mean, the largest first, and what they exceed in which share."""

    def __init__(self, log_weights: np.ndarray) -> None:
        self.logs = np.sort(log_weights)[::-1].copy()
        smoothed, self.khat = psis(torch.from_numpy(self.logs))
        self.smoothed = smoothed.numpy()
        self.log_mean = self.logs[0] + math.log(np.exp(self.logs - self.logs[0]).mean())
        self.size = tail_size(len(self.logs))

    def empirical(self) -> tuple[np.ndarray, np.ndarray]:
        return np.exp(self.logs - self.log_mean), self._shares(1.0)

    @property
    def is_fitted(self) -> bool:
        return self.khat not in (0.0, math.inf) and bool(self.logs[self.size] > -math.inf)

    def fitted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the quantiles of the fit, but for those that it would put beyond all weights."""
        threshold, largest = self.logs[self.size], self.logs[0]
        # Smoothing leaves the threshold alone: it tells the units of the smoothed weights.
        fitted = self.smoothed + (threshold - self.smoothed[self.size])
        in_tail = (self.logs > threshold) & (fitted < largest - ROUNDING)
        # Quantiles are taken in the middle of each weight's step.
        return np.exp(fitted[in_tail] - self.log_mean), self._shares(0.5)[in_tail]

    def _shares(self, part_of_own_step: float) -> np.ndarray:
        return (np.arange(len(self.logs)) + part_of_own_step) / len(self.logs)
