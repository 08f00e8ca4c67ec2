"""Tables of weighted draws."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from ..diagnostics.entries import entry_names


def describe(values: Mapping[str, Tensor], weights: Tensor) -> pd.DataFrame:
    """Tabulate each entry of each site, without and with weights.

    Parameters
    ----------
    values
        Draws by site, ``(S, *site_shape)``.
    weights
        Normalised importance weights, ``(S,)``.

    Examples
    --------
    >>> import torch
    >>> table = describe({"x": torch.arange(4.0).reshape(2, 2)}, torch.tensor([0.5, 0.5]))
    >>> table["mean"].to_dict()
    {'x[0]': 1.0, 'x[1]': 2.0}
    """
    rows = {}
    for name, value in values.items():
        flat = value.double().reshape(len(value), -1)
        for i, entry in enumerate(entry_names(name, value.shape[1:])):
            rows[entry] = _describe_entry(flat[:, i], weights.double())
    return pd.DataFrame.from_dict(rows, orient="index")


def _describe_entry(draws: Tensor, weights: Tensor) -> dict[str, float]:
    q05, q50, q95 = draws.quantile(draws.new_tensor([0.05, 0.5, 0.95])).tolist()
    weighted_mean = weights @ draws
    weighted_sd = (weights @ (draws - weighted_mean).square()).sqrt()
    return {
        "mean": draws.mean().item(),
        "sd": draws.std().item(),
        "q05": q05,
        "median": q50,
        "q95": q95,
        "weighted_mean": weighted_mean.item(),
        "weighted_sd": weighted_sd.item(),
    }
