"""Runs of a simulator: one draw at a time, or many in a plate."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .simulations import Simulations

PLATE = "_pyroflows_simulations"
LONGEST_SHOWN = 20  # numbers in a message
_turn = threading.Lock()


class SimulationError(RuntimeError):
    """Say that a simulator raised; hold what it was given and what was simulated before.

    Attributes
    ----------
    parameters
        The values of the parameters it raised at, by site; empty if it did not come that far.
    simulations
        The finished draws, ``None`` if there are none.

    Examples
    --------
    >>> import pyro.distributions as dist, pyroflows as pf
    >>> def square_root(theta):
    ...     if theta < 0:
    ...         raise ArithmeticError("negative")
    ...     return theta**0.5
    >>> simulator = pf.sbi.BlackBox(dist.Normal(0.0, 1.0), square_root)
    >>> try:
    ...     simulations = pf.sbi.simulate(simulator, 100, progress=False)
    ... except SimulationError as error:
    ...     print(bool(error.parameters["theta"] < 0))
    True
    """

    def __init__(
        self,
        message: str,
        parameters: Mapping[str, Tensor],
        simulations: Simulations | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.parameters = dict(parameters)
        self.simulations = simulations

    def after(self, draws: Sequence[Simulations]) -> SimulationError:
        """Return the same error with the draws that were finished before."""
        parts = [*draws, *([] if self.simulations is None else [self.simulations])]
        finished = Simulations.concatenate(parts) if parts else None
        return SimulationError(self.message, self.parameters, finished)

    def __reduce__(self) -> tuple:  # exceptions with several arguments do not pickle by themselves
        return type(self), (self.message, self.parameters, self.simulations)


class Job(NamedTuple):
    """Say what to simulate; all that a worker needs.

    Attributes
    ----------
    simulator, args, kwargs
        The model.
    parameters, observed
        Names of sites.
    shapes
        The shape of each of them in a single run.
    dims
        The names of its dimensions.
    plate_dim
        Dimension of the plate to draw in; ``None``: one draw at a time.
    device
        Where the simulator computes.
    """

    simulator: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    parameters: tuple[str, ...]
    observed: tuple[str, ...]
    shapes: Mapping[str, torch.Size] = {}
    dims: Mapping[str, list[str]] = {}
    plate_dim: int | None = None
    device: torch.device = torch.device("cpu")


class Chunk(NamedTuple):
    """Say which draws to make.

    Attributes
    ----------
    length
        Their number ``n``.
    entropy
        What their seed is made of.
    given
        Values of parameters, ``(n, *shape)`` by site; the others are drawn.
    """

    length: int
    entropy: tuple[int, ...]
    given: Mapping[str, Tensor] = {}


def simulate_chunk(job: Job, chunk: Chunk) -> Simulations:
    """Return the draws of a chunk."""
    # Pyro's handlers and the random states belong to the whole process: threads take turns.
    given = {name: value.to(job.device) for name, value in chunk.given.items()}
    chunk = chunk._replace(given=given)
    with _turn, seeded(*chunk.entropy), torch.no_grad():
        if job.plate_dim is not None:
            return _draw_in_plate(job, chunk)
        return _draw_one_by_one(job, chunk)


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed all generators a simulator may use, and restore them afterwards."""
    states = pyro.util.get_rng_state()
    # Pyro seeds CUDA devices too, but leaves them so.
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    pyro.set_rng_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    try:
        yield
    finally:
        pyro.util.set_rng_state(states)
        torch.cuda.set_rng_state_all(devices)


class AllReached(BaseException):
    """Say that a model has nothing more to say; no simulator takes it for an error of its own."""


class Until(Messenger):
    """Stop a model after the last of some sites by :class:`AllReached`; never if there are none.

    Attributes
    ----------
    found
        The values of those that were reached, by site.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.found: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] in self.names:
            self.found[msg["name"]] = msg["value"]
            if len(self.found) == len(self.names):
                raise AllReached


def in_plate(job: Job, length: int) -> Callable:
    """Return the simulator in a plate, to draw many times at once."""

    def simulator(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(PLATE, length, dim=job.plate_dim):
            return job.simulator(*args, **kwargs)

    return simulator


def run(job: Job, model: Callable) -> poutine.Trace:
    """Return a trace of a model.

    Raises
    ------
    SimulationError
        If the model raises.
    """
    tracer = poutine.trace(model)
    try:
        with poutine.block():
            return tracer.get_trace(*job.args, **job.kwargs)
    except Exception as error:
        sites = tracer.trace.nodes
        parameters = {
            name: torch.as_tensor(site["value"])
            for name, site in sites.items()
            if site["type"] == "sample" and name in (job.parameters or sites)
        }
        where = ", ".join(f"{name} = {_shown(value)}" for name, value in parameters.items())
        reason = str(error).partition("\n")[0]  # Pyro adds the shapes of the trace
        kind, shown = type(error).__name__, where or "none yet"
        message = f"the simulator raised {kind}: {reason}; parameters: {shown}"
        raise SimulationError(message, parameters) from error


def _shown(value: Tensor) -> str:
    """Return a value as a message can hold it."""
    if value.numel() <= LONGEST_SHOWN:
        return str(value.tolist())
    return f"{value.numel()} numbers of shape {tuple(value.shape)}"


def sample_sites(trace: poutine.Trace) -> dict[str, dict[str, Any]]:
    """Return all sites, random and deterministic, by name; plates are none."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def values(trace: poutine.Trace) -> dict[str, Tensor]:
    """Return the values of all sites, random and deterministic."""
    return {name: torch.as_tensor(site["value"]) for name, site in sample_sites(trace).items()}


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Tell whether a site is computed, not drawn."""
    return bool(site["infer"].get("_deterministic"))


def close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two runs of a model agree, up to rounding in single precision."""
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _draw_one_by_one(job: Job, chunk: Chunk) -> Simulations:
    draws: list[Simulations] = []
    try:
        for row in range(chunk.length):
            given = {name: value[row] for name, value in chunk.given.items()}
            drawn = values(run(job, _given(job.simulator, given)))
            draws.append(_simulations(job, {n: value.unsqueeze(0) for n, value in drawn.items()}))
    except SimulationError as error:
        raise error.after(draws) from error.__cause__
    return Simulations.concatenate(draws)


def _draw_in_plate(job: Job, chunk: Chunk) -> Simulations:
    drawn = values(run(job, _given(in_plate(job, chunk.length), chunk.given)))
    return _simulations(
        job,
        {name: drawn[name].reshape(chunk.length, *shape) for name, shape in job.shapes.items()},
    )


def _given(model: Callable, given: Mapping[str, Tensor]) -> Callable:
    return _Given(given)(model) if given else model


class _Given(Messenger):
    """Give sites their values, in the shape that the plates around them ask for."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.given = given

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] in self.given:
            msg["value"] = self.given[msg["name"]].reshape(msg["fn"].shape())
            msg["is_observed"] = True


def _simulations(job: Job, drawn: Mapping[str, Tensor]) -> Simulations:
    return Simulations(
        {name: drawn[name].detach().cpu() for name in job.parameters},
        {name: drawn[name].detach().cpu() for name in job.observed},
    )
