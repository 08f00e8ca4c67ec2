"""Likelihoods by conditional flows, as Pyro models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...distributions import Flow, FlowMixture
from ...distributions.maximum_likelihood import (
    Rows,
    Settings,
    check_rows,
    maximize_likelihood,
    split,
)
from ...random_state import preserved, seeded
from ..densities.likelihood_transform import LikelihoodTransform
from ..model.exchangeable import hidden_trace
from ..model.joint_density import JointDensity
from ..model.observations import ObservationSpace
from ..model.prior import check_prior
from ..model.simulations import Simulations
from ..model.space import ParameterSpace
from ..posteriors.likelihood_model import FORMAT, LikelihoodModel
from ..simulation.simulate import given_or_drawn
from .pairs import pairs
from .trained_file import load_weights, read_trained

BATCH_SIZE = 128
LEARNING_RATE = 2e-3
STEPS_PER_ROOT = 60  # times the root of the number of simulations
MIN_STEPS = 500


class NeuralLikelihood:
    r"""Learn the density of observations given parameters, and make a Pyro model of it.

    Conditional flows maximise the mean of :math:`\log q(x \mid \theta)` over simulations [1]; the
    likelihood is the mean of several that started from different weights [2], which forgives what
    each has made up where simulations are few. Where observations in a plate are independent given
    the parameters, what is learned is the density of one of them, from all of them, and the model
    takes any number. Where they share latent noise outside the plate, they are one vector.

    Parameters
    ----------
    simulator, observed, parameters, args, kwargs
        The model and its sites, see :func:`simulate`; one observed site, whose values are
        continuous.
    flow
        Name of a registered flow.
    num_flows
        Number of flows to average.
    device
        Where to train.
    **options
        Options of the flow.

    Raises
    ------
    TypeError
        If ``simulator`` is not callable.
    ValueError
        If there are several observed sites, or none of the name, the prior depends on what is
        observed, or ``num_flows`` is below 1.

    References
    ----------
    [1] G. Papamakarios, D. C. Sterratt, I. Murray. Sequential neural likelihood.
        `arXiv:1805.07226 <https://arxiv.org/abs/1805.07226>`_, 2018.
    [2] B. Lakshminarayanan, A. Pritzel, C. Blundell. Simple and scalable predictive uncertainty
        estimation using deep ensembles. `arXiv:1612.01474 <https://arxiv.org/abs/1612.01474>`_,
        2016.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("points", 4):
    ...         pyro.sample("x", dist.Normal(theta, 1.0))
    >>> likelihood = NeuralLikelihood(simulator, num_layers=2)
    >>> model = likelihood.fit(num_simulations=500, num_steps=50, progress=False)
    >>> model.sample(2000, x=torch.tensor([1.0, 0.5, 1.5]), seed=0)["theta"].shape
    torch.Size([2000])
    """

    def __init__(
        self,
        simulator: Callable,
        observed: str = "x",
        *,
        flow: str = "maf",
        num_flows: int = 3,
        parameters: Collection[str] | None = None,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        if not callable(simulator):
            raise TypeError(f"simulator must be a Pyro model, got {type(simulator).__name__}")
        if not isinstance(observed, str):
            raise ValueError(f"observed must be the name of one site, got {observed!r}")
        if num_flows < 1:
            raise ValueError(f"num_flows must be at least 1, got {num_flows}")
        self.flow = flow
        self.num_flows = num_flows
        self.device = torch.device(device)
        self.options = options
        call = (args, dict(kwargs or {}))
        self.space = ParameterSpace.of_model(simulator, (observed,), parameters, *call)
        check_prior(simulator, self.space.names, (observed,), *call)
        names = self.space.names
        self.observations = ObservationSpace.of_model(simulator, (observed,), *call, names)
        if self.observations.is_set and _is_noise_shared(simulator, observed, self.space, *call):
            self.observations = ObservationSpace(self.observations.shapes)
        self.joint = JointDensity(simulator, self.space, self.observations, *call)

    def density(self) -> FlowMixture:
        """Build the density to train."""
        size = self.observations.size
        transforms = [
            LikelihoodTransform(self.space, size, self.flow, **self.options)
            for _ in range(self.num_flows)
        ]
        return FlowMixture([Flow(None, transform) for transform in transforms]).to(self.device)

    def fit(
        self,
        simulations: Simulations | None = None,
        *,
        num_simulations: int | None = None,
        num_steps: int | None = None,
        batch_size: int = BATCH_SIZE,
        learning_rate: float = LEARNING_RATE,
        weight_decay: float = 0.0,
        validation_fraction: float = 0.1,
        patience: int | None = None,
        seed: int = 0,
        progress: bool = True,
        checkpoint: str | Path | None = None,
    ) -> LikelihoodModel:
        """Train, and return the model whose observed site is the learned density.

        Parameters
        ----------
        simulations
            Draws from the simulator, or
        num_simulations
            how many to draw.
        num_steps
            Number of steps. Default: 60 times the root of the number of simulations, 500 at least.
        batch_size, learning_rate, weight_decay, validation_fraction, patience, checkpoint
            See :meth:`pyroflows.Flow.fit`; rows are simulations.
        seed
            Determines simulations, initial weights and training.
        progress
            Whether to show progress bars.

        Raises
        ------
        ValueError
            If neither or both of ``simulations`` and ``num_simulations`` are given, or the
            simulations are too few to train on, do not fit the simulator, or hold an entry that
            never varies, which has no density.
        """
        with preserved():
            self.density()  # wrong options are refused now
        simulations = given_or_drawn(
            simulations,
            num_simulations,
            self.joint.simulator,
            self.observations.names,
            parameters=self.space.names,
            args=self.joint.args,
            kwargs=self.joint.kwargs,
            seed=seed,
            progress=progress,
        )
        settings = Settings(
            num_steps=default_steps(len(simulations)) if num_steps is None else num_steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            validation_fraction=validation_fraction,
            patience=patience,
            standardize=True,
            seed=seed,
        )
        training, validation = split(self._rows(simulations), validation_fraction, seed)
        with seeded(seed), torch.enable_grad():
            density = self.density()
            fit = maximize_likelihood(
                _Trained(density),
                training,
                validation,
                settings,
                None,
                progress,
                checkpoint,
                prepare=lambda: _prepare(density, training),
            )
        about = {**self._about(), "num_simulations": len(simulations)}
        return LikelihoodModel(self.joint, density, about, fit)

    def load(self, path: str | Path) -> LikelihoodModel:
        """Read a model that an estimator like this one has trained, and was saved.

        Parameters
        ----------
        path
            What :meth:`LikelihoodModel.save` was given.

        Raises
        ------
        ValueError
            If the file holds something else, or belongs to another model or other options.
        """
        state, about = read_trained(path, FORMAT, self._about())
        with preserved():
            density = self.density()
        load_weights(density, state, path)
        return LikelihoodModel(self.joint, density, about)

    def _rows(self, simulations: Simulations) -> Rows:
        """Return observations, ``(N, n, V)``, and the parameters they are conditioned on."""
        z, x = pairs(simulations, self.space, self.observations)
        x = x.reshape(len(z), -1, x.shape[-1])
        check_rows(x.flatten(0, 1), None, x.shape[-1:], 0, x)
        return Rows(x.to(self.device), z.to(self.device))

    def _about(self) -> dict[str, Any]:
        """Say what a trained model belongs to."""
        return {
            "method": type(self).__name__,
            "flow": self.flow,
            "num_flows": self.num_flows,
            "options": {key: repr(value) for key, value in self.options.items()},
            "parameters": self.space.describe(),
            "observed": {name: [*shape] for name, shape in self.observations.shapes.items()},
        }


def default_steps(num_simulations: int) -> int:
    """Return the number of steps for so many simulations."""
    return max(MIN_STEPS, round(STEPS_PER_ROOT * num_simulations**0.5))


def _is_noise_shared(
    simulator: Callable,
    observed: str,
    space: ParameterSpace,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> bool:
    """Tell whether noise outside the plate of the observations makes them dependent."""
    nodes = hidden_trace(simulator, args, kwargs).nodes
    plate = {frame.name for frame in nodes[observed]["cond_indep_stack"]}
    return any(
        not plate <= {frame.name for frame in site["cond_indep_stack"]}
        for name, site in nodes.items()
        if site["type"] == "sample"
        and name not in (*space.names, observed)
        and not site["is_observed"]
        and not site_is_subsample(site)
    )


class _Trained:
    """Present flows to the training loop: each learns by itself, together they are validated."""

    def __init__(self, density: FlowMixture) -> None:
        self.density = density
        self.module = density.module
        density.logits.requires_grad_(False)

    def score(self, x: Tensor, z: Tensor) -> Tensor:
        z = z.unsqueeze(-2)
        if not self.module.training:
            return self.density.score(x, z).mean(-1)
        return torch.stack([flow.score(x, z).mean(-1) for flow in self.density.flows]).mean(0)

    def train(self) -> None:
        self.density.train()

    def eval(self) -> None:
        self.density.eval()


def _prepare(density: FlowMixture, rows: Rows) -> None:
    for flow in density.flows:
        flow.transform.prepare(rows.data, rows.context)
