"""Calibration of an amortized posterior on fresh simulations: numbers and a picture."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt

from pyroflows.diagnostics import SBC
from pyroflows.plots import LINE_STYLES

CREDIBILITIES = (0.5, 0.9)


def calibration_metrics(test: SBC) -> dict[str, Any]:
    """Return the verdict of the test and how often central intervals hold the truth."""
    metrics: dict[str, Any] = {
        "SBC replicates": len(test.ranks),
        "SBC smallest p-value": test.p_values.min().item(),
        "SBC passes": test.passes(),
    }
    for credibility in CREDIBILITIES:
        inside = (test.pit - 0.5).abs() <= credibility / 2
        shares = inside.double().mean(0).tolist()
        metrics[f"coverage of {credibility:.0%} intervals"] = dict(
            zip(test.names, shares, strict=True)
        )
    return metrics


def draw_calibration(test: SBC) -> plt.Figure:
    """Draw the distribution of the ranks minus the uniform one, and its 95 % bands."""
    figure, ax = plt.subplots()
    curves = test.ecdf()
    ax.fill_between(curves.levels, curves.lower, curves.upper, color="0.85", label="95 % band")
    ax.axhline(0, color="0.5", linewidth=0.8)
    for i, name in enumerate(test.names):
        style = LINE_STYLES[i % len(LINE_STYLES)]
        ax.plot(curves.levels, curves.difference[:, i], linestyle=style, color="black", label=name)
    ax.set(xlabel="rank of the truth / number of draws", ylabel="ECDF of ranks - uniform")
    ax.set_title(f"calibration, {len(test.ranks)} replicates")
    ax.legend(fontsize="small")
    return figure
