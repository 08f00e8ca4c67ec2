"""Plates whose elements are exchangeable, read from traces of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .simulator_runs import close, is_deterministic, sample_sites, seeded


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
    values = {n: torch.as_tensor(site["value"]) for n, site in sample_sites(trace).items()}
    inside = {n for n in values if (name, size) in _plates(trace.nodes[n])}
    of_one_plate = all(
        len(_plates(trace.nodes[n])) == 1 and values[n].shape[:1] == (size,) for n in inside
    )
    if not of_one_plate or not inside.isdisjoint(parameters):
        return set()
    given = {n: v for n, v in values.items() if not is_deterministic(trace.nodes[n])}
    one = hidden_trace(poutine.condition(model, given), *call)
    for order in _generators(size):
        permuted = {n: v[order] if n in inside else v for n, v in given.items()}
        other = hidden_trace(poutine.condition(model, permuted), *call)
        if not all(_is_permuted(one.nodes[n], other.nodes[n], order) for n in inside):
            return set()
    return plated


def _generators(size: int) -> list[Tensor]:
    """Return a rotation and a swap, which together make all permutations; a ring only rotates."""
    order = torch.arange(size)
    rotation, swap = order.roll(1), torch.cat([order[:2].flip(0), order[2:]])
    return [rotation] if size < 3 else [rotation, swap]


def _is_permuted(one: Mapping[str, Any], other: Mapping[str, Any], order: Tensor) -> bool:
    """Tell whether a site moves with the values in its plate, as far as can be seen."""
    before, after = (torch.as_tensor(site["value"]) for site in (one, other))
    if is_deterministic(one):
        # What does not change at all may be the noise of a black box: the plate is believed.
        return close(after, before[order]) or close(after, before)
    try:
        before, after = (site["fn"].log_prob(site["value"]) for site in (one, other))
    except NotImplementedError:
        return True
    return close(after, before[order])


def _plates(site: Mapping[str, Any]) -> set[tuple[str, int]]:
    """Return names and sizes of the vectorised plates of a site."""
    return {(f.name, f.size) for f in site["cond_indep_stack"] if f.dim is not None}
