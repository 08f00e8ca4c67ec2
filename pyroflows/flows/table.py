"""The registry as a table."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Literal

import pandas as pd

from .registry import names, spec


def table(event: Literal["vector", "image"] = "vector") -> pd.DataFrame:
    """Return what each registered architecture is and promises, a row each.

    Parameters
    ----------
    event
        Which architectures: those for vectors, or those for images.

    Returns
    -------
    pandas.DataFrame
        Indexed by name, with a ``description`` and the fields of :class:`FlowSpec`.

    Examples
    --------
    >>> bool(table().loc["maf", "fast_inverse"]), list(table("image").index)
    (True, ['glow', 'realnvp_image'])
    """
    rows = []
    for name in names(event):
        row = dataclasses.asdict(spec(name))
        description = inspect.getdoc(row.pop("factory")) or ""
        rows.append({**row, "description": description.split("\n\n")[0].replace("\n", " ")})
    return pd.DataFrame(rows).set_index("name")
