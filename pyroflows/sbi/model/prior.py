"""The prior of a simulator as a Pyro model of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .simulator_runs import AllReached, Job, Until, run, seeded


class Prior:
    """Sample the parameters of a simulator, and hide everything else it does.

    The simulator is left as soon as all parameters are drawn: what it does with them may be slow.

    Parameters
    ----------
    simulator, args, kwargs
        The model.
    names
        The parameter sites.
    """

    def __init__(
        self,
        simulator: Callable,
        names: Collection[str],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.simulator = simulator
        self.names = frozenset(names)
        self.args = args
        self.kwargs = dict(kwargs or {})

    def __call__(self) -> dict[str, Tensor]:
        """Sample each parameter site; return the values by name."""
        until = Until(self.names)
        others = poutine.block(hide_fn=lambda msg: msg["name"] not in self.names)
        with contextlib.suppress(AllReached), until, others:
            self.simulator(*self.args, **self.kwargs)
        return until.found


def check_prior(
    simulator: Callable,
    parameters: Collection[str],
    observed: Collection[str],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raise if the density of the parameters depends on what is observed.

    Raises
    ------
    ValueError
        If it does: such a density is no prior.
    """
    job = Job(simulator, args, kwargs or {}, tuple(parameters), tuple(observed))
    with seeded(0), torch.no_grad():
        first = run(job, simulator)
        sites = [name for name, site in first.nodes.items() if site["type"] == "sample"]
        start = min(sites.index(name) for name in observed)
        if not {*sites[start:]} & {*parameters}:
            return  # an observation cannot matter to what was drawn before
        held = {name: first.nodes[name]["value"] for name in sites if name not in job.observed}
        second = run(job, poutine.condition(simulator, held))
        changed = [name for name in parameters if not _same_density(name, first, second)]
    if changed:
        raise ValueError(
            f"the prior of {changed} depends on the observed sites {[*observed]}: draw parameters "
            "first, and observations given them"
        )


def _same_density(name: str, first: poutine.Trace, second: poutine.Trace) -> bool:
    one, other = (trace.nodes[name]["fn"] for trace in (first, second))
    value = first.nodes[name]["value"]
    return torch.equal(one.log_prob(value), other.log_prob(value))
