"""Draws of parameters and observations from a Pyro model, in chunks, on any executor."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from .simulations import Simulations
from .space import latent_sites

BATCH_SIZE = 1000
_PLATE = "_pyroflows_simulations"
_turn = threading.Lock()


class SimulationError(RuntimeError):
    """Say that a simulator raised; hold what it was given and what was simulated before.

    Attributes
    ----------
    parameters
        The values of the parameters it raised at, by site; empty if it did not come that far.
    simulations
        The finished draws, ``None`` if there are none.
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
    """Say what to simulate; all that a worker needs."""

    simulator: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    parameters: tuple[str, ...]
    observed: tuple[str, ...]
    plate_dim: int | None  # None: one draw at a time


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
        Default: here, one after the other.
    batch_size
        Draws per chunk.
    path
        A folder to write each finished chunk to. Chunks that are there already are read instead
        of simulated, so that a simulation can be paused, or extended.
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
    >>> import pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 0.1).expand([3]).to_event(1))
    >>> simulations = simulate(simulator, 100, progress=False)
    >>> simulations.parameters["theta"].shape, simulations.observations["x"].shape
    (torch.Size([100]), torch.Size([100, 3]))
    """
    _check_counts(num_simulations=num_simulations, batch_size=batch_size)
    observed = (observed,) if isinstance(observed, str) else tuple(observed)
    sites = latent_sites(simulator, observed, parameters, args, kwargs or {})
    if not sites:
        raise ValueError("the simulator has no latent sites: there is nothing to infer")
    job = Job(simulator, args, kwargs or {}, tuple(sites), observed, None)
    job = job._replace(plate_dim=_plate_dim(job, seed))
    chunks = _Chunks(num_simulations, batch_size, seed, Path(path) if path else None)
    chunks.open(job)
    with tqdm(total=num_simulations, unit="draws", disable=not progress) as bar:
        for done in _run(job, chunks, executor):
            bar.update(done)
    return _finite(chunks.collect())


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


class _Chunks:
    """Keep finished chunks, in memory and, on request, in a folder."""

    def __init__(self, num_draws: int, size: int, seed: int, folder: Path | None) -> None:
        self.size = size
        self.seed = seed
        self.folder = folder
        self.lengths = [min(size, num_draws - start) for start in range(0, num_draws, size)]
        self.finished: dict[int, Simulations] = {}

    def open(self, job: Job) -> None:
        """Read what an earlier call has left in the folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "seed": self.seed,
            "batch_size": self.size,
            "parameters": [*job.parameters],
            "observed": [*job.observed],
        }
        file = self.folder / "about.json"
        if not file.exists():
            file.write_text(json.dumps(about))
        elif (found := json.loads(file.read_text())) != about:
            raise ValueError(f"{self.folder} holds other simulations: {found}, expected {about}")
        for index, length in enumerate(self.lengths):
            if self._file(index).exists():
                chunk = Simulations.load(self._file(index))
                if len(chunk) == length:  # the last chunk of a shorter simulation is not
                    self.finished[index] = chunk

    def missing(self) -> list[int]:
        return [index for index in range(len(self.lengths)) if index not in self.finished]

    def add(self, index: int, chunk: Simulations) -> None:
        self.finished[index] = chunk
        if self.folder is not None:
            chunk.save(self._file(index))

    def collect(self) -> Simulations:
        return Simulations.concatenate(self.finished[index] for index in sorted(self.finished))

    def _file(self, index: int) -> Path:
        return Path(self.folder or "") / f"chunk-{index:06d}.safetensors"


def _run(job: Job, chunks: _Chunks, executor: Executor | None) -> Iterator[int]:
    """Simulate what is missing; yield the number of draws each time some are finished."""
    missing = chunks.missing()
    yield sum(chunks.lengths) - sum(chunks.lengths[index] for index in missing)
    work = {index: (job, chunks.lengths[index], chunks.seed, index) for index in missing}
    try:
        for index, chunk in _results(work, executor):
            chunks.add(index, chunk)
            yield chunks.lengths[index]
    except SimulationError as error:
        finished = [chunks.collect()] if chunks.finished else []
        raise error.after(finished) from error.__cause__


def _results(
    work: Mapping[int, tuple], executor: Executor | None
) -> Iterator[tuple[int, Simulations]]:
    if executor is None:
        yield from ((index, _simulate_chunk(*task)) for index, task in work.items())
        return
    futures: dict[Future, int] = {
        executor.submit(_simulate_chunk, *task): index for index, task in work.items()
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()


def _simulate_chunk(job: Job, length: int, seed: int, index: int) -> Simulations:
    # Pyro's handlers and the random states belong to the whole process: threads take turns.
    with _turn, _seeded(seed, index), torch.no_grad():
        if job.plate_dim is not None:
            return _draw_in_plate(job, length)
        return _draw_one_by_one(job, length)


@contextlib.contextmanager
def _seeded(*entropy: int) -> Iterator[None]:
    """Seed all generators a simulator may use, and restore them afterwards."""
    states = pyro.util.get_rng_state()
    pyro.set_rng_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    try:
        yield
    finally:
        pyro.util.set_rng_state(states)


def _draw_one_by_one(job: Job, length: int) -> Simulations:
    draws: list[Simulations] = []
    try:
        for _ in range(length):
            draws.append(_draw_one(job))
    except SimulationError as error:
        raise error.after(draws) from error.__cause__
    return Simulations.concatenate(draws)


def _draw_one(job: Job) -> Simulations:
    values = _values(_run_model(job, job.simulator))
    return _simulations(job, {name: value.unsqueeze(0) for name, value in values.items()})


def _draw_in_plate(job: Job, length: int) -> Simulations:
    values = _values(_run_model(job, _in_plate(job, length)))
    shapes = _values(_run_model(job, job.simulator))
    return _simulations(
        job,
        {name: values[name].reshape(length, *shapes[name].shape) for name in _names(job)},
    )


def _in_plate(job: Job, length: int) -> Callable:
    def simulator(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(_PLATE, length, dim=job.plate_dim):
            return job.simulator(*args, **kwargs)

    return simulator


def _run_model(job: Job, model: Callable) -> poutine.Trace:
    tracer = poutine.trace(model)
    try:
        with poutine.block():
            return tracer.get_trace(*job.args, **job.kwargs)
    except Exception as error:
        reached = getattr(tracer, "trace", None) or tracer.msngr.trace
        parameters = {n: reached.nodes[n]["value"] for n in job.parameters if n in reached.nodes}
        where = ", ".join(f"{name} = {value.tolist()}" for name, value in parameters.items())
        reason = str(error).partition("\n")[0]  # Pyro adds the shapes of the trace
        message = f"the simulator raised {type(error).__name__}: {reason}; parameters: {where}"
        raise SimulationError(message, parameters) from error


def _values(trace: poutine.Trace) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(site["value"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name != _PLATE and not site_is_subsample(site)
    }


def _names(job: Job) -> tuple[str, ...]:
    return (*job.parameters, *job.observed)


def _simulations(job: Job, values: Mapping[str, Tensor]) -> Simulations:
    return Simulations(
        {name: values[name].detach().cpu() for name in job.parameters},
        {name: values[name].detach().cpu() for name in job.observed},
    )


def _plate_dim(job: Job, seed: int) -> int | None:
    """Return the dimension of a plate in which the model gives what single runs of it give.

    Runs in plates of different sizes are repeated draw by draw, with all sites set to what they
    were there: if log-densities and deterministic values agree, the model works on batches. Some
    draws are at the edge of what arithmetic can bear, so one failure does not count.
    """
    with _seeded(seed), torch.no_grad():
        single = _run_model(job, job.simulator)
        frames = [f for site in single.nodes.values() for f in site.get("cond_indep_stack", ())]
        nesting = min((frame.dim for frame in frames if frame.dim is not None), default=0)
        trial = job._replace(plate_dim=nesting - 1)
        agrees = any(_agrees(trial, single, sizes) for sizes in ((3, 4), (4, 5), (5, 6)))
    return trial.plate_dim if agrees else None


def _agrees(job: Job, single: poutine.Trace, sizes: Sequence[int]) -> bool:
    try:
        return all(_agrees_in_plate(job, single, size) for size in sizes)
    except Exception:  # whatever it is, the model does not work on this batch
        return False


def _agrees_in_plate(job: Job, single: poutine.Trace, size: int) -> bool:
    batch = poutine.trace(_in_plate(job, size)).get_trace(*job.args, **job.kwargs)
    shapes = {name: value.shape for name, value in _values(single).items()}
    values = _values(batch)
    if values.keys() != shapes.keys():
        return False
    rows = {name: values[name].reshape(size, *shape) for name, shape in shapes.items()}
    densities = _densities(batch, size)
    for i in range(size):
        given = {name: rows[name][i] for name in densities}
        repeated = poutine.trace(poutine.condition(job.simulator, given)).get_trace(
            *job.args, **job.kwargs
        )
        alone, computed = _densities(repeated, 1), _values(repeated)
        same = [_close(densities[name][i], alone[name][0]) for name in densities]
        same += [_close(rows[name][i], computed[name]) for name in rows.keys() - densities.keys()]
        if not all(same):
            return False
    return True


def _densities(trace: poutine.Trace, size: int) -> dict[str, Tensor]:
    """Return the log-density of each random site in each draw of a plate."""
    trace.compute_log_prob()
    return {
        name: site["log_prob"].reshape(size, -1).sum(1)
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and name != _PLATE
        and not site["infer"].get("_deterministic")
        and not site_is_subsample(site)
    }


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3, equal_nan=True)


def _finite(simulations: Simulations) -> Simulations:
    valid = simulations.valid()
    if not len(valid):
        raise ValueError(f"all {len(simulations)} simulations hold numbers that are not finite")
    if valid.num_invalid:
        warnings.warn(
            f"{valid.num_invalid} of {len(simulations)} simulations hold numbers that are not "
            "finite and are left out: the posterior is that given a finite observation",
            stacklevel=3,
        )
    return valid


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
