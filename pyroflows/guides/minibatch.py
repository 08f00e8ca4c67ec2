"""What a guide reads of a plate: the data of a minibatch, and the latent sites of each datum."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints


@dataclass(frozen=True)
class Minibatch:
    """Hold the place of some data in their plate, and their features, shape ``(B, F)``."""

    frame: CondIndepStackFrame
    index: Tensor
    features: Tensor

    def plate(self) -> pyro.plate:
        """Return the plate of these data; their indices are on record already."""
        frame = self.frame
        with poutine.block():
            return pyro.plate(frame.name, frame.full_size, subsample=self.index, dim=frame.dim)


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


class Consecutive(Messenger):
    """Choose consecutive data of a plate, from a given one on, where the model leaves the choice.

    The last minibatch goes on with the first data.
    """

    def __init__(self, plate: str, start: int) -> None:
        super().__init__()
        self.plate = plate
        self.start = start
        self.has_chosen = False

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] == self.plate and site_is_subsample(msg) and msg["value"] is None:
            size, step = msg["fn"].size, msg["fn"].subsample_size
            stop = self.start + (size if step is None else step)
            msg["value"] = torch.arange(self.start, stop, device=msg["fn"].device) % size
            self.has_chosen = True


def frame_of(msg: Mapping[str, Any], plate: str) -> Any:
    """Return the frame of a plate around a site, if it lies in it."""
    return next((frame for frame in msg["cond_indep_stack"] if frame.name == plate), None)


def observed_features(sites: list[dict], frame: CondIndepStackFrame) -> Tensor:
    """Return what sites in a plate observe of each of its ``B`` data, of shape ``(B, F)``."""
    columns = []
    for site in sites:
        if not site["is_observed"] or site["infer"].get("_deterministic"):
            continue
        for other in site["cond_indep_stack"]:
            if other.name != frame.name and other.size != other.full_size:
                raise ValueError(
                    f"site {site['name']!r} is observed in plate {other.name!r} too, which is "
                    f"subsampled, {other.size} of {other.full_size}: the encoder needs all that "
                    "is observed of a datum; drop the subsampling, or give features=..."
                )
        value = site["value"].expand(site["fn"].shape())
        value = value.movedim(frame.dim - site["fn"].event_dim, 0)
        columns.append(value.reshape(frame.size, value[:1].numel()))
    if not any(column.shape[1] for column in columns):
        raise ValueError(
            f"the model observes nothing in plate {frame.name!r} that an encoder could read: give "
            "features=..., a function that returns what is known of each datum"
        )
    return torch.cat(columns, -1)


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
