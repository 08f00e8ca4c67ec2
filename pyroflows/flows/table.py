"""The registry as a table."""

from __future__ import annotations

import dataclasses
import inspect

import pandas as pd

from .registry import names, spec


def table() -> pd.DataFrame:
    """Return what each registered architecture is and promises, a row each.

    Returns
    -------
    pandas.DataFrame
        Indexed by name, with a ``description`` and the fields of :class:`FlowSpec`.

    Examples
    --------
    >>> bool(table().loc["maf", "fast_inverse"])
    True
    """
    rows = []
    for name in names():
        row = dataclasses.asdict(spec(name))
        description = inspect.getdoc(row.pop("factory")) or ""
        rows.append({**row, "description": description.split("\n\n")[0].replace("\n", " ")})
    return pd.DataFrame(rows).set_index("name")
