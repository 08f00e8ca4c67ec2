"""Draws of two quantities, or of each pair of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike
from scipy.ndimage import gaussian_filter

from .arrays import as_columns, as_finite_array, to_numpy
from .style import DRAWS, REFERENCE, TRUTH, axes_grid_or_new, axes_or_new

Draws = ArrayLike | Mapping[str, ArrayLike]

NUM_BINS = 40
GRID = 80  # cells along each axis of the histogram that contours are drawn of
BLUR = 1.5  # cells, for ten thousand draws or more
MASSES = (0.95, 0.5)


def plot_pair(
    draws: ArrayLike,
    reference: ArrayLike | None = None,
    labels: Sequence[str] = ("x", "y"),
    num_draws: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """Draw two quantities against each other, with contours of other draws on top.

    Parameters
    ----------
    draws
        Shape ``(S, 2)``, drawn as points.
    reference
        Reference draws, or those of another guide, shape ``(R, 2)``: contours hold about 50 %
        (solid) and 95 % (dashed) of these.
    labels
        Names of the two quantities.
    num_draws
        How many of the draws are shown at most.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With one line, the points.

    Raises
    ------
    ValueError
        If shapes are wrong or draws are not finite.

    Examples
    --------
    >>> plot_pair(np.zeros((10, 2)), labels=("mu", "log tau")).get_xlabel()
    'mu'
    """
    points = as_finite_array("draws", draws, "S", 2)[:num_draws]
    if len(labels) != 2:
        raise ValueError(f"labels must be two, got {len(labels)}")
    others = None if reference is None else as_finite_array("reference", reference, "R", 2)
    ax = axes_or_new(ax)
    ax.plot(points[:, 0], points[:, 1], ".", markersize=2, color=DRAWS, rasterized=True)
    if others is not None:
        _draw_contours(ax, others)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    return ax


def plot_corner(
    draws: Draws,
    reference: Draws | None = None,
    labels: Sequence[str] | None = None,
    truth: ArrayLike | Mapping[str, ArrayLike] | None = None,
    num_draws: int = 2000,
    axes: Any = None,
) -> np.ndarray:
    """Draw each quantity against each other one, and on its own on the diagonal.

    Parameters
    ----------
    draws
        Shape ``(S, D)``, or from sites to draws ``(S, *shape)`` as ``result.sample`` gives them:
        points, and filled histograms.
    reference
        Reference draws, or those of another guide, like ``draws`` but as many as it may have:
        contours that hold about 50 % and 95 % of them, and outlines of histograms.
    labels
        Names of the ``D`` quantities. Default: those of the entries of the sites.
    truth
        True values, shape ``(D,)``, or from sites to values of shape ``shape``: dotted lines.
    num_draws
        How many of the draws are shown as points at most.
    axes
        Where to draw, shape ``(D, D)``; what lies above the diagonal is hidden. Default: a new
        figure.

    Returns
    -------
    numpy.ndarray of Axes, shape (D, D)
        ``axes[0, 0].figure`` is the figure.

    Raises
    ------
    ValueError
        If shapes disagree or numbers are not finite.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> axes = plot_corner({"mu": rng.normal(size=100), "theta": rng.normal(size=(100, 2))})
    >>> [ax.get_xlabel() for ax in axes[-1]]
    ['mu', 'theta[0]', 'theta[1]']
    """
    points, names = as_columns("draws", draws)
    dim = points.shape[1]
    others = None if reference is None else _matching_columns("reference", reference, draws, dim)
    values = None if truth is None else _truth(truth, draws, dim)
    names = names if labels is None else list(labels)
    if len(names) != dim:
        raise ValueError(f"labels must be as many as quantities, {dim}, got {len(names)}")

    axes = axes_grid_or_new(axes, dim, dim, (2.1, 2.1))
    shown = points if others is None else np.concatenate([points, others])
    limits = [_limits(column) for column in shown.T]
    for i, j in np.ndindex(dim, dim):
        ax = axes[i, j]
        if j > i:
            ax.set_visible(False)
            continue
        if j == i:
            _draw_margin(ax, points[:, i], None if others is None else others[:, i], limits[i])
        else:
            behind = None if others is None else others[:, [j, i]]
            plot_pair(points[:, [j, i]], behind, num_draws=num_draws, ax=ax)
            ax.set_ylim(*limits[i])
        if values is not None:
            _mark(ax, values[j], values[i] if j < i else None)
        ax.set_xlim(*limits[j])
        ax.set(xlabel=names[j], ylabel=names[i] if i > 0 else "")
        ax.tick_params(labelleft=j == 0 and i > 0, labelbottom=i == dim - 1)
        ax.label_outer()
    _draw_legend(axes, others is not None, values is not None)
    return axes


def _matching_columns(name: str, values: Draws, like: Draws, dim: int) -> np.ndarray:
    """Return draws with their columns in the order of those of ``like``."""
    if isinstance(values, Mapping) and isinstance(like, Mapping):
        if missing := sorted(like.keys() - values.keys()):
            raise ValueError(f"{name} must hold all sites of draws, {missing} are missing")
        values = {site: values[site] for site in like}
    columns, _ = as_columns(name, values)
    if columns.shape[1] != dim:
        raise ValueError(f"{name} must have {dim} columns as draws have, got {columns.shape[1]}")
    return columns


def _truth(truth: Any, like: Draws, dim: int) -> list[float]:
    if isinstance(truth, Mapping):
        rows: Any = {site: to_numpy(value)[None] for site, value in truth.items()}
    else:
        rows = as_finite_array("truth", truth, "D")[None]
    return _matching_columns("truth", rows, like, dim)[0].tolist()


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.1 * (high - low) or 0.5
    return low - margin, high + margin


def _draw_margin(
    ax: Axes, values: np.ndarray, reference: np.ndarray | None, limits: tuple[float, float]
) -> None:
    edges = np.linspace(*limits, NUM_BINS + 1).tolist()
    ax.hist(values, edges, density=True, color=DRAWS)
    if reference is not None:
        ax.hist(reference, edges, density=True, histtype="step", color=REFERENCE)
    ax.set_yticks([])


def _mark(ax: Axes, x: float, y: float | None) -> None:
    ax.axvline(x, color=TRUTH, linestyle=":", linewidth=1.3)
    if y is not None:
        ax.axhline(y, color=TRUTH, linestyle=":", linewidth=1.3)


def _draw_legend(axes: np.ndarray, has_reference: bool, has_truth: bool) -> None:
    """Say what is what in the empty corner, if there is anything to tell apart."""
    handles: list[Any] = [Patch(color=DRAWS, label="draws")]
    if has_reference:
        handles.append(Line2D([], [], color=REFERENCE, label="reference"))
    if has_truth:
        handles.append(Line2D([], [], color=TRUTH, linestyle=":", label="truth"))
    if len(handles) == 1:
        return
    if len(axes) == 1:
        axes[0, 0].legend(handles=handles)
        return
    legend = axes[0, 0].legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False
    )
    legend.set_in_layout(False)  # layouts would make room for it where there is room


def _draw_contours(ax: Axes, points: np.ndarray) -> None:
    density, x, y = _smooth_histogram(points)
    levels = np.unique(_levels_holding(density, MASSES))
    styles = ["--", "-"][-len(levels) :]
    ax.contour(x, y, density.T, levels=levels, colors=REFERENCE, linestyles=styles, linewidths=1.1)


def _smooth_histogram(points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return a histogram of points ``(R, 2)``, blurred the more the fewer they are, and its cells.

    Far outliers are cut off: they would leave too few cells to the others.
    """
    ranges = []
    for column in points.T:
        low, high = np.quantile(column, [0.005, 0.995])
        margin = 0.25 * (high - low) or 0.5
        ranges.append((low - margin, high + margin))
    density, x, y = np.histogram2d(points[:, 0], points[:, 1], bins=GRID, range=ranges)
    blur = BLUR * max(1.0, (1e4 / len(points)) ** (1 / 6))  # the rule of Scott in the plane
    return gaussian_filter(density, blur), (x[:-1] + x[1:]) / 2, (y[:-1] + y[1:]) / 2


def _levels_holding(density: np.ndarray, masses: Sequence[float]) -> list[float]:
    """Return the levels above which the given fractions of the mass lie."""
    values = np.sort(density.ravel())[::-1]
    cumulative = values.cumsum() / values.sum()
    return [values[np.searchsorted(cumulative, mass)] for mass in masses]
