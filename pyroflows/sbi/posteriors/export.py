"""Posterior draws and what the simulator says of their shapes, as ArviZ data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pyro import poutine
from pyro.infer.autoguide import AutoDiagonalNormal, init_to_value
from torch import Tensor

from ...random_state import preserved
from ...svi.density import ModelDensity
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


def given(
    joint: JointDensity, observed: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> ModelDensity:
    """Return the density of the simulator with an observation as its data.

    Parameters
    ----------
    joint
        The simulator.
    observed
        The observation, by site.
    start
        Parameters of which the density is not zero, ``(*shape)`` by site.
    """
    sites = hidden_trace(joint.simulator, joint.args, joint.kwargs).nodes
    device = sites[joint.space.names[0]]["value"].device
    data, values = ({n: v.to(device) for n, v in group.items()} for group in (observed, start))
    model = poutine.condition(joint.simulator, data)
    with preserved(), warnings.catch_warnings():
        # Simulators may well take one vector at a time, which they did when draws were weighted.
        warnings.filterwarnings("ignore", "the model cannot run for many latent vectors at once")
        # It is never fitted: a density needs the coordinates of a guide.
        guide = AutoDiagonalNormal(model, init_loc_fn=init_to_value(values=values))
        return ModelDensity(model, guide, joint.args, joint.kwargs)
