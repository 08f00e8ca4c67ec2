"""Names of the entries of a site."""

from __future__ import annotations

import numpy as np
import torch


def entry_names(name: str, shape: torch.Size) -> list[str]:
    """Return a name for each entry of a site.

    Examples
    --------
    >>> entry_names("x", torch.Size([2, 2]))
    ['x[0, 0]', 'x[0, 1]', 'x[1, 0]', 'x[1, 1]']
    >>> entry_names("x", torch.Size())
    ['x']
    """
    if not shape:
        return [name]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(*shape)]
