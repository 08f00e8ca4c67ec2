"""The training that all estimators share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import tensor_file
from ..distributions.maximum_likelihood import (
    Rows,
    Settings,
    maximize_likelihood,
    split,
)
from .conditional import ConditionalDensity
from .observations import ObservationSpace
from .posterior import FORMAT, Posterior
from .simulate import given_or_drawn
from .simulations import Simulations
from .space import ParameterSpace

BATCH_SIZE = 512
LEARNING_RATE = 1e-3
NUM_STEPS = 6000


class Estimator:
    """Learn a conditional density from the draws of a simulator.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`.
    embedding
        A module that summarises one observation.
    device
        Where to train.
    **options
        Options of the density.
    """

    def __init__(
        self,
        simulator: Callable,
        observed: str | Collection[str] = "x",
        *,
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        embedding: nn.Module | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        if not callable(simulator):
            raise TypeError(f"simulator must be a Pyro model, got {type(simulator).__name__}")
        self.simulator = simulator
        self.observed = (observed,) if isinstance(observed, str) else tuple(observed)
        self.parameters = parameters
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.embedding = embedding
        self.device = torch.device(device)
        self.options = options
        where = (simulator, self.observed)
        self.space = ParameterSpace.of_model(*where, parameters, args, self.kwargs)
        self.observations = ObservationSpace.of_model(*where, args, self.kwargs)

    def density(
        self, dim: int, observations: ObservationSpace, num_simulations: int
    ) -> ConditionalDensity:
        """Build the density to train."""
        raise NotImplementedError

    def fit(
        self,
        simulations: Simulations | None = None,
        *,
        num_simulations: int | None = None,
        num_steps: int = NUM_STEPS,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        weight_decay: float = 1e-2,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        seed: int = 0,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> Posterior:
        """Train, and return the posterior as a function of the observation.

        Parameters
        ----------
        simulations
            Draws from the simulator, or
        num_simulations
            how many to draw.
        num_steps, batch_size, learning_rate, weight_decay, validation_fraction, patience
            See :meth:`pyroflows.Flow.fit`, like ``checkpoint``.
        seed
            Determines simulations, initial weights and training.
        progress
            Whether to show progress bars.

        Raises
        ------
        ValueError
            If neither or both of ``simulations`` and ``num_simulations`` are given, or the
            simulations are too few to train on or do not fit the simulator.
        """
        simulations = given_or_drawn(
            simulations,
            num_simulations,
            self.simulator,
            self.observed,
            parameters=self.space.names,
            args=self.args,
            kwargs=self.kwargs,
            seed=seed,
            progress=progress,
        )
        z = self.space.unconstrain(simulations.parameters)
        x = self.observations.tensor(simulations.observations)
        rows = Rows(z.to(self.device), x.to(self.device))
        settings = Settings(
            num_steps,
            batch_size,
            learning_rate,
            weight_decay,
            validation_fraction,
            patience,
            True,
            seed,
        )
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            density = self.density(self.space.dim, self.observations, len(simulations))
            density.to(self.device)
            training, validation = split(rows, validation_fraction, seed)
            fit = maximize_likelihood(
                _Trained(density),
                training,
                validation,
                settings,
                None,
                progress,
                checkpoint,
                prepare=lambda: density.prepare(training.data, training.context),
            )
        about = {**self._about(), "num_simulations": len(simulations)}
        return Posterior(self.space, self.observations, density, about, fit)

    def load(self, path: str | Path) -> Posterior:
        """Read a posterior that an estimator like this one has trained, and was saved.

        Parameters
        ----------
        path
            What :meth:`Posterior.save` was given.

        Raises
        ------
        ValueError
            If the file holds something else, or belongs to another model or other options.
        """
        state, about = tensor_file.read(path, FORMAT)
        for name, expected in self._about().items():
            if about.get(name) != expected:
                raise ValueError(
                    f"path {str(path)!r} belongs to another estimator, of {name} "
                    f"{about.get(name)!r}, got {expected!r}"
                )
        density = self.density(self.space.dim, self.observations, about["num_simulations"])
        density.load_state_dict(state)
        return Posterior(self.space, self.observations, density.to(self.device), about)

    def _about(self) -> dict[str, Any]:
        """Say what a trained posterior belongs to."""
        return {
            "method": type(self).__name__,
            "options": {key: repr(value) for key, value in self.options.items()},
            "parameters": {name: [*shape] for name, shape in self.space.shapes.items()},
            "observed": {name: [*shape] for name, shape in self.observations.shapes.items()},
        }


class _Trained:
    """Present a conditional density to the training loop."""

    def __init__(self, module: ConditionalDensity) -> None:
        self.module = module

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        return self.module.score(z, x)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()
