"""Simulations chunk by chunk: on any executor, kept in memory and, on request, in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..model.simulations import Simulations
from ..model.simulator_runs import Chunk, Job, SimulationError, simulate_chunk


class Chunks:
    """Divide draws into chunks and gather those that are finished.

    Parameters
    ----------
    num_draws
        Number of draws.
    size
        Draws per chunk.
    seed
        Determines, with its index, what a chunk holds.
    given
        Values of parameters, ``(num_draws, *shape)`` by site.
    """

    def __init__(
        self, num_draws: int, size: int, seed: int, given: Mapping[str, Tensor] | None = None
    ) -> None:
        self.num_draws = num_draws
        self.size = size
        self.seed = seed
        self.given = given or {}
        self.folder: Path | None = None
        self.missing = list(range(-(-num_draws // size)))
        self._is_finished = torch.zeros(num_draws, dtype=torch.bool)
        self._draws: Simulations | None = None

    def store_in(self, folder: Path, job: Job) -> None:
        """Write chunks to a folder from now on, and read what an earlier call has left there.

        Raises
        ------
        ValueError
            If the folder holds other simulations.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "seed": self.seed,
            "batch_size": self.size,
            "parameters": [*job.parameters],
            "observed": [*job.observed],
        }
        file = folder / "about.json"
        if not file.exists():
            file.write_text(json.dumps(about))
        elif (found := json.loads(file.read_text())) != about:
            raise ValueError(f"{folder} holds other simulations: {found}, expected {about}")
        for index in [*self.missing]:
            if self._file(index).exists():
                chunk = Simulations.load(self._file(index))
                _check_shapes(folder, chunk, job)
                if len(chunk) >= self.length(index):  # the last of a shorter simulation is not
                    self._keep(index, chunk[: self.length(index)])

    def length(self, index: int) -> int:
        """Return the number of draws in a chunk."""
        return min(self.size, self.num_draws - index * self.size)

    def run(self, job: Job, executor: Executor | None, progress: bool) -> None:
        """Simulate what is missing.

        Raises
        ------
        SimulationError
            If the simulator raises; with what is finished.
        """
        done = int(self._is_finished.sum())
        try:
            with tqdm(
                total=self.num_draws,
                initial=done,
                desc="simulate",
                unit="draws",
                disable=not progress,
            ) as bar:
                for index, chunk in self._results(job, executor):
                    self._keep(index, chunk)
                    if self.folder is not None:
                        chunk.save(self._file(index))
                    bar.update(len(chunk))
        except SimulationError as error:
            finished = [self.finished()] if self._draws is not None else []
            raise error.after(finished) from error.__cause__

    def finished(self) -> Simulations:
        """Return all draws that are finished, in order."""
        assert self._draws is not None
        return self._draws if bool(self._is_finished.all()) else self._draws[self._is_finished]

    def _results(self, job: Job, executor: Executor | None) -> Iterator[tuple[int, Simulations]]:
        work = {index: self._chunk(index) for index in self.missing}
        if executor is None:
            yield from ((index, simulate_chunk(job, chunk)) for index, chunk in work.items())
            return
        futures: dict[Future, int] = {
            executor.submit(simulate_chunk, job, chunk): index for index, chunk in work.items()
        }
        try:
            for future in as_completed(futures):
                yield futures.pop(future), future.result()  # each result is held once
        finally:
            for future in futures:
                future.cancel()

    def _chunk(self, index: int) -> Chunk:
        # A view would travel to another process with all rows.
        given = {name: value[self._rows(index)].clone() for name, value in self.given.items()}
        return Chunk(self.length(index), (self.seed, index), given)

    def _keep(self, index: int, chunk: Simulations) -> None:
        """Copy a chunk to its place: all draws are in memory once."""
        if self._draws is None:
            self._draws = chunk.empty(self.num_draws)
        self._draws = self._draws.fill(self._rows(index), chunk)
        self._is_finished[self._rows(index)] = True
        self.missing.remove(index)

    def _rows(self, index: int) -> slice:
        return slice(index * self.size, index * self.size + self.length(index))

    def _file(self, index: int) -> Path:
        return Path(self.folder or "") / f"chunk-{index:06d}.safetensors"


def _check_shapes(folder: Path, chunk: Simulations, job: Job) -> None:
    stored = {**chunk.parameters, **chunk.observations}
    found = {name: tuple(stored[name].shape[1:]) for name in sorted(stored)}
    expected = {name: tuple(job.shapes[name]) for name in sorted(job.shapes)}
    if found != expected:
        raise ValueError(f"{folder} holds other simulations: of {found}, expected {expected}")
