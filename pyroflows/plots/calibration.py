"""Calibration: ranks of true parameters, and how often regions hold them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from operator import itemgetter
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from ..diagnostics import SBC, Coverage
from ..diagnostics.ecdf import RankECDF, bin_counts, bin_edges
from .style import BAND, axes_grid_or_new, axes_or_new, by_label, show_legend, with_styles

MINIMUM_PER_BIN = 5
BANDS = (BAND, "0.75", "0.65")  # of different numbers of replicates
COLUMNS = 4  # panels in a row of a new figure


def plot_ranks(
    test: SBC, num_bins: int = 20, confidence: float = 0.95, axes: Any = None
) -> np.ndarray:
    r"""Draw histograms of the ranks of true parameters, one panel each, with simultaneous bands.

    Heights are counts over those expected of uniform ranks. Ranks that pile up at both ends tell of
    a posterior that is too narrow, in the middle of one that is too wide, at one end of a bias [1].
    Bands are binomial quantiles at :math:`\gamma / 2` and :math:`1 - \gamma / 2` with
    :math:`\gamma = (1 - \text{confidence}) / \text{number of bins}`: if ranks are uniform, all bars
    of a panel end within them with the stated confidence at least (Bonferroni).

    Parameters
    ----------
    test
        What :func:`~pyroflows.diagnostics.sbc` returns: ranks ``(N, D)``.
    num_bins
        Number of bins at most; there are fewer where ranks or replicates are few, five replicates
        a bin or more.
    confidence
        Probability between 0 and 1 that all bars end within the band.
    axes
        Where to draw, an array of ``D`` axes of any shape. Default: a new figure.

    Returns
    -------
    numpy.ndarray of Axes, shape (D,)
        Each with one bar a bin.

    Raises
    ------
    TypeError
        If ``test`` is no :class:`~pyroflows.diagnostics.SBC`.
    ValueError
        If ``num_bins`` is below 2, ``confidence`` not between 0 and 1, or axes are not ``D``.

    References
    ----------
    [1] S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman. Validating Bayesian inference
        algorithms with simulation-based calibration.
        `arXiv:1804.06788 <https://arxiv.org/abs/1804.06788>`_, 2018.

    Examples
    --------
    >>> import torch
    >>> test = SBC(torch.arange(100).unsqueeze(-1), 99, ("theta",))
    >>> (ax,) = plot_ranks(test, num_bins=10)
    >>> bool(np.allclose([bar.get_height() for bar in ax.containers[0]], 1.0))
    True
    """
    _check("test", test, SBC)
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, got {num_bins}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    size, dim = test.ranks.shape
    panels = _panels(axes, dim)
    inner = bin_edges(test.num_draws, min(num_bins, size // MINIMUM_PER_BIN))
    edges = np.array([0, *inner.tolist(), test.num_draws + 1]) / (test.num_draws + 1)
    widths = np.diff(edges)
    tail = (1 - confidence) / len(widths) / 2
    lower, upper = (stats.binom.ppf(q, size, widths) / (size * widths) for q in (tail, 1 - tail))
    counts = bin_counts(test.ranks, inner).numpy()
    for ax, name, column in zip(panels, test.names, counts.T, strict=True):
        ax.stairs(
            upper, edges, baseline=lower, fill=True, color=BAND, label=_band(confidence, size)
        )
        ax.axhline(1.0, color="0.5", linewidth=0.8)
        heights = column / (size * widths)
        ax.bar(edges[:-1], heights, widths, align="edge", fill=False, edgecolor="black")
        ax.set(title=name, xlabel="rank / number of draws", xlim=(0, 1))
    panels[0].set_ylabel("count / expected count")
    panels[0].legend(loc="lower center", fontsize="small", framealpha=1.0)
    return panels


def plot_ecdf_pit(test: SBC, confidence: float = 0.95, ax: Axes | None = None) -> Axes:
    """Draw the distribution of the ranks of each true parameter minus the uniform one, with bands.

    A curve that leaves the band betrays a posterior that is not calibrated: a slope up at both ends
    and down in the middle tells that it is too narrow, the reverse too wide, a bump to one side a
    bias [1]. The bands are those of :func:`~pyroflows.diagnostics.rank_ecdf`: exact, and for a
    whole curve.

    Parameters
    ----------
    test
        What :func:`~pyroflows.diagnostics.sbc` returns: ranks ``(N, D)``.
    confidence
        Probability between 0 and 1 that the curve of one calibrated parameter stays in the band.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With a line for zero, then one for each parameter.

    Raises
    ------
    TypeError
        If ``test`` is no :class:`~pyroflows.diagnostics.SBC`.
    ValueError
        If ``confidence`` is not between 0 and 1.

    References
    ----------
    [1] T. Säilynoja, P.-C. Bürkner, A. Vehtari. Graphical test for discrete uniformity and its
        applications in goodness of fit evaluation and multiple sample comparison.
        `arXiv:2103.10522 <https://arxiv.org/abs/2103.10522>`_, 2021.

    Examples
    --------
    >>> import torch
    >>> ax = plot_ecdf_pit(SBC(torch.arange(100).unsqueeze(-1), 99, ("theta",)))
    >>> float(abs(ax.lines[1].get_ydata()).max())
    0.0
    """
    _check("test", test, SBC)
    curves = test.ecdf(confidence)
    ax = axes_or_new(ax)
    levels, lower, upper = _to_both_ends(curves)
    ax.fill_between(levels, lower, upper, color=BAND, label=_band(confidence, len(test.ranks)))
    ax.axhline(0.0, color="0.5", linewidth=0.8)
    differences = dict(zip(test.names, curves.difference.numpy().T, strict=True))
    for name, difference, style in with_styles(differences):
        ax.plot(levels, np.pad(difference, 1), linestyle=style, label=name)
    ax.set(xlabel="rank of the truth / number of draws", ylabel="ECDF - uniform", xlim=(0, 1))
    show_legend(ax, fontsize="small")
    return ax


def plot_coverage(result: Coverage | Mapping[str, Coverage], ax: Axes | None = None) -> Axes:
    """Draw the share of truths that credible regions hold against their credibility, with bands.

    A calibrated posterior follows the diagonal. For regions of highest density, a curve above it
    tells of a posterior that is too wide, one below it of one that is too narrow or biased.

    Parameters
    ----------
    result
        What :func:`~pyroflows.diagnostics.coverage` or :func:`~pyroflows.diagnostics.tarp`
        returns, or several by label. Those of as many replicates and draws share a band, which
        holds a whole calibrated curve with a probability of 95 %.
    ax
        Where to draw. Default: a new figure.

    Returns
    -------
    Axes
        With the diagonal as the first line, then one for each result.

    Raises
    ------
    TypeError
        If there is anything but :class:`~pyroflows.diagnostics.Coverage`.
    ValueError
        If there is nothing to draw.

    Examples
    --------
    >>> import torch
    >>> ax = plot_coverage({"flow": Coverage(torch.arange(100), 99)})
    >>> bool(np.allclose(ax.lines[1].get_xdata(), ax.lines[1].get_ydata()))
    True
    """
    results = by_label(result)
    for label, each in results.items():
        _check(f"result[{label!r}]" if label else "result", each, Coverage)
    ax = axes_or_new(ax)
    for (size, curves), shade in zip(_distinct_bands(results), cycle(BANDS)):
        levels, lower, upper = _to_both_ends(curves)
        ax.fill_between(
            levels, levels + lower, levels + upper, color=shade, label=_band(0.95, size)
        )
    ax.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
    for label, each, style in with_styles(results):
        shares = [0.0, *each.curve.tolist(), 1.0]
        ax.plot([0.0, *each.levels.tolist(), 1.0], shares, linestyle=style, label=label)
    ax.set(xlabel="credibility", ylabel="share of truths inside", xlim=(0, 1), ylim=(0, 1))
    ax.set_aspect("equal")
    show_legend(ax, fontsize="small")
    return ax


def _check(name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, got {type(value).__name__}")


def _panels(axes: Any, count: int) -> np.ndarray:
    """Return as many axes as parameters, new ones in rows."""
    if axes is not None:
        panels = np.asarray(axes, dtype=object).reshape(-1)
        if len(panels) != count:
            raise ValueError(f"axes must be as many as parameters, {count}, got {len(panels)}")
        return panels
    columns = min(count, COLUMNS)
    panels = axes_grid_or_new(None, -(-count // columns), columns, (3.0, 2.8)).reshape(-1)
    for ax in panels[count:]:
        ax.set_visible(False)
    return panels[:count]


def _band(confidence: float, size: int) -> str:
    return f"{100 * confidence:.3g} % band, N = {size}"


def _to_both_ends(curves: RankECDF) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return levels and band from 0 to 1, where no curve can differ from the uniform one."""
    levels = np.concatenate([[0.0], curves.levels.numpy(), [1.0]])
    return levels, np.pad(curves.lower.numpy(), 1), np.pad(curves.upper.numpy(), 1)


def _distinct_bands(results: Mapping[str, Coverage]) -> list[tuple[int, RankECDF]]:
    """Return numbers of replicates and a curve with its band for each, the widest first.

    Bands depend on the number of replicates and that of draws.
    """
    curves = {(len(each.ranks), each.num_draws): each.ecdf for each in results.values()}
    return [(size, curve) for (size, _), curve in sorted(curves.items(), key=itemgetter(0))]
