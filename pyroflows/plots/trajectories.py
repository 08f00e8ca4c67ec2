"""Paths of points that a velocity field carries along."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from .arrays import as_finite_array
from .style import axes_or_new

PATH = "0.65"


def plot_trajectories(
    states: ArrayLike, times: ArrayLike | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the paths of points: in the plane, or of single numbers against time.

    Paths start at hollow circles and end at black dots.

    Parameters
    ----------
    states
        Where ``N`` points are at each of ``T`` times, shape ``(T, N, 2)`` or ``(T, N)``, as
        :meth:`ContinuousFlow.trajectory <pyroflows.transforms.ContinuousFlow.trajectory>` returns
        them; of more quantities choose two, ``states[..., [i, j]]``.
    times
        The times, shape ``(T,)``, for paths of single numbers. Default: evenly spaced from 0 to 1.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With ``N`` lines for the paths, then one for the starts and one for the ends.

    Raises
    ------
    ValueError
        If shapes are wrong or numbers are not finite.

    Examples
    --------
    >>> import torch
    >>> from pyroflows.transforms import cnf
    >>> path = cnf(2).trajectory(torch.randn(10, 2), times=[0.0, 0.5, 1.0])
    >>> len(plot_trajectories(path).lines)
    12
    """
    is_plane = np.ndim(states) == 3
    shape: tuple[int | str, ...] = ("T", "N", 2) if is_plane else ("T", "N")
    paths = as_finite_array("states", states, *shape)
    if is_plane:
        x, y = paths[..., 0], paths[..., 1]
    else:
        y = paths
        clock = np.linspace(0.0, 1.0, len(y)) if times is None else times
        x = as_finite_array("times", clock, len(y))[:, None] + np.zeros_like(y)
    ax = axes_or_new(ax)
    ax.plot(x, y, color=PATH, linewidth=0.7)
    ax.plot(x[0], y[0], "o", color="0.4", markersize=4, fillstyle="none", label="start")
    ax.plot(x[-1], y[-1], "o", color="black", markersize=3, label="end")
    if is_plane:
        ax.set_aspect("equal")
    else:
        ax.set_xlabel("time")
    return ax
