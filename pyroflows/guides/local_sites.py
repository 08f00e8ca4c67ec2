"""The latent sites that each datum of a plate has of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import biject_to, constraints

from .minibatch import frame_of


@dataclass(frozen=True)
class LocalSite:
    """Describe a latent site for one datum.

    ``dim`` is that of the plate, ``shape`` that of the unconstrained value.
    """

    name: str
    support: constraints.Constraint
    event_dim: int
    dim: int
    shape: torch.Size


def local_site(site: Mapping[str, Any], plate: str) -> LocalSite:
    """Describe a latent site; raise ``ValueError`` where a flow of each datum cannot draw it."""
    name, fn, frame = site["name"], site["fn"], frame_of(site, plate)
    if fn.support.is_discrete:
        raise ValueError(
            f"site {name!r} is discrete ({type(fn).__name__}): mark it for enumeration with "
            "infer={'enumerate': 'parallel'} and use TraceEnum_ELBO, or sum it out"
        )
    plates = [other.name for other in site["cond_indep_stack"]]
    if len(plates) > 1 or fn.batch_shape.numel() != frame.size:
        raise ValueError(
            f"site {name!r} in plates {plates} has batch shape {tuple(fn.batch_shape)}: local "
            f"variables may lie in plate {plate!r} alone; make further dimensions part of the "
            "event with .to_event()"
        )
    axis = frame.dim - fn.event_dim
    with helpful_support_errors(site):
        shape = biject_to(fn.support).inv(site["value"]).shape[len(fn.batch_shape) :]
    return LocalSite(name, _of_one_datum(fn.support, axis, name), fn.event_dim, frame.dim, shape)


def _of_one_datum(part: Any, axis: int, name: str) -> Any:
    """Reduce a support, whose tensors may have an axis of data, to that of each single datum."""
    if isinstance(part, Tensor) and part.dim() >= -axis:
        first = part.narrow(axis, 0, 1)
        if not torch.equal(first.expand_as(part), part):
            raise ValueError(
                f"the support of site {name!r} differs between data: sample a variable of fixed "
                "support instead, and compute the site from it"
            )
        return first.clone()
    if isinstance(part, list | tuple):
        return type(part)(_of_one_datum(entry, axis, name) for entry in part)
    if isinstance(part, constraints.Constraint):
        part = copy.copy(part)
        for key, value in vars(part).items():
            part.__dict__[key] = _of_one_datum(value, axis, name)
    return part


def initial_loc(site: Mapping[str, Any]) -> Tensor:
    """Return the mean over all data of a site's unconstrained value."""
    value = biject_to(site["fn"].support).inv(site["value"])
    return value.reshape(site["fn"].batch_shape.numel(), -1).mean(0)


def constrain(
    sites: Sequence[LocalSite], latent: Tensor
) -> Iterator[tuple[LocalSite, Tensor, Tensor]]:
    """Split vectors ``(*batch, D)`` of the local variables of data into the values of their sites.

    Yields each site with its value and the log-density that its support adds.
    """
    parts = latent.split([site.shape.numel() for site in sites], -1)
    for site, part in zip(sites, parts, strict=True):
        unconstrained = part.reshape(latent.shape[:-1] + site.shape)
        transform = biject_to(site.support)
        value = transform(unconstrained)
        log_density = transform.inv.log_abs_det_jacobian(value, unconstrained)
        extra = log_density.dim() - value.dim() + site.event_dim
        yield site, value, sum_rightmost(log_density, extra)
