"""What makes pictures alike: axes, line styles and shades that are told apart in greyscale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

T = TypeVar("T")

LINE_STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)))
DRAWS = "#8fb4d9"  # as light as the grey .68: black lines on top are legible
REFERENCE = "black"
TRUTH = "tab:red"
BAND = "0.85"


def axes_or_new(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax


def axes_grid_or_new(axes: Any, rows: int, columns: int, cell: tuple[float, float]) -> np.ndarray:
    """Return the axes given, of shape ``(rows, columns)``, or those of a new figure."""
    if axes is None:
        size = (columns * cell[0], rows * cell[1])
        return plt.subplots(rows, columns, figsize=size, squeeze=False)[1]
    grid = np.asarray(axes, dtype=object)
    if grid.shape != (rows, columns):
        raise ValueError(f"axes must have shape {(rows, columns)}, got {grid.shape}")
    return grid


def by_label(values: Any) -> dict[str, Any]:
    """Return values by label; a single one has none."""
    named = dict(values) if hasattr(values, "items") else {"": values}  # a table is no Mapping
    if not named:
        raise ValueError("there must be at least one curve to draw, got none")
    return named


def with_styles(values: Mapping[str, T]) -> Iterator[tuple[str, T, Any]]:
    """Yield labels, values and the style of their lines."""
    for (label, value), style in zip(values.items(), cycle(LINE_STYLES)):
        yield label, value, style


def show_legend(ax: Axes, **options: Any) -> None:
    """Draw a legend if anything has a label."""
    if ax.get_legend_handles_labels()[1]:
        ax.legend(**options)
