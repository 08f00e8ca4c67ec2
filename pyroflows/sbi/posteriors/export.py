"""Posterior draws and what the simulator says of their shapes, as ArviZ data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...svi.export import constant_data, plate_dims
from ..model.exchangeable import hidden_trace
from ..model.export import Arrays, export
from ..model.joint_density import JointDensity


def export_posterior(
    groups: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, Any],
    joint: JointDensity | None,
    *,
    batch_dims: Sequence[str] = (),
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Return groups of tensors as ArviZ data, dimensions named after plates unless ``dims`` does.

    Where the simulator is known, it runs once, and its arguments are ``constant_data``; see
    :func:`pyroflows.sbi.model.export.export`.
    """
    arrays: dict[str, Arrays] = dict(groups)
    if joint is not None:
        call = joint.simulator, joint.args, joint.kwargs
        sites = hidden_trace(*call).nodes
        known = {n: sites[n] for n in (*joint.space.names, *joint.observations.names)}
        dims = {**plate_dims(known), **(dims or {})}
        observed = {name: value.cpu().numpy() for name, value in groups["observed_data"].items()}
        arrays["constant_data"] = constant_data(*call, observed)
    return export(arrays, about, batch_dims=batch_dims, dims=dims, coords=coords)
