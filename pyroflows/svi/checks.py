"""Checks of models and of values of their sites, with messages that name the site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro import poutine
from torch import Tensor


def at_least(name: str, value: int | None, default: int, minimum: int = 1) -> int:
    """Return an integer, or its default for ``None``; raise unless it is large enough."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_sites(trace: poutine.Trace, latent: Mapping[str, dict], data: Mapping[str, dict]) -> None:
    """Raise ``ValueError`` unless a guide covers a model, and its log-density is finite.

    Parameters
    ----------
    trace
        The model's trace at the guide's initial location.
    latent
        The guide's sites.
    data
        The model's sites that hold data.
    """
    _check_coverage(trace, latent)
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and isinstance(site["log_prob"], Tensor):
            _check_finite(name, site)
    for name, site in data.items():
        _check_support(name, site)


def check_shapes(trace: poutine.Trace, latent: Mapping[str, dict]) -> None:
    """Raise ``ValueError`` if latent sites have other shapes than when the guide was set up."""
    for name, site in latent.items():
        known = site["value"].shape
        if name in trace.nodes and trace.nodes[name]["value"].shape != known:
            raise ValueError(
                f"guide was set up for site {name!r} of shape {tuple(known)}, but with these "
                f"arguments the model's has shape {tuple(trace.nodes[name]['value'].shape)}: make "
                "a new guide, or an AmortizedFlow, whose plate may grow"
            )


def check_values(name: str, site: dict, values: Mapping[str, Tensor]) -> Tensor:
    """Return the values ``(S, *site_shape)`` of a latent site; raise unless they fit it."""
    if name not in values:
        raise ValueError(f"values must hold site {name!r}, got {sorted(values)}")
    value, shape = torch.as_tensor(values[name]).to(site["value"]), site["value"].shape
    if value.dim() != len(shape) + 1 or value.shape[1:] != shape:
        raise ValueError(
            f"values[{name!r}] must have shape {('S', *shape)}, got {tuple(value.shape)}"
        )
    if not site["fn"].support.check(value).all():
        raise ValueError(f"values[{name!r}] leave the support {site['fn'].support}")
    return value


def _check_coverage(trace: poutine.Trace, latent: Mapping[str, dict]) -> None:
    missing = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and site["infer"].get("enumerate") != "parallel"
    ]
    foreign = [name for name in latent if name not in trace.nodes]
    if missing or foreign:
        raise ValueError(
            f"guide must cover the latent sites of the model: it lacks {missing} and has "
            f"{foreign}, which the model has not"
        )


def _check_finite(name: str, site: dict) -> None:
    if torch.isfinite(site["log_prob"]).all():
        return
    value = site["value"]
    bad = int((~torch.isfinite(value)).sum()) if value.is_floating_point() else 0
    reason = (
        f"its value holds {bad} NaN or infinite entries; remove or mask them"
        if bad
        else f"its value is {value.flatten()[:3].tolist()}...; check the data against the support "
        "of the site, or give the guide another init_loc_fn"
    )
    raise ValueError(f"the log-density of site {name!r} is not finite at the start: {reason}")


def _check_support(name: str, site: dict) -> None:
    if site["mask"] is not None:  # what is masked out need not fit
        return
    try:
        fits = site["fn"].support.check(site["value"])
    except NotImplementedError:
        return
    if not fits.all():
        raise ValueError(
            f"the data of site {name!r} leave its support {site['fn'].support}: "
            f"{int((~fits).sum())} entries do"
        )
