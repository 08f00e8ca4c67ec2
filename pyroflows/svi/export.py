"""What a model says about draws, as the groups of an ArviZ object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .density import (
    CHUNK,
    PARTICLES,
    ModelDensity,
    is_deterministic,
    per_particle,
    site_shape,
)

Groups = dict[str, dict[str, np.ndarray]]


def model_groups(density: ModelDensity, z: Tensor, num_prior_draws: int) -> Groups:
    """Gather what a model says about posterior draws ``(S, D)``, about its prior and its data."""
    groups = {**_posterior_groups(density, z), **_prior_groups(density, num_prior_draws)}
    groups["observed_data"] = _observed_data(density)
    groups["constant_data"] = _constant_data(density, groups["observed_data"])
    return groups


def assemble(
    density: ModelDensity,
    groups: Groups,
    attrs: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Build the ArviZ object, dimensions named after the model's plates unless ``dims`` does."""
    from ..arviz import build  # imported late: importing arviz takes seconds

    return build(groups, dims={**_plate_dims(density), **(dims or {})}, coords=coords, attrs=attrs)


def as_chain(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Turn tensors ``(S, *shape)`` into arrays ``(1, S, *shape)``: one chain."""
    return {name: _numpy(value)[np.newaxis] for name, value in values.items()}


def _posterior_groups(density: ModelDensity, z: Tensor) -> Groups:
    without_data = density.without_data()
    chunks = z.split(CHUNK)

    def collect(key: str, select: Callable, model: Callable | None = None) -> dict[str, np.ndarray]:
        parts = [density.collect(chunk, key, select, model) for chunk in chunks]
        return as_chain({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    return {
        "posterior": as_chain({**density.constrain(z), **density.deterministic(z)}),
        "unconstrained_posterior": as_chain(_unconstrained(density, z)),
        "log_likelihood": {} if density.has_enumeration else collect("log_prob", density.is_data),
        "log_prior": collect("log_prob", lambda site: site["name"] in density.sites),
        "posterior_predictive": collect("value", density.is_data, without_data),
    }


def _prior_groups(density: ModelDensity, num_draws: int) -> Groups:
    """Draw from the prior, of latent and observed sites alike."""
    model = density.without_data()
    prototype = density.prototype.nodes
    latent = [*density.sites, *(n for n, site in prototype.items() if is_deterministic(site))]
    observed = list(density.data_sites)
    runs = 1 if density.vectorized else num_draws
    with poutine.block():
        if density.vectorized:
            model = pyro.plate(PARTICLES, num_draws, dim=-1 - density.plate_nesting)(model)
        traces = [
            poutine.trace(model).get_trace(*density.args, **density.kwargs) for _ in range(runs)
        ]

    def values(names: list[str]) -> dict[str, np.ndarray]:
        size = num_draws // runs
        return as_chain(
            {
                name: torch.cat(
                    [
                        per_particle(t.nodes[name]["value"], size, site_shape(prototype[name]))
                        for t in traces
                    ]
                )
                for name in names
            }
        )

    return {"prior": values(latent), "prior_predictive": values(observed)}


def _unconstrained(density: ModelDensity, z: Tensor) -> dict[str, Tensor]:
    shapes = density.guide._unconstrained_shapes
    sizes = [shape.numel() for shape in shapes.values()]
    parts = zip(shapes.items(), z.split(sizes, -1), strict=True)
    return {name: part.reshape(len(z), *shape) for (name, shape), part in parts}


def _observed_data(density: ModelDensity) -> dict[str, np.ndarray]:
    return {
        name: _numpy(site["value"].expand(site_shape(site)))
        for name, site in density.data_sites.items()
    }


def _constant_data(
    density: ModelDensity, observed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the array arguments of the model that are not its data."""
    try:
        arguments = inspect.signature(density.model).bind(*density.args, **density.kwargs).arguments
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    arrays = {
        name: _numpy(value) if isinstance(value, Tensor) else np.array(value)
        for name, value in arguments.items()
        if isinstance(value, Tensor | np.ndarray)
    }
    return {
        name: value
        for name, value in arrays.items()
        if not any(_repeats(value, data) for data in observed.values())
    }


def _repeats(value: np.ndarray, data: np.ndarray) -> bool:
    """Tell whether an argument holds the data of a site, which plates may repeat."""
    try:
        return np.array_equal(np.broadcast_to(value, data.shape), data)
    except ValueError:
        return False


def _plate_dims(density: ModelDensity) -> dict[str, list[str]]:
    """Name the dimensions of each site: those of plates after the plate."""
    dims = {}
    for name, site in density.prototype.nodes.items():
        if site["type"] != "sample":
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        # Pyro takes all of a deterministic value for an event, inside plates too.
        shape = site_shape(site)
        event_dim = 0 if is_deterministic(site) else site["fn"].event_dim
        batch_dim = len(shape) - event_dim
        dims[name] = [
            plates.get(i - batch_dim, f"{name}_dim_{i}") if i < batch_dim else f"{name}_dim_{i}"
            for i in range(len(shape))
        ]
    return dims


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
