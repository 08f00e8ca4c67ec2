"""The training that all estimators share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ...distributions.maximum_likelihood import (
    DensityFit,
    Rows,
    Settings,
    concatenate,
    maximize_likelihood,
    split,
)
from ...random_state import preserved, seeded
from ..densities.conditional import ConditionalDensity
from ..model.joint_density import JointDensity
from ..model.masking import Masking
from ..model.observations import ObservationSpace
from ..model.prior import check_prior
from ..model.simulations import Simulations
from ..model.space import ParameterSpace, site_names
from ..posteriors.posterior import FORMAT, Posterior
from ..simulation.simulate import given_or_drawn
from .augmentation import (
    MAX_SIZE,
    can_augment,
    draw_pairs,
    has_memorised,
    steps_to_wait,
    warn_of_failure,
)
from .neural_likelihood import NeuralLikelihood
from .neural_likelihood import default_steps as likelihood_steps
from .pairs import pairs
from .trained_file import load_weights, read_trained

BATCH_SIZE = 512
LEARNING_RATE = 1e-3
FEW_SIMULATIONS = 10_000
MIN_STEPS = 6000  # up to so few
STEPS_EXPONENT = 0.8  # of the number of simulations, beyond
AUGMENTED_EXPONENT = 0.5
AUGMENTED_STEPS = 2  # times as many, where data do not run out


AnyPosterior = TypeVar("AnyPosterior", bound=Posterior)


class Estimator(Generic[AnyPosterior]):
    """Learn a conditional density from the draws of a simulator.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`.
    embedding
        A module that summarises one observation.
    missing, min_size
        Which observations to be ready for, see :class:`FlowMatching`.
    device
        Where to train.
    **options
        Options of the density.
    """

    _posterior_type: ClassVar[type[Posterior]] = Posterior

    def __init__(
        self,
        simulator: Callable,
        observed: str | Collection[str] = "x",
        *,
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        embedding: nn.Module | None = None,
        missing: str | None = None,
        min_size: int | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        if not callable(simulator):
            raise TypeError(f"simulator must be a Pyro model, got {type(simulator).__name__}")
        self.simulator = simulator
        self.observed = site_names("observed", observed)
        self.parameters = parameters
        self.args = args
        self.kwargs = dict(kwargs or {})
        self.embedding = embedding
        self.device = torch.device(device)
        self.options = options
        where = (simulator, self.observed)
        self.space = ParameterSpace.of_model(*where, parameters, args, self.kwargs)
        check_prior(simulator, self.space.names, self.observed, args, self.kwargs)
        self.observations = ObservationSpace.of_model(
            *where, args, self.kwargs, self.space.names
        ).of_training(missing, min_size)

    def density(
        self, dim: int, observations: ObservationSpace, num_pairs: int
    ) -> ConditionalDensity:
        """Build the density to train on so many pairs."""
        raise NotImplementedError

    def fit(
        self,
        simulations: Simulations | None = None,
        *,
        num_simulations: int | None = None,
        num_steps: int | None = None,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        weight_decay: float = 1e-2,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        augment: bool = True,
        seed: int = 0,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> AnyPosterior:
        """Train, and return the posterior as a function of the observation.

        Parameters
        ----------
        simulations
            Draws from the simulator, or
        num_simulations
            how many to draw.
        num_steps, batch_size, learning_rate, weight_decay, validation_fraction, patience
            See :meth:`pyroflows.Flow.fit`, like ``checkpoint``. By default 6000 steps up to 10 000
            simulations, and 10^0.8 times as many for each ten times more.
        augment
            Whether to train once more where training has memorised the simulations: gets no better
            for a tenth of its steps, and then stops, unless ``patience`` is given. It goes on with
            pairs of parameters from the prior and observations from a likelihood that is learned
            from the simulations, see :class:`NeuralLikelihood`. What does better on simulations
            held out is kept. Only for a single observed site without missing entries, of at most 64
            numbers, or as many an element of a plate, and where no simulation was left out as
            invalid: the prior of the others is not the model's.
        seed
            Determines simulations, initial weights and training.
        progress
            Whether to show progress bars.

        Returns
        -------
        Posterior
            Of the estimator's kind: of :class:`FlowMatching` a :class:`VelocityPosterior`.

        Raises
        ------
        ValueError
            If neither or both of ``simulations`` and ``num_simulations`` are given, or the
            simulations are too few to train on or do not fit the simulator.
        """
        with preserved():
            self.density(self.space.dim, self.observations, 1)  # wrong options are refused now
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
            keep_nan=self.observations.missing == "simulated",
        )
        z, x = pairs(simulations, self.space, self.observations)
        masking = Masking(self.observations)
        masking.check(x)
        settings = Settings(
            default_steps(len(simulations)) if num_steps is None else num_steps,
            batch_size,
            learning_rate,
            weight_decay,
            validation_fraction,
            patience,
            True,
            seed,
        )
        training, validation = split(self._rows(z, x), validation_fraction, seed)
        validation = masking.validation(validation, seed)

        train = partial(self._train, training, validation, masking, progress)
        augments = augment and can_augment(self.observations, simulations)
        first = settings
        if augments and patience is None:
            first = replace(settings, patience=steps_to_wait(settings.num_steps))
        density, fit = train(None, first, stage(checkpoint, ""))
        num_pairs = len(training)
        if augments and has_memorised(fit, settings.num_steps):
            try:
                more = self._drawn_pairs(simulations, settings, progress, checkpoint)
                longer = replace(settings, num_steps=augmented_steps(settings, len(simulations)))
                augmented, refit = train(more, longer, stage(checkpoint, ".augmented"))
                if refit.best_validation_loss < fit.best_validation_loss:
                    density, fit, num_pairs = augmented, refit, num_pairs + len(more)
                else:
                    fit = replace(fit, interrupted=refit.interrupted)
            # What is learned already outlives whatever goes wrong in making it better.
            except KeyboardInterrupt:
                fit = replace(fit, interrupted=True)
                warn_of_failure("interrupted")
            except (ArithmeticError, RuntimeError, ValueError) as error:
                warn_of_failure(error)
        about = {**self._about(), "num_simulations": len(simulations), "num_pairs": num_pairs}
        return self._posterior(density, about, fit)

    def _train(
        self,
        training: Rows,
        validation: Rows,
        masking: Masking,
        progress: bool,
        more: Rows | None,
        settings: Settings,
        checkpoint: Path | None,
    ) -> tuple[ConditionalDensity, DensityFit]:
        """Train a density on simulations, and on more pairs if there are any."""
        rows = training if more is None else concatenate(training, more)
        with seeded(settings.seed), torch.enable_grad():
            density = self.density(self.space.dim, self.observations, len(rows)).to(self.device)

            def prepare() -> None:
                density.prepare(training.data, training.context)
                assert rows.context is not None
                density.begin(rows.data, rows.context, settings.num_steps, settings.seed, progress)

            fit = maximize_likelihood(
                _Trained(density, masking),
                rows,
                validation,
                settings,
                None,
                progress,
                checkpoint,
                prepare=prepare,
            )
        return density, fit

    def _drawn_pairs(
        self,
        simulations: Simulations,
        settings: Settings,
        progress: bool,
        checkpoint: str | Path | None,
    ) -> Rows:
        """Learn the likelihood from the simulations, and draw pairs from it."""
        (observed,) = self.observations.names
        likelihood = NeuralLikelihood(
            self.simulator,
            observed,
            parameters=self.space.names,
            args=self.args,
            kwargs=self.kwargs,
            num_flows=1,
            device=self.device,
        )
        if (size := likelihood.observations.size) > MAX_SIZE:
            raise ValueError(f"{observed!r} has {size} entries that noise makes dependent")
        model = likelihood.fit(
            simulations,
            num_steps=min(settings.num_steps, likelihood_steps(len(simulations))),
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
            progress=progress,
            checkpoint=stage(checkpoint, ".likelihood"),
        )
        assert model.fit is not None
        if model.fit.interrupted:
            raise KeyboardInterrupt
        shape = self.observations.tensor(simulations.observations).shape[1:]
        return self._rows(*draw_pairs(model, shape, settings.seed))

    def _rows(self, z: Tensor, x: Tensor) -> Rows:
        return Rows(z.to(self.device), x.to(self.device))

    def load(self, path: str | Path) -> AnyPosterior:
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
        state, about = read_trained(path, FORMAT, self._about())
        with preserved():
            density = self._saved_density(about)
        load_weights(density, state, path)
        density.to(self.device)
        return self._posterior(density, about)

    def _saved_density(self, about: Mapping[str, Any]) -> ConditionalDensity:
        """Build the density of a saved posterior, from what is said about it."""
        return self.density(self.space.dim, self.observations, about["num_pairs"])

    def _posterior(
        self, density: ConditionalDensity, about: Mapping[str, Any], fit: DensityFit | None = None
    ) -> AnyPosterior:
        where = (self.space, self.observations)
        posterior = self._posterior_type(*where, density, about, fit, self._joint())
        return cast(AnyPosterior, posterior)

    def _joint(self) -> JointDensity:
        where = (self.space, self.observations, self.args, self.kwargs)
        return JointDensity(self.simulator, *where)

    def _about(self) -> dict[str, Any]:
        """Say what a trained posterior belongs to."""
        return {
            "method": type(self).__name__,
            "options": {key: repr(value) for key, value in self.options.items()},
            "parameters": self.space.describe(),
            "observed": {name: [*shape] for name, shape in self.observations.shapes.items()},
            "missing": self.observations.missing,
            "sizes": self.observations.sizes and [*self.observations.sizes],
        }


def stage(checkpoint: str | Path | None, suffix: str) -> Path | None:
    """Return the file that a stage of the training goes to."""
    return None if checkpoint is None else Path(f"{checkpoint}{suffix}")


class _Trained:
    """Present a conditional density to the training loop."""

    def __init__(self, module: ConditionalDensity, masking: Masking) -> None:
        self.module = module
        self.masking = masking

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        return self.module.score(z, self.masking.batch(x) if self.module.training else x)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


def default_steps(num_simulations: int) -> int:
    """Return the number of steps for so many simulations."""
    return _steps(num_simulations, STEPS_EXPONENT)


def augmented_steps(settings: Settings, num_simulations: int) -> int:
    """Return the number of steps for them and pairs from a likelihood, of which there are enough.

    How much more there is to learn from the pairs depends on how well the likelihood is known.
    """
    return AUGMENTED_STEPS * min(settings.num_steps, _steps(num_simulations, AUGMENTED_EXPONENT))


def _steps(num_simulations: int, exponent: float) -> int:
    return round(MIN_STEPS * max(1.0, num_simulations / FEW_SIMULATIONS) ** exponent)
