"""Variational results as ArviZ objects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from .density import PARTICLES, ModelDensity, is_deterministic, per_particle
from .posterior import CHUNK, VariationalPosterior

Groups = dict[str, dict[str, np.ndarray]]


def to_arviz(
    result: VariationalPosterior,
    *,
    resample: bool = False,
    num_prior_draws: int = 1000,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    seed: int = 0,
) -> Any:
    """Convert a variational result to ArviZ.

    The result's draws are one chain of the group ``posterior``, with ``unconstrained_posterior``,
    ``sample_stats`` (``lp``, ``log_q``, ``log_weight``, ``log_weight_psis``), ``log_likelihood``,
    ``log_prior``, ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data`` and
    ``constant_data`` (arguments of the model that are not observed). Dimensions are named after
    plates. The verdict is in the attributes.

    Parameters
    ----------
    result
        What :func:`pyroflows.fit` returned.
    resample
        Whether to resample the draws by their smoothed importance weights; the weights, used up,
        are then equal.
    num_prior_draws
        Number of draws from the prior.
    dims
        Names of the dimensions of a site, beyond those of its plates.
    coords
        Labels of dimensions, for instance ``{"school": names}`` for a plate called ``school``.
    seed
        Makes the result reproducible.

    Returns
    -------
    arviz.InferenceData or xarray.DataTree
        The former with ArviZ 0.x, the latter with ArviZ 1.x.

    Examples
    --------
    >>> import pyro.distributions as dist, pyroflows as pf
    >>> def model(data):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("item", len(data)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
    >>> guide = pf.AutoRealNVP(model, num_layers=2)
    >>> result = pf.fit(model, guide, (torch.ones(3),), num_steps=10, progress=False)
    >>> result.to_arviz()["log_likelihood"]["x"].dims
    ('chain', 'draw', 'item')
    """
    from ..arviz import build  # imported late: importing arviz takes seconds

    density = result.density
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        groups = _posterior_groups(result, resample)
        groups.update(_prior_groups(density, num_prior_draws))
    groups["observed_data"] = _observed_data(density)
    groups["constant_data"] = _constant_data(density, groups["observed_data"])
    return build(
        groups,
        dims={**_plate_dims(density), **(dims or {})},
        coords=coords,
        attrs={**result.scalars(), **_attributes(result)},
    )


def _posterior_groups(result: VariationalPosterior, resample: bool) -> Groups:
    z = result.draws
    stats = {
        "lp": result.log_p,
        "log_q": result.log_q,
        "log_weight": result.log_weights,
        "log_weight_psis": result.log_weights_psis,
    }
    if resample:
        index = torch.multinomial(result.log_weights_psis.exp(), len(z), replacement=True)
        z = z[index]
        equal = torch.full_like(result.log_q, -np.log(len(z)))
        stats = {"lp": result.log_p[index], "log_q": result.log_q[index]}
        stats.update(log_weight=torch.zeros_like(equal), log_weight_psis=equal)
    density = result.density
    without_data = poutine.uncondition(density.model)
    chunks = z.split(CHUNK)

    def collect(key: str, select: Callable, model: Callable | None = None) -> dict[str, np.ndarray]:
        parts = [density.collect(chunk, key, select, model) for chunk in chunks]
        return {name: _chain(torch.cat([part[name] for part in parts])) for name in parts[0]}

    latent = set(density.sites)
    return {
        "posterior": {name: _chain(value) for name, value in result.site_values(z).items()},
        "unconstrained_posterior": _unconstrained(density, z),
        "sample_stats": {name: _chain(value) for name, value in stats.items()},
        "log_likelihood": {} if density.has_enumeration else collect("log_prob", density.is_data),
        "log_prior": collect("log_prob", lambda site: site["name"] in latent),
        "posterior_predictive": collect("value", density.is_data, without_data),
    }


def _prior_groups(density: ModelDensity, num_draws: int) -> Groups:
    """Draw from the prior, of latent and observed sites alike."""
    model = poutine.uncondition(density.model)
    prototype = density.prototype.nodes
    latent = [*density.sites, *(n for n, site in prototype.items() if is_deterministic(site))]
    observed = [name for name, site in prototype.items() if density.is_data(site)]
    if density.vectorized:
        model = pyro.plate(PARTICLES, num_draws, dim=-1 - density.plate_nesting)(model)
    runs = 1 if density.vectorized else num_draws
    with poutine.block():
        traces = [
            poutine.trace(model).get_trace(*density.args, **density.kwargs) for _ in range(runs)
        ]

    def values(names: list[str]) -> dict[str, np.ndarray]:
        size = num_draws // runs
        return {
            name: _chain(
                torch.cat(
                    [
                        per_particle(t.nodes[name]["value"], size, prototype[name]["value"])
                        for t in traces
                    ]
                )
            )
            for name in names
        }

    return {"prior": values(latent), "prior_predictive": values(observed)}


def _unconstrained(density: ModelDensity, z: Tensor) -> dict[str, np.ndarray]:
    shapes = density.guide._unconstrained_shapes
    sizes = [shape.numel() for shape in shapes.values()]
    parts = zip(shapes.items(), z.split(sizes, -1), strict=True)
    return {name: _chain(part.reshape(len(z), *shape)) for (name, shape), part in parts}


def _observed_data(density: ModelDensity) -> dict[str, np.ndarray]:
    return {
        name: _numpy(site["value"])
        for name, site in density.prototype.nodes.items()
        if density.is_data(site)
    }


def _constant_data(
    density: ModelDensity, observed: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the array arguments of the model that are not its data."""
    try:
        arguments = inspect.signature(density.model).bind(*density.args, **density.kwargs).arguments
    except (TypeError, ValueError):  # a callable without a signature
        return {}
    return {
        name: _numpy(torch.as_tensor(value))
        for name, value in arguments.items()
        if isinstance(value, Tensor | np.ndarray)
        and not any(
            np.array_equal(_numpy(torch.as_tensor(value)), data) for data in observed.values()
        )
    }


def _plate_dims(density: ModelDensity) -> dict[str, list[str]]:
    """Name the dimensions of each site: those of plates after the plate."""
    dims = {}
    for name, site in density.prototype.nodes.items():
        if site["type"] != "sample":
            continue
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        shape, event_dim = site["value"].shape, site["fn"].event_dim
        batch_dim = len(shape) - event_dim
        dims[name] = [
            plates.get(i - batch_dim, f"{name}_dim_{i}") if i < batch_dim else f"{name}_dim_{i}"
            for i in range(len(shape))
        ]
    return dims


def _attributes(result: VariationalPosterior) -> dict[str, Any]:
    guide = result.guide
    return {
        "pareto_k": result.khat,
        "verdict": result.verdict,
        "method": type(guide).__name__,
        "flow": str(getattr(guide, "flow", "")),
        "num_steps": len(result.losses),
        "inference_library": "pyroflows",
    }


def _chain(value: Tensor) -> np.ndarray:
    return _numpy(value)[np.newaxis]


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
