"""Draws given one observation or many, as tables."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch
from torch import Tensor

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


def batch_dims(batch_dim: int) -> list[str]:
    """Name the dimensions of a batch of observations.

    Examples
    --------
    >>> batch_dims(1), batch_dims(2)
    (['observation'], ['observation_dim_0', 'observation_dim_1'])
    """
    if batch_dim == 1:
        return ["observation"]
    return [f"observation_dim_{i}" for i in range(batch_dim)]


def _table(draws: Mapping[str, Tensor]) -> pd.DataFrame:
    size = len(next(iter(draws.values())))
    table = describe(draws, torch.full((size,), 1 / size))
    return table.drop(columns=["weighted_mean", "weighted_sd"])
