"""What a model says about draws, as the groups of an ArviZ object."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..random_state import seeded
from .density import (
    CHUNK,
    ModelDensity,
    is_deterministic,
    per_particle,
    site_shape,
)
from .weighting import without_nan

if TYPE_CHECKING:
    from .posterior import VariationalPosterior

Groups = dict[str, dict[str, np.ndarray]]


@torch.no_grad()
def weighted_groups(
    result: VariationalPosterior,
    resample: bool = False,
    num_prior_draws: int = 1000,
    seed: int = 0,
) -> Groups:
    """Gather the draws of a guide, their weights, and what the model says about them."""
    draws = result.draws
    stats = {
        "lp": result.log_p,
        "log_q": result.log_q,
        "log_weight": result.log_weights,
        "log_weight_psis": result.log_weights_psis,
    }
    with seeded(seed):
        if resample:
            weights = result.log_weights_psis.exp()
            index = torch.multinomial(weights, len(draws), replacement=True)
            draws, stats = draws[index], {name: stats[name][index] for name in ("lp", "log_q")}
            stats["log_weight"] = torch.zeros_like(weights)
            stats["log_weight_psis"] = torch.full_like(weights, -math.log(len(weights)))
        groups = model_groups(result.density, draws, num_prior_draws)
    return {**groups, "sample_stats": as_chain(stats)}


def model_groups(density: ModelDensity, z: Tensor, num_prior_draws: int) -> Groups:
    """Gather what a model says about posterior draws ``(S, D)``, about its prior and its data."""
    groups = {**_posterior_groups(density, z), **_prior_groups(density, num_prior_draws)}
    groups["observed_data"] = _observed_data(density)
    call = density.model, density.args, density.kwargs
    groups["constant_data"] = constant_data(*call, groups["observed_data"])
    return groups


@torch.no_grad()
def log_densities(density: ModelDensity, z: Tensor) -> dict[str, dict[str, Tensor]]:
    """Return the log-densities of observations and of latent numbers at draws ``(S, D)``.

    From groups of ArviZ to sites to tensors ``(S, *shape)``. Where the model sums discrete sites
    out, observations depend on each other, and have no densities of their own.
    """
    names = {
        "log_likelihood": [] if density.has_enumeration else [*density.data_sites],
        "log_prior": [*density.sites],
    }
    wanted = {name for group in names.values() for name in group}
    values = _collect(density, z, "log_prob", lambda site: site["name"] in wanted)
    return {group: {name: values[name] for name in names[group]} for group in names}


@torch.no_grad()
def pointwise_log_likelihood(
    density: ModelDensity, z: Tensor, site: str | None
) -> tuple[Tensor, list[str]]:
    """Return the log-density of each observation at draws ``(S, D)``, and names of its dimensions.

    Parameters
    ----------
    density, z
        The model and the draws.
    site
        The observed site; ``None``: the only one.

    Raises
    ------
    ValueError
        If there is no such site, or it does not hold observations that are independent.
    """
    names = list(density.data_sites)
    name = names[0] if site is None and len(names) == 1 else site
    if name not in names:
        raise ValueError(f"site must be one of the model's observed sites {names}, got {site!r}")
    if density.has_enumeration:
        raise ValueError("the model sums discrete sites out, which makes observations dependent")
    if (torch.as_tensor(density.prototype.nodes[name]["scale"]) != 1).any():
        raise ValueError(f"the likelihood of site {name!r} is scaled, or its plate is subsampled")
    values = _collect(density, z, "log_prob", lambda node: node["name"] == name)[name]
    if values.dim() == 1:
        raise ValueError(
            f"site {name!r} is one observation: data that are independent belong in a pyro.plate"
        )
    return without_nan(values), plate_dims(density.prototype.nodes)[name][: values.dim() - 1]


def assemble(
    density: ModelDensity,
    groups: Groups,
    attrs: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Build the ArviZ object, dimensions named after the model's plates unless ``dims`` does."""
    from ..arviz import build  # imported late: importing arviz takes seconds

    names = {**plate_dims(density.prototype.nodes), **(dims or {})}
    return build(groups, dims=names, coords=coords, attrs=attrs)


def as_chain(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Turn tensors ``(S, *shape)`` into arrays ``(1, S, *shape)``: one chain."""
    return {name: _numpy(value)[np.newaxis] for name, value in values.items()}


def _posterior_groups(density: ModelDensity, z: Tensor) -> Groups:
    predictive = _collect(density, z, "value", density.is_data, density.without_data())
    return {
        "posterior": as_chain({**density.constrain(z), **density.deterministic(z)}),
        "unconstrained_posterior": as_chain(_unconstrained(density, z)),
        **{group: as_chain(values) for group, values in log_densities(density, z).items()},
        "posterior_predictive": as_chain(predictive),
    }


def _collect(
    density: ModelDensity, z: Tensor, key: str, select: Callable, model: Callable | None = None
) -> dict[str, Tensor]:
    """Collect an entry of the selected sites at vectors ``(S, D)``, some at a time."""
    parts = [density.collect(chunk, key, select, model) for chunk in z.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _prior_groups(density: ModelDensity, num_draws: int) -> Groups:
    """Draw from the prior, of latent and observed sites alike."""
    prototype = density.prototype.nodes
    latent = [*density.sites, *(n for n, site in prototype.items() if is_deterministic(site))]
    observed = list(density.data_sites)
    traces = density.draw_prior(num_draws)

    def values(names: list[str]) -> dict[str, np.ndarray]:
        size = num_draws // len(traces)
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
    shapes = density.unconstrained_shapes
    sizes = [shape.numel() for shape in shapes.values()]
    parts = zip(shapes.items(), z.split(sizes, -1), strict=True)
    return {name: part.reshape(len(z), *shape) for (name, shape), part in parts}


def _observed_data(density: ModelDensity) -> dict[str, np.ndarray]:
    return {
        name: _numpy(site["value"].expand(site_shape(site)))
        for name, site in density.data_sites.items()
    }


def constant_data(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    observed: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the array arguments of a model that are not its data."""
    try:
        arguments = inspect.signature(model).bind(*args, **kwargs).arguments
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


def plate_dims(sites: Mapping[str, dict]) -> dict[str, list[str]]:
    """Name the dimensions of each site of a trace: those of plates after the plate."""
    dims = {}
    for name, site in sites.items():
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
