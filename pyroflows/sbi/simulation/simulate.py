"""Draws of parameters and observations from a Pyro model, in chunks, on any executor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.simulations import Simulations
from ..model.simulator_runs import Job
from ..model.space import latent_sites, site_names
from .chunks import Chunks
from .plate_check import plan

BATCH_SIZE = 1000


def simulate(
    simulator: Callable,
    num_simulations: int,
    observed: str | Collection[str] = "x",
    *,
    parameters: Collection[str] | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    batch_size: int = BATCH_SIZE,
    path: str | Path | None = None,
    keep_nan: bool = False,
    progress: bool = True,
) -> Simulations:
    """Draw parameters and observations from a simulator.

    The model runs once per chunk of ``batch_size`` draws, in a plate, where that gives what single
    runs give; one draw at a time where it does not, as with black boxes. Each chunk has a seed of
    its own, so that the draws do not depend on the executor or its number of workers. Draws with
    numbers that are not finite are left out, with a warning.

    Parameters
    ----------
    simulator
        A Pyro model. Its latent sites are the parameters.
    num_simulations
        Number of draws ``N``.
    observed
        Name of the site that is observed, or several names. ``pyro.deterministic`` sites count.
    parameters
        Names of the parameters, where other latent sites are noise of the simulator. Default: all
        latent sites.
    args, kwargs
        Arguments of the model.
    seed
        Determines the draws; the global random states are left alone.
    executor
        Where to run chunks; its workers need the simulator, which must be picklable for processes.
        Threads take turns, as Pyro and the random generators belong to a whole process. Default:
        here, one chunk after the other.
    batch_size
        Draws per chunk.
    path
        A folder to write each finished chunk to. Chunks that are there already are read instead
        of simulated, so that a simulation can be interrupted and resumed, or extended. They must
        come from the same simulator: only names, shapes, seed and chunk size are compared.
    keep_nan
        Whether NaN in an observation is a missing entry, which is kept.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Simulations
        The draws, ``(N, *shape)`` for each site, less those that are not finite.

    Raises
    ------
    ValueError
        If a name is no site, there is nothing to infer, a number is below 1, the folder holds
        other simulations, or no draw is finite.
    SimulationError
        If the simulator raises; it holds the parameters it raised at and the finished draws.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.1).expand([3]).to_event(1))
    >>> simulations = simulate(simulator, 100, progress=False)
    >>> simulations.parameters["theta"].shape, simulations.observations["x"].shape
    (torch.Size([100]), torch.Size([100, 3]))
    """
    _check_counts(num_simulations=num_simulations, batch_size=batch_size)
    _check_seed(seed)
    observed = site_names("observed", observed)
    sites = latent_sites(simulator, observed, parameters, args, kwargs or {})
    job = plan(Job(simulator, args, kwargs or {}, tuple(sites), observed), seed)
    chunks = Chunks(num_simulations, batch_size, seed)
    if path is not None:
        chunks.store_in(Path(path), job)
    chunks.run(job, executor, progress)
    return _finite(replace(chunks.finished(), dims=job.dims), keep_nan)


def simulate_at(
    simulator: Callable,
    parameters: Mapping[str, Tensor],
    observed: str | Collection[str] = "x",
    *,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    batch_size: int = BATCH_SIZE,
    keep_nan: bool = False,
    progress: bool = True,
) -> Simulations:
    """Draw an observation at each of given parameters.

    Works as :func:`simulate` does, with the sites in ``parameters`` set to what is given; other
    latent sites are drawn from their priors.

    Parameters
    ----------
    simulator
        A Pyro model.
    parameters
        From sites to values of shape ``(N, *shape)``, as ``Posterior.sample`` returns them.
    observed, args, kwargs, seed, executor, batch_size, keep_nan, progress
        See :func:`simulate`.

    Returns
    -------
    Simulations
        The given parameters and the observations simulated at them, row by row, less those that
        are not finite.

    Raises
    ------
    ValueError
        If a name is no site, values have the wrong shape or are not finite, a number is below 1, or
        no observation is finite.
    SimulationError
        If the simulator raises; it holds the parameters it raised at and the finished draws.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.1).expand([3]).to_event(1))
    >>> simulations = simulate_at(simulator, {"theta": torch.tensor([-5.0, 5.0])}, progress=False)
    >>> simulations.observations["x"].mean(1).round()
    tensor([-5.,  5.])
    """
    _check_counts(batch_size=batch_size)
    _check_seed(seed)
    observed = site_names("observed", observed)
    sites = latent_sites(simulator, observed, parameters.keys(), args, kwargs or {})
    given = _checked_parameters(parameters, {name: shape for name, (_, shape) in sites.items()})
    job = plan(Job(simulator, args, kwargs or {}, tuple(sites), observed), seed)
    num_draws = len(next(iter(given.values())))
    chunks = Chunks(num_draws, batch_size, seed, given)
    chunks.run(job, executor, progress)
    return _finite(replace(chunks.finished(), dims=job.dims), keep_nan)


def given_or_drawn(
    simulations: Simulations | None,
    num_simulations: int | None,
    simulator: Callable,
    observed: Collection[str],
    **options: Any,
) -> Simulations:
    """Return the simulations that are given, or draw as many as asked for.

    Raises
    ------
    ValueError
        If neither or both are given.
    """
    if simulations is not None and num_simulations is None:
        return simulations
    if simulations is not None or num_simulations is None:
        raise ValueError("give either simulations or num_simulations")
    return simulate(simulator, num_simulations, observed, **options)


def _finite(simulations: Simulations, keep_nan: bool) -> Simulations:
    valid = simulations.valid(keep_nan)
    if not len(valid):
        raise ValueError(f"all {len(simulations)} simulations hold numbers that are not finite")
    if valid.num_invalid:
        warnings.warn(
            f"{valid.num_invalid} of {len(simulations)} simulations hold numbers that are not "
            "finite and are left out: the posterior is that given a finite observation",
            stacklevel=3,
        )
    return valid


def _checked_parameters(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    given = {name: torch.as_tensor(parameters[name]).detach().cpu() for name in shapes}
    lengths = {name: len(value) if value.dim() else 0 for name, value in given.items()}
    if len({*lengths.values()}) != 1 or 0 in lengths.values():
        raise ValueError(
            f"parameters must have as many rows at all sites, 1 or more, got {lengths}"
        )
    for name, value in given.items():
        if value.shape[1:] != shapes[name]:
            expected = ", ".join(["N", *map(str, shapes[name])])
            raise ValueError(
                f"parameters[{name!r}] must have shape ({expected}), got {tuple(value.shape)}"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"parameters[{name!r}] must be finite, got NaN or inf")
    return given


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
