"""Plates whose elements are exchangeable, read from traces of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .simulator_runs import seeded


def hidden_trace(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> poutine.Trace:
    """Return a trace of a model, always the same one, that handlers outside do not see."""
    with torch.no_grad(), seeded(0), poutine.block():
        return poutine.trace(model).get_trace(*args, **kwargs)


def exchangeable_sites(
    model: Callable,
    observed: Collection[str],
    parameters: Collection[str] = (),
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> set[str]:
    """Return the observed sites in a plate whose elements can change places.

    They can where a permutation of all values in the plate permutes their log-densities, which
    covariates prevent, and no parameter is among these values. The plate must be the only one of
    the observed sites.
    """
    call = args, kwargs or {}
    trace = hidden_trace(model, *call)
    plated = {name for name in observed if _plates(trace.nodes[name])}
    plates = {plate for name in plated for plate in _plates(trace.nodes[name])}
    if len(plates) != 1:
        return set()
    ((name, size),) = plates
    values = {n: torch.as_tensor(site["value"]) for n, site in _sites(trace).items()}
    inside = {n for n in values if (name, size) in _plates(trace.nodes[n])}
    of_one_plate = all(
        len(_plates(trace.nodes[n])) == 1 and values[n].shape[:1] == (size,) for n in inside
    )
    if not of_one_plate or not inside.isdisjoint(parameters):
        return set()
    given = {n: v for n, v in values.items() if not _is_deterministic(trace.nodes[n])}
    order = torch.arange(size).roll(1)
    permuted = {n: v[order] if n in inside else v for n, v in given.items()}
    one, other = (hidden_trace(poutine.condition(model, rows), *call) for rows in (given, permuted))
    if all(_is_permuted(one.nodes[n], other.nodes[n], order) for n in inside):
        return plated
    return set()


def _is_permuted(one: Mapping[str, Any], other: Mapping[str, Any], order: Tensor) -> bool:
    """Tell whether a site moves with the values in its plate, as far as can be seen."""
    before, after = (torch.as_tensor(site["value"]) for site in (one, other))
    if _is_deterministic(one):
        # What does not change at all may be the noise of a black box: the plate is believed.
        return _close(after, before[order]) or _close(after, before)
    try:
        before, after = (site["fn"].log_prob(site["value"]) for site in (one, other))
    except NotImplementedError:
        return True
    return _close(after, before[order])


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _sites(trace: poutine.Trace) -> dict[str, Mapping[str, Any]]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _plates(site: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return names and sizes of the vectorised plates of a site."""
    return {(f.name, f.size) for f in site["cond_indep_stack"] if f.dim is not None}


def _is_deterministic(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("_deterministic"))
