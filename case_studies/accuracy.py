"""Distance of learned posterior draws from exact ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyroflows.diagnostics import c2st


def accuracy(learned: Tensor, exact: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Compare draws ``(S, D)``: by a classifier, and by means and deviations of each parameter.

    There may be more exact draws: the classifier sees as many of both.
    """
    errors = (learned.mean(0) - exact.mean(0)) / exact.std(0)
    ratios = learned.std(0) / exact.std(0)
    return {
        "C2ST": c2st(exact[: len(learned)], learned),
        "errors of means, in posterior sds": dict(zip(names, errors.tolist(), strict=True)),
        "ratios of sds": dict(zip(names, ratios.tolist(), strict=True)),
    }
