"""Curves of training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from .arrays import as_array
from .style import axes_or_new, by_label, show_legend, with_styles


def plot_losses(
    losses: Mapping[str, ArrayLike] | ArrayLike, window: int = 50, ax: Axes | None = None
) -> Axes:
    """Draw the loss of one or several fits against the step, averaged over a moving window.

    Parameters
    ----------
    losses
        Loss of each step, shape ``(num_steps,)``, or several by label, such as the table that
        ``fit.history()`` of a density gives. Steps whose loss is not finite are left out.
    window
        Number of steps averaged, at least 1.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With a line for each fit.

    Raises
    ------
    ValueError
        If there is no finite loss, its shape is wrong, or ``window`` is below 1.

    Examples
    --------
    >>> ax = plot_losses({"training": [3.0, 2.0, 1.0], "validation": [3.0, np.nan, 2.0]}, window=1)
    >>> [len(line.get_xdata()) for line in ax.lines]
    [3, 2]
    """
    curves = _moving_averages(losses, window)
    ax = axes_or_new(ax)
    for label, (steps, means), style in with_styles(curves):
        ax.plot(steps, means, linestyle=style, label=label)
    ax.set(xlabel="step", ylabel="loss")
    show_legend(ax)
    return ax


def plot_elbo(
    losses: Mapping[str, ArrayLike] | ArrayLike,
    log_evidence: float | None = None,
    window: int = 50,
    ax: Axes | None = None,
) -> Axes:
    """Draw the ELBO of one or several fits against the step, averaged over a moving window.

    Parameters
    ----------
    losses
        Negative ELBO of each step in nats, shape ``(num_steps,)``, as in ``result.losses``, or
        several by label. Steps whose loss is not finite are left out.
    log_evidence
        The exact log evidence in nats, if known: the gap to it is then drawn on a logarithmic
        scale, where noise does not make it negative.
    window
        Number of steps averaged, at least 1.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With a line for each fit.

    Raises
    ------
    ValueError
        If there is no finite loss, its shape is wrong, or ``window`` is below 1.

    Examples
    --------
    >>> plot_elbo({"guide": np.linspace(5.0, 1.0, 100)}, log_evidence=-0.5).get_ylabel()
    'log evidence - ELBO (nats)'
    """
    curves = _moving_averages(losses, window)
    ax = axes_or_new(ax)
    for label, (steps, means), style in with_styles(curves):
        shown = -means if log_evidence is None else log_evidence + means
        ax.plot(steps, shown, linestyle=style, label=label)
    ax.set_xlabel("step")
    if log_evidence is None:
        ax.set_ylabel("ELBO (nats)")
    else:
        ax.set_ylabel("log evidence - ELBO (nats)")
        ax.set_yscale("log", nonpositive="mask")
    show_legend(ax)
    return ax


Curve = tuple[np.ndarray, np.ndarray]


def _moving_averages(losses: Mapping[str, ArrayLike] | ArrayLike, window: int) -> dict[str, Curve]:
    return {
        label: _moving_average(f"losses[{label!r}]" if label else "losses", values, window)
        for label, values in by_label(losses).items()
    }


def _moving_average(name: str, values: ArrayLike, window: int) -> Curve:
    """Return the steps that end a window and have a loss, and the mean of those of the window."""
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    array = as_array(name, values, "num_steps")
    is_loss = np.isfinite(array)
    if not is_loss.any():
        raise ValueError(f"{name} must hold a finite loss, got none in {len(array)} steps")
    ones = np.ones(min(window, len(array)))
    sums = np.convolve(np.where(is_loss, array, 0.0), ones, mode="valid")
    counts = np.convolve(is_loss, ones, mode="valid")
    shown = is_loss[len(ones) - 1 :]
    steps = np.arange(len(ones), len(array) + 1)
    return steps[shown], sums[shown] / counts[shown]
