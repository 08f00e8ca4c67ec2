"""Tables of weighted draws."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
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
    tables = [
        pd.DataFrame(
            _describe_entries(value.double().reshape(len(value), -1), weights.double()),
            index=entry_names(name, value.shape[1:]),
        )
        for name, value in values.items()
    ]
    return pd.concat(tables)


def _describe_entries(draws: Tensor, weights: Tensor) -> dict[str, np.ndarray]:
    """Describe each column of draws ``(S, entries)``."""
    # Unlike torch's, numpy's quantiles are not limited in the number of entries.
    q05, q50, q95 = np.quantile(draws.cpu().numpy(), [0.05, 0.5, 0.95], axis=0)
    weighted_mean = weights @ draws
    columns = {
        "mean": draws.mean(0),
        "sd": draws.std(0),
        "q05": q05,
        "median": q50,
        "q95": q95,
        "weighted_mean": weighted_mean,
        "weighted_sd": (weights @ (draws - weighted_mean).square()).sqrt(),
    }
    return {name: np.asarray(torch.as_tensor(value).cpu()) for name, value in columns.items()}
