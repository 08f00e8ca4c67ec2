"""Draws given one observation or many, as a table and as arrays with named dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...arviz import build
from ...svi.summary import describe


def tabulate(draws: Mapping[str, Tensor], batch_dim: int) -> pd.DataFrame:
    """Tabulate draws ``(S, *batch, *shape)``, for each observation of the batch.

    Examples
    --------
    >>> tabulate({"theta": torch.zeros(10, 3)}, 1)["mean"].to_dict()
    {(0, 'theta'): 0.0, (1, 'theta'): 0.0, (2, 'theta'): 0.0}
    """
    if not batch_dim:
        return _table(draws)
    flat = {name: value.flatten(1, batch_dim) for name, value in draws.items()}
    number = next(iter(flat.values())).shape[1]
    tables = {i: _table({n: value[:, i] for n, value in flat.items()}) for i in range(number)}
    return pd.concat(tables, names=["observation", None])


def _table(draws: Mapping[str, Tensor]) -> pd.DataFrame:
    size = len(next(iter(draws.values())))
    table = describe(draws, torch.full((size,), 1 / size))
    return table.drop(columns=["weighted_mean", "weighted_sd"])


def export(
    draws: Mapping[str, Tensor],
    log_prob: Tensor,
    observed: Mapping[str, Tensor],
    about: Mapping[str, Any],
) -> Any:
    """Return draws ``(S, *batch, *shape)``, log-densities ``(S, *batch)`` and data for ArviZ."""
    batch_dim = log_prob.dim() - 1
    batch = [f"observation_dim_{i}" for i in range(batch_dim)]
    if batch_dim == 1:
        batch = ["observation"]
    groups = {
        "posterior": {name: value.cpu().numpy()[None] for name, value in draws.items()},
        "sample_stats": {"lp": log_prob.cpu().numpy()[None]},
        "observed_data": {name: value.cpu().numpy() for name, value in observed.items()},
    }
    dims = {
        name: [*batch, *(f"{name}_dim_{i}" for i in range(value.ndim - skipped - batch_dim))]
        for group, skipped in (("posterior", 2), ("sample_stats", 2), ("observed_data", 0))
        for name, value in groups[group].items()
    }
    return build(groups, dims=dims, attrs={"inference_library": "pyroflows", **about})
