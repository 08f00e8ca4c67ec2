"""Tables with a row for each draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from pyroflows.diagnostics.entries import entry_names


def frame(values: Mapping[str, Tensor], dims: Sequence[str] = ("draw",)) -> pd.DataFrame:
    """Lay draws out as a table: a row for each draw, a column for each entry of each site.

    Parameters
    ----------
    values
        Draws by site, shape ``(*sample_shape, *site_shape)``.
    dims
        Names of the dimensions in ``sample_shape``, which index the rows.

    Examples
    --------
    >>> import torch
    >>> table = frame({"x": torch.zeros(3, 2), "y": torch.ones(3)})
    >>> list(table.columns), table.index.name, len(table)
    (['x[0]', 'x[1]', 'y'], 'draw', 3)
    """
    columns: dict[str, np.ndarray] = {}
    for name, value in values.items():
        shape = value.shape[len(dims) :]
        flat = value.detach().cpu().reshape(-1, shape.numel()).numpy()
        columns.update(zip(entry_names(name, shape), flat.T, strict=True))
    sample_shape = next(iter(values.values())).shape[: len(dims)]
    return pd.DataFrame(columns, index=index(sample_shape, dims))


def index(shape: Sequence[int], dims: Sequence[str]) -> pd.Index:
    """Number the entries of an array along its named dimensions.

    Examples
    --------
    >>> list(index((2, 2), ("chain", "draw")))
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    >>> list(index((2,), ("draw",)))
    [0, 1]
    """
    if len(dims) == 1:
        return pd.RangeIndex(shape[0], name=dims[0])
    return pd.MultiIndex.from_product([range(size) for size in shape], names=list(dims))
