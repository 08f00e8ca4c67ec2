"""Draws and observations as ArviZ data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Arrays = Mapping[str, Tensor | np.ndarray]


def export(
    groups: Mapping[str, Arrays],
    about: Mapping[str, Any],
    *,
    batch_dims: Sequence[str] = (),
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Return groups of tensors as ArviZ data.

    Parameters
    ----------
    groups
        Draws by group and site, ``(S, *batch, *shape)``; without ``S`` in ``observed_data``, and
        without ``S`` and batch in ``constant_data``.
    about
        The attributes.
    batch_dims
        Names of the dimensions in ``batch``.
    dims
        Names of the dimensions in ``shape`` by site.
    coords
        Labels by dimension.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former with ArviZ 0.x, the latter with ArviZ 1.x.

    Examples
    --------
    >>> import torch
    >>> draws = {"theta": torch.zeros(100, 5, 2)}
    >>> data = export({"posterior": draws}, {"seed": 0}, batch_dims=["observation"])
    >>> data["posterior"]["theta"].dims
    ('chain', 'draw', 'observation', 'theta_dim_0')
    """
    from ...arviz import build  # imported late: importing arviz takes seconds

    arrays = {
        group: {name: _array(value, group) for name, value in values.items()}
        for group, values in groups.items()
    }
    names = dict(dims or {})
    if batch_dims:
        names = {
            name: [*batch_dims, *names.get(name, _numbered(name, value, group, len(batch_dims)))]
            for group, values in arrays.items()
            if group != "constant_data"
            for name, value in values.items()
        }
    attrs = {"inference_library": "pyroflows", **about}
    return build(arrays, dims=names, coords=coords, attrs=attrs)


def _array(value: Tensor | np.ndarray, group: str) -> np.ndarray:
    """Return draws as one chain, and data as they are."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return array if group.endswith("_data") else array[np.newaxis]


def _numbered(name: str, value: np.ndarray, group: str, batch_dim: int) -> list[str]:
    """Number the dimensions of a site that are neither draws nor observations."""
    size = value.ndim - batch_dim - (0 if group.endswith("_data") else 2)
    return [f"{name}_dim_{i}" for i in range(size)]
