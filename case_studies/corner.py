"""Pair plots: every parameter against every other, and each on its own."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from torch import Tensor

from pyroflows.plots import plot_pair

NUM_BINS = 40


def draw_corner(
    draws: Tensor,
    reference: Tensor | None = None,
    labels: Sequence[str] = (),
    truth: Tensor | None = None,
) -> plt.Figure:
    """Draw posterior draws ``(S, D)`` as points, a reference ``(R, D)`` as contours and outlines.

    The truth ``(D,)``, where known, is marked by dotted lines.
    """
    dim = draws.shape[-1]
    figure, axes = plt.subplots(dim, dim, figsize=(2.1 * dim + 0.6, 2.1 * dim), squeeze=False)
    draws = draws.cpu()
    for i in range(dim):
        for j in range(dim):
            ax = axes[i, j]
            if j > i:
                ax.set_visible(False)
                continue
            if j == i:
                _plot_margin(ax, draws[:, i], None if reference is None else reference[:, i])
            else:
                ends = None if reference is None else reference[:, [j, i]]
                plot_pair(draws[:, [j, i]], ends, ax=ax)
                ax.set_ylim(*_limits(draws[:, i]))
            if truth is not None:
                _mark(ax, truth[j].item(), truth[i].item() if j < i else None)
            ax.set_xlim(*_limits(draws[:, j]))
            ax.set_xlabel(labels[j] if i == dim - 1 else "")
            ax.set_ylabel(labels[i] if j == 0 and i > 0 else "")
    return figure


def _limits(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(0.001).item(), values.quantile(0.999).item()
    margin = 0.1 * (high - low)
    return low - margin, high + margin


def _plot_margin(ax: plt.Axes, values: Tensor, reference: Tensor | None) -> None:
    ax.hist(values.numpy(), NUM_BINS, density=True, color="0.75")
    if reference is not None:
        ax.hist(reference.numpy(), NUM_BINS, density=True, histtype="step", color="tab:red")
    ax.set_yticks([])


def _mark(ax: plt.Axes, x: float, y: float | None) -> None:
    ax.axvline(x, color="tab:blue", linestyle=":", linewidth=1.2)
    if y is not None:
        ax.axhline(y, color="tab:blue", linestyle=":", linewidth=1.2)
