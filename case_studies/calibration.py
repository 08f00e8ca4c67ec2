"""Calibration of an amortized posterior on fresh simulations, in numbers."""

from __future__ import annotations

from typing import Any

from pyroflows.diagnostics import SBC

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
