"""Flows layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..distributions.standardized import Standardized
from ..transforms import Compose, DiagonalAffine, FlowTransform, Inverse, Permutation
from .plane import Limits, draw_grid, grid_of, image_of
from .style import axes_grid_or_new


def plot_layers(
    flow: FlowTransform | Sequence[FlowTransform],
    limits: Limits = ((-3.0, 3.0), (-3.0, 3.0)),
    lines: int = 25,
    device: torch.device | str | None = None,
    axes: Any = None,
    dtype: torch.dtype | None = None,
) -> np.ndarray:
    """Draw how a flow warps a grid layer by layer, forward above and backward below.

    Each column is the plane between two layers: the base on the left, the data on the right. Above,
    a grid goes from the left to the right; below, another one comes back from the right.

    Parameters
    ----------
    flow
        A flow of the plane such as ``flow.transform``: its ``L`` layers are the parts it is
        composed of, permutations counted with the layer before them, and the units of the data, if
        it was fitted to some, the last one. Or a list of flows, each a layer: ``[flow[:4],
        flow[4:]]``.
    limits
        Lowest and highest value of both grids on each axis.
    lines
        Number of lines in each direction: vertical lines are drawn solid, horizontal ones dashed.
    device, dtype
        Where the points are put for the flow, and as what. Default: torch's own.
    axes
        Where to draw, shape ``(2, L + 1)``. Default: a new figure.

    Returns
    -------
    numpy.ndarray of Axes, shape (2, L + 1)
        Each with ``2 * lines`` lines.

    Raises
    ------
    TypeError
        If ``flow`` holds anything but flows.
    ValueError
        If there are no layers, they need a context or are not of the plane, images are not finite,
        or ``axes`` have a wrong shape.

    Examples
    --------
    >>> import pyroflows as pf
    >>> plot_layers(pf.flow("nice", 2, num_layers=3), lines=5).shape
    (2, 5)
    """
    layers = _layers_of(flow) if isinstance(flow, FlowTransform) else _checked(list(flow))
    forward = [grid_of(limits, lines).to(device, dtype)]
    backward = [forward[0]]
    for layer in layers:
        forward.append(image_of(layer, forward[-1]))
    for layer in reversed(layers):
        backward.append(image_of(layer.inv, backward[-1]))
    axes = axes_grid_or_new(axes, 2, len(layers) + 1, (2.2, 2.3))
    for row, grids in zip(axes, (forward, backward[::-1]), strict=True):
        for ax, grid in zip(row, grids, strict=True):
            draw_grid(ax, grid)
            _frame_in_a_square(ax, grid)
    for k, ax in enumerate(axes[0]):
        ax.set_title("base" if k == 0 else f"after layer {k}", fontsize="medium")
    axes[0, 0].set_ylabel("forward")
    axes[1, 0].set_ylabel("backward")
    return axes


def _frame_in_a_square(ax: Axes, grid: Tensor) -> None:
    """Have panels of one size, whatever the grid has become."""
    points = grid.reshape(-1, 2).cpu().double().numpy()
    low, high = points.min(0), points.max(0)
    half = 0.55 * (high - low).max()
    (left, bottom), (right, top) = ((low + high) / 2 + sign * half for sign in (-1, 1))
    ax.set(xlim=(left, right), ylim=(bottom, top))


def _layers_of(flow: FlowTransform) -> list[FlowTransform]:
    _checked([flow])
    if isinstance(flow, Inverse):
        return [layer.inv for layer in reversed(_layers_of(flow.flow))]
    if isinstance(flow, Standardized):
        return [*_layers_of(flow.flow), DiagonalAffine(flow.loc, flow.scale)]
    if not isinstance(flow, Compose):
        return [flow]
    layers: list[FlowTransform] = []
    for part in flow:
        if isinstance(part, Permutation) and layers:
            layers[-1] = Compose([layers[-1], part])
        else:
            layers += _layers_of(part)
    return layers


def _checked(layers: list[FlowTransform]) -> list[FlowTransform]:
    if not layers:
        raise ValueError("flow must have at least one layer, got none")
    for layer in layers:
        if not isinstance(layer, FlowTransform):
            raise TypeError(f"flow must hold FlowTransforms, got {type(layer).__name__}")
        if tuple(layer.event_shape) != (2,):
            raise ValueError(f"flow must map the plane, got event_shape {tuple(layer.event_shape)}")
        if layer.context_dim:
            raise ValueError(
                "flow needs a context: pass flow.condition(context), or a list of its layers, "
                "conditioned"
            )
    return layers
