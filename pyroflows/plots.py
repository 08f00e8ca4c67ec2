"""Pictures of results. Every function draws on the axes it is given and returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from torch import Tensor

Limits = tuple[tuple[float, float], tuple[float, float]]

LINE_STYLES = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)))  # told apart in greyscale


def plot_elbo(
    losses: Mapping[str, ArrayLike],
    log_evidence: float | None = None,
    window: int = 50,
    ax: Axes | None = None,
) -> Axes:
    """Draw the ELBO of several fits against the step, averaged over a moving window.

    Parameters
    ----------
    losses
        Negative ELBO per step by label, as in ``result.losses``.
    log_evidence
        The exact log evidence, if known: the gap to it is then drawn on a logarithmic scale.
    window
        Number of steps averaged.
    ax
        Where to draw. Default: a new figure.

    Examples
    --------
    >>> plot_elbo({"guide": np.linspace(5.0, 1.0, 100)}, log_evidence=-0.5).get_ylabel()
    'log evidence - ELBO (nats)'
    """
    ax = ax or plt.subplots()[1]
    for (label, loss), style in zip(losses.items(), _cycle(len(losses)), strict=True):
        values = np.asarray(loss, dtype=float)
        width = max(1, min(window, len(values)))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        shown = -smooth if log_evidence is None else log_evidence + smooth
        ax.plot(np.arange(width, len(values) + 1), shown, linestyle=style, label=label)
    ax.set_xlabel("step")
    if log_evidence is None:
        ax.set_ylabel("ELBO (nats)")
    else:
        ax.set_ylabel("log evidence - ELBO (nats)")
        ax.set_yscale("log")
    ax.legend()
    return ax


def plot_pair(
    draws: ArrayLike,
    reference: ArrayLike | None = None,
    labels: Sequence[str] = ("x", "y"),
    num_draws: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """Draw two quantities against each other, with contours of reference draws behind.

    Parameters
    ----------
    draws
        Shape ``(S, 2)``.
    reference
        Shape ``(R, 2)``: contours hold 50 % and 95 % of these.
    labels
        Names of the two quantities.
    num_draws
        How many of the draws are shown at most.
    ax
        Where to draw. Default: a new figure.

    Examples
    --------
    >>> plot_pair(np.zeros((10, 2)), labels=("mu", "log tau")).get_xlabel()
    'mu'
    """
    ax = ax or plt.subplots()[1]
    points = np.asarray(draws, dtype=float)[:num_draws]
    ax.plot(points[:, 0], points[:, 1], ".", markersize=2, color="black", alpha=0.5)
    if reference is not None:
        density, x, y = _smooth_histogram(np.asarray(reference, dtype=float))
        levels = _levels_holding(density, (0.95, 0.5))
        ax.contour(x, y, density.T, levels=levels, colors="tab:red", linestyles=["--", "-"])
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    return ax


def plot_weight_tail(log_weights: Mapping[str, ArrayLike], ax: Axes | None = None) -> Axes:
    """Draw how often importance weights exceed a multiple of their mean, on logarithmic scales.

    A straight tail of slope ``-1/k`` is that of a generalised Pareto distribution with index ``k``:
    the flatter, the less weighted averages can be trusted.

    Parameters
    ----------
    log_weights
        Log-weights ``(S,)`` by label.
    ax
        Where to draw. Default: a new figure.

    Examples
    --------
    >>> plot_weight_tail({"guide": np.random.default_rng(0).normal(size=100)}).get_xscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    for (label, values), style in zip(log_weights.items(), _cycle(len(log_weights)), strict=True):
        logs = np.sort(np.asarray(values, dtype=float))[::-1]
        weights = np.exp(logs - logs.max())
        exceedance = np.arange(1, len(logs) + 1) / len(logs)
        ax.plot(weights / weights.mean(), exceedance, linestyle=style, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left=1e-2)
    ax.set_xlabel("importance weight / mean weight")
    ax.set_ylabel("fraction of draws beyond")
    ax.legend()
    return ax


@torch.no_grad()
def plot_density(
    log_prob: Callable[[Tensor], Tensor],
    limits: Limits = ((-4.0, 4.0), (-4.0, 4.0)),
    cells: int = 200,
    device: torch.device | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a density in the plane as a heat map, dark where there is much.

    Parameters
    ----------
    log_prob
        Maps points ``(N, 2)`` to log-densities ``(N,)``, for instance ``flow.log_prob``.
        Unnormalised ones do.
    limits
        Lowest and highest value shown on each axis.
    cells
        Number of cells along each axis.
    device
        Where the points are put for ``log_prob``.
    ax
        Where to draw. Default: a new figure.

    Examples
    --------
    >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> ax = plot_density(normal.log_prob, limits=((-3, 3), (-2, 2)), cells=20)
    >>> ax.images[0].get_array().shape
    (20, 20)
    """
    ax = ax or plt.subplots()[1]
    centres = [torch.linspace(low, high, 2 * cells + 1)[1::2] for low, high in limits]
    log_density = log_prob(torch.cartesian_prod(*centres).to(device)).cpu().numpy()
    image = np.exp(log_density - log_density.max()).reshape(cells, cells).T
    (left, right), (bottom, top) = limits
    ax.imshow(
        image,
        origin="lower",
        extent=(left, right, bottom, top),
        cmap="gray_r",
        aspect="equal",
    )
    return ax


@torch.no_grad()
def plot_warp(
    transform: Callable[[Tensor], Tensor],
    limits: Limits = ((-3.0, 3.0), (-3.0, 3.0)),
    lines: int = 25,
    device: torch.device | str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what a map does to a rectangular grid: ``flow.transform`` or ``flow.transform.inv``.

    Parameters
    ----------
    transform
        Maps points ``(N, 2)`` to points ``(N, 2)``.
    limits
        Lowest and highest value of the grid on each axis.
    lines
        Number of lines in each direction: vertical lines are drawn solid, horizontal ones dashed.
    device
        Where the points are put for ``transform``.
    ax
        Where to draw. Default: a new figure.

    Examples
    --------
    >>> len(plot_warp(torch.sinh, lines=5).lines)
    10
    """
    ax = ax or plt.subplots()[1]
    for axis, style in enumerate(("-", "--")):
        fixed = torch.linspace(*limits[axis], lines)
        moving = torch.linspace(*limits[1 - axis], 20 * lines)
        points = torch.cartesian_prod(fixed, moving)
        points = points if axis == 0 else points.flip(-1)
        image = transform(points.to(device)).cpu().reshape(lines, 20 * lines, 2)
        ax.plot(*image.permute(2, 1, 0).numpy(), style, color="black", linewidth=0.6)
    ax.set_aspect("equal")
    return ax


def _cycle(count: int) -> list:
    return [LINE_STYLES[i % len(LINE_STYLES)] for i in range(count)]


def _smooth_histogram(points: np.ndarray, bins: int = 60) -> tuple[np.ndarray, ...]:
    """Return a histogram of points ``(S, 2)`` on a grid, blurred a little, and the bin centres."""
    from scipy.ndimage import gaussian_filter

    density, x, y = np.histogram2d(points[:, 0], points[:, 1], bins=bins)
    return gaussian_filter(density, 1.5), (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2


def _levels_holding(density: np.ndarray, masses: Sequence[float]) -> list[float]:
    """Return the levels above which the given fractions of the mass lie."""
    values = np.sort(density.ravel())[::-1]
    cumulative = values.cumsum() / values.sum()
    return [values[np.searchsorted(cumulative, mass)] for mass in masses]
