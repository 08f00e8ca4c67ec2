"""Densities in the plane, and what maps do to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from .style import axes_or_new

Limits = tuple[tuple[float, float], tuple[float, float]]

POINTS_PER_LINE = 20  # times the number of lines in each direction


@torch.no_grad()
def plot_density(
    log_prob: Callable[[Tensor], Tensor],
    limits: Limits = ((-4.0, 4.0), (-4.0, 4.0)),
    cells: int = 200,
    device: torch.device | str | None = None,
    ax: Axes | None = None,
    dtype: torch.dtype | None = None,
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
        Number of cells along each axis. Costs ``cells**2`` densities.
    device, dtype
        Where the points are put for ``log_prob``, and as what. Default: torch's own.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With one image.

    Raises
    ------
    ValueError
        If log-densities have a wrong shape, some are NaN or plus infinity, or all are minus
        infinity; if limits do not ascend or ``cells`` is below 1.

    Examples
    --------
    >>> normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> ax = plot_density(normal.log_prob, limits=((-3, 3), (-2, 2)), cells=20)
    >>> ax.images[0].get_array().shape
    (20, 20)
    """
    _check_grid(limits, cells=cells)
    centres = [torch.linspace(low, high, 2 * cells + 1)[1::2] for low, high in limits]
    log_density = log_prob(torch.cartesian_prod(*centres).to(device, dtype)).cpu().double().numpy()
    if log_density.shape != (cells**2,):
        raise ValueError(
            f"log_prob must map points of shape ({cells**2}, 2) to log-densities of shape "
            f"({cells**2},), got {log_density.shape}"
        )
    if not log_density.max() < np.inf:  # NaN included
        raise ValueError("log_prob must not be NaN or plus infinity anywhere within the limits")
    if log_density.max() == -np.inf:
        raise ValueError("log_prob must be finite somewhere, got minus infinity within the limits")
    ax = axes_or_new(ax)
    image = np.exp(log_density - log_density.max()).reshape(cells, cells).T
    (left, right), (bottom, top) = limits
    extent = (left, right, bottom, top)
    ax.imshow(image, origin="lower", extent=extent, cmap="gray_r", aspect="equal")
    return ax


def plot_warp(
    transform: Callable[[Tensor], Tensor],
    limits: Limits = ((-3.0, 3.0), (-3.0, 3.0)),
    lines: int = 25,
    device: torch.device | str | None = None,
    ax: Axes | None = None,
    dtype: torch.dtype | None = None,
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
    device, dtype
        Where the points are put for ``transform``, and as what. Default: torch's own.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With ``2 * lines`` lines, the images of vertical ones first.

    Raises
    ------
    ValueError
        If images have a wrong shape or are not finite, limits do not ascend or ``lines`` is
        below 1.

    Examples
    --------
    >>> len(plot_warp(torch.sinh, lines=5).lines)
    10
    """
    image = image_of(transform, grid_of(limits, lines).to(device, dtype))
    return draw_grid(axes_or_new(ax), image)


def _check_grid(limits: Limits, **counts: int) -> None:
    if np.shape(limits) != (2, 2) or not all(low < high for low, high in limits):
        raise ValueError(f"limits must be two ascending pairs, got {limits}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def grid_of(limits: Limits, lines: int) -> Tensor:
    """Return points ``(2, lines, P, 2)`` on vertical lines, then on horizontal ones."""
    _check_grid(limits, lines=lines)
    directions = []
    for axis in range(2):
        fixed = torch.linspace(*limits[axis], lines)
        moving = torch.linspace(*limits[1 - axis], POINTS_PER_LINE * lines)
        points = torch.cartesian_prod(fixed, moving)
        directions.append(points if axis == 0 else points.flip(-1))
    return torch.stack(directions).reshape(2, lines, POINTS_PER_LINE * lines, 2)


@torch.no_grad()
def image_of(transform: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
    """Return where a map puts the points of a grid."""
    points = grid.reshape(-1, 2)
    image = transform(points)
    if image.shape != points.shape:
        raise ValueError(
            f"transform must map points of shape {tuple(points.shape)} to as many, got "
            f"{tuple(image.shape)}"
        )
    if not image.isfinite().all():
        raise ValueError("transform must map the grid to finite points, got some that are not")
    return image.reshape(grid.shape)


def draw_grid(ax: Axes, grid: Tensor) -> Axes:
    """Draw a line for each of the grid, vertical ones solid and horizontal ones dashed."""
    for lines, style in zip(grid.cpu().double().numpy(), ("-", "--"), strict=True):
        ax.plot(*lines.transpose(2, 1, 0), style, color="black", linewidth=0.6)
    ax.set_aspect("equal")
    return ax
