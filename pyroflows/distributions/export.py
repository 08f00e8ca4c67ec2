"""A learned density next to data, as ArviZ data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..random_state import seeded
from .maximum_likelihood import Rows

if TYPE_CHECKING:
    from .flow import Flow
    from .mixture import FlowMixture

CHUNK = 4096  # rows at a time


@torch.no_grad()
def density_to_arviz(
    density: Flow | FlowMixture,
    data: Tensor | np.ndarray,
    context: Tensor | np.ndarray | None = None,
    *,
    name: str = "x",
    num_replicates: int = 100,
    dims: Sequence[str] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
) -> Any:
    """Return data, and data sets like them drawn from a density, as ArviZ data.

    The group ``posterior_predictive`` holds the replicated data sets, for predictive checks such as
    ``plot_ppc`` or ``plot_ppc_dist``; ``log_likelihood`` the log-density of each row, the same in
    every draw because the density is a single one; ``observed_data`` the rows and ``constant_data``
    their contexts. The mean log-density and its standard error are in the attributes.

    Parameters
    ----------
    density
        The density.
    data
        Rows, shape ``(N, *event_shape)``, best those that it was not fitted to.
    context
        What each row is conditioned on, shape ``(N, context_dim)``. Only for densities with a
        context.
    name
        What to call the rows.
    num_replicates
        Number of data sets to draw.
    dims
        Names of the dimensions of a row.
    coords
        Labels of dimensions, of which ``row`` is one.
    seed
        Makes the draws reproducible; the global random state is left alone.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former with ArviZ 0.x, the latter with ArviZ 1.x.

    Raises
    ------
    TypeError
        If ``data`` or ``context`` is not an array.
    ValueError
        If they have the wrong shape, numbers that are not finite or constant entries; if a context
        is missing or unexpected; if ``num_replicates`` is below 1.

    Notes
    -----
    Costs ``N`` densities and ``N * num_replicates`` draws, all in memory at once.

    Examples
    --------
    >>> import pyroflows as pf
    >>> flow = pf.Flow(None, pf.flow("realnvp", 2, num_layers=2))
    >>> data = density_to_arviz(flow, torch.randn(50, 2), dims=["coordinate"])
    >>> data["posterior_predictive"]["x"].sizes["row"]
    50
    """
    from ..arviz import build  # imported late: importing arviz takes seconds

    if num_replicates < 1:
        raise ValueError(f"num_replicates must be at least 1, got {num_replicates}")
    like = next(density.parameters())
    rows = density.rows(data, context, like)
    log_density = torch.cat([density.score(r.data, r.context) for r in rows.chunks(CHUNK)])
    replicates = _replicates(density, rows, num_replicates, seed)
    row_dims = dims or [f"{name}_dim_{i}" for i in range(len(density.event_shape))]
    draws = (1, num_replicates)
    return build(
        {
            "posterior_predictive": {name: _numpy(replicates)[np.newaxis]},
            "log_likelihood": {name: np.broadcast_to(_numpy(log_density), (*draws, len(rows)))},
            "observed_data": {name: _numpy(rows.data)},
            "constant_data": {} if rows.context is None else {"context": _numpy(rows.context)},
        },
        dims={name: ["row", *row_dims], "context": ["row", "context_dim_0"]},
        coords=coords,
        attrs={
            "inference_library": "pyroflows",
            "method": type(density).__name__,
            "mean_log_density": log_density.mean().item(),
            "standard_error": log_density.std().item() / math.sqrt(len(rows)),
        },
    )


def _replicates(density: Flow | FlowMixture, rows: Rows, num_replicates: int, seed: int) -> Tensor:
    """Draw data sets ``(num_replicates, N, *event_shape)``, of the same contexts."""
    with seeded(seed):
        if rows.context is None:
            return density.sample((num_replicates, len(rows)))
        return density.condition(rows.context).sample((num_replicates,))


def _numpy(value: Tensor) -> np.ndarray:
    return value.cpu().numpy()
