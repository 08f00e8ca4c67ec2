"""A simulator with a learned likelihood, as a Pyro model, and its posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from ... import tensor_file
from ...diagnostics.frames import frame
from ...distributions import FlowMixture
from ...distributions.maximum_likelihood import DensityFit
from ..model.joint_density import JointDensity
from ..model.observations import ObservationSpace
from ..model.prior import Prior
from ..simulation.simulate import simulate
from .annealing import anneal
from .export import export_posterior
from .tables import tabulate

FORMAT = "pyroflows.LikelihoodModel/1"
CHUNK = 4096  # observations at a time: what fits in the caches is several times faster
POPULATION = 2000  # particles on the way to the posterior, enough for the weights of its modes
MIN_DRAWS = 1000  # fewer particles move badly


class LikelihoodModel:
    r"""Be a Pyro model: the prior of a simulator, and its observed site as a learned flow.

    Call it with the observation; any guide, ``fit`` and MCMC work on it. :meth:`posterior` and
    :meth:`sample` need none of them: an annealed population finds all modes, and the evidence.

    What :class:`NeuralLikelihood` returns; :meth:`NeuralLikelihood.load` reads one from a file.

    Attributes
    ----------
    flow
        The density of one observation, an element of the set where there is a plate, conditional on
        unconstrained parameters.
    space
        The parameters.
    observations
        The observations.
    fit
        How the training went; ``None`` for a model from a file.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = pf.sbi.NeuralLikelihood(simulator, num_flows=1, num_layers=2)
    >>> model = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> result = pf.fit(
    ...     model, pf.AutoRealNVP(model, num_layers=2), (torch.tensor(1.0),),
    ...     num_steps=10, num_particles=16, num_draws=500, progress=False,
    ... )
    >>> result.sample(5)["theta"].shape
    torch.Size([5])
    """

    def __init__(
        self,
        joint: JointDensity,
        flow: FlowMixture,
        about: Mapping[str, Any],
        fit: DensityFit | None = None,
    ) -> None:
        self.joint = joint
        self.space = joint.space
        self.observations: ObservationSpace = joint.observations
        self.prior = Prior(joint.simulator, self.space.names, joint.args, joint.kwargs)
        self.flow = flow.eval()
        self.about = dict(about)
        self.fit = fit
        for parameter in flow.parameters():
            parameter.requires_grad_(False)  # guides learn theirs only

    def __call__(self, x: Tensor | None = None) -> Tensor:
        """Sample parameters, and observe ``x`` or sample it."""
        z = self.space.unconstrain(self.prior()).to(next(self.flow.parameters()).dtype)
        (name,) = self.observations.names
        shape = self.observations.shapes[name]
        observed = None if x is None else torch.as_tensor(x).to(z)
        if observed is not None:
            self._rows(observed)
        if not self.observations.is_set:
            return pyro.sample(name, _reshaped(self.flow.condition(z), shape), obs=observed)
        size = shape[0] if observed is None else len(observed)
        with pyro.plate(f"{name}_plate", size):
            return pyro.sample(name, _reshaped(self.flow.condition(z), shape[1:]), obs=observed)

    def log_likelihood(self, z: Tensor, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        r"""Return the learned :math:`\log p(x \mid z)` of one observation.

        Parameters
        ----------
        z
            Unconstrained parameters, shape ``(N, D)``.
        x
            The observation; where there is a plate, with any number of elements.

        Returns
        -------
        Tensor
            Shape ``(N,)``.

        Raises
        ------
        ValueError
            If ``x`` has the wrong shape or numbers that are not finite.
        """
        like = next(self.flow.parameters())
        rows = self._rows(x).to(like)
        parts = [
            self.flow.score(rows.expand(len(part), *rows.shape), part.unsqueeze(1)).sum(-1)
            for part in z.to(like).split(max(1, CHUNK // len(rows)))
        ]
        return torch.cat(parts).to(z)

    def posterior(
        self,
        num_samples: int = 10_000,
        *,
        x: Tensor | Mapping[str, Tensor],
        seed: int | None = None,
        progress: bool = False,
    ) -> LikelihoodPosterior:
        """Sample the posterior given one observation, and estimate its evidence.

        A population of draws from the prior is annealed to the posterior: some hundred evaluations
        of the likelihood for each draw.

        Parameters
        ----------
        num_samples
            Number of draws ``S``.
        x
            The observation, of the shape of the observed site; where there is a plate, with any
            number of elements.
        seed
            Makes the draws reproducible; the global random state is left alone then.
        progress
            Whether to show a progress bar.

        Raises
        ------
        ValueError
            If ``num_samples`` is below 1, or ``x`` has the wrong shape or numbers that are not
            finite.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self._rows(x)  # raises before anything takes time
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        annealed = anneal(
            self.prior_draws(POPULATION, seed),
            self.joint.log_prior,
            lambda z: self.log_likelihood(z, x),
            num_draws=max(num_samples, MIN_DRAWS),
            seed=seed,
            progress=progress,
        )
        (name,) = self.observations.names
        observed = torch.as_tensor(x[name] if isinstance(x, Mapping) else x)
        return LikelihoodPosterior(
            self.space.constrain(annealed.draws[:num_samples]),
            annealed.log_evidence,
            annealed.log_evidence_error,
            {name: observed},
            self.about,
            self.joint,
        )

    def sample(
        self,
        num_samples: int,
        *,
        x: Tensor | Mapping[str, Tensor],
        seed: int | None = None,
        progress: bool = False,
    ) -> dict[str, Tensor]:
        """Draw parameters given one observation: the draws of :meth:`posterior`.

        Returns
        -------
        dict
            From sites to draws ``(S, *shape)``.
        """
        return self.posterior(num_samples, x=x, seed=seed, progress=progress).draws

    def save(self, path: str | Path) -> None:
        """Write the model to a file of tensors and JSON; see :meth:`NeuralLikelihood.load`."""
        tensor_file.write(path, FORMAT, self.flow.state_dict(), self.about)

    def to(self, device: torch.device | str) -> LikelihoodModel:
        """Move the likelihood to a device, in place.

        As a Pyro model it has to be where the simulator puts its parameters.
        """
        self.flow.to(device)
        return self

    def _rows(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return one observation as rows that are independent given the parameters."""
        observed = self.observations.tensor(x)
        if observed.dim() != self.observations.event_dim:
            (name,) = self.observations.names
            raise ValueError(
                f"x must be one observation of site {name!r}, of shape "
                f"{tuple(self.observations.shapes[name])}, got a batch"
            )
        return observed.reshape(-1, observed.shape[-1])

    def prior_draws(self, num_draws: int, seed: int) -> Tensor:
        """Return unconstrained parameters drawn from the prior."""

        def program() -> None:
            pyro.deterministic(_DRAW, self.space.unconstrain(self.prior()), event_dim=1)

        draws = simulate(
            program, num_draws, _DRAW, parameters=self.space.names, seed=seed, progress=False
        )
        return draws.observations[_DRAW]


@dataclass(frozen=True)
class LikelihoodPosterior:
    """Hold draws from a posterior and its evidence.

    Attributes
    ----------
    draws
        From sites to draws ``(S, *shape)``.
    log_evidence
        Estimate of the log-density of the observation, averaged over the prior.
    log_evidence_error
        Its standard error, that of the learned likelihood left aside.
    observed
        The observation, by site.
    about
        What was trained.
    joint
        The simulator.

    Examples
    --------
    >>> draws = {"rate": torch.ones(100)}
    >>> posterior = LikelihoodPosterior(draws, -2.3, 0.1, {"x": torch.tensor(0.5)}, {})
    >>> posterior.draws["rate"].shape, posterior.log_evidence
    (torch.Size([100]), -2.3)
    """

    draws: dict[str, Tensor]
    log_evidence: float
    log_evidence_error: float
    observed: dict[str, Tensor]
    about: dict[str, Any]
    joint: JointDensity | None = None

    def summary(self) -> pd.DataFrame:
        """Tabulate each parameter: mean, standard deviation and quantiles, a row per entry."""
        table = tabulate(self.draws, 0)
        table.attrs.update(self.scalars())
        return table

    def scalars(self) -> dict[str, float]:
        """Return the evidence and its error."""
        return {
            "log_evidence": self.log_evidence,
            "log_evidence_error": self.log_evidence_error,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the draws as a table, a row each."""
        return frame(self.draws)

    def to_arviz(
        self,
        *,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        """Return the draws as ArviZ data, with the observation.

        Parameters
        ----------
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        groups = {"posterior": self.draws, "observed_data": self.observed}
        about = {**self.scalars(), **self.about}
        return export_posterior(groups, about, self.joint, dims=dims, coords=coords)


def _reshaped(flow: FlowMixture, shape: torch.Size) -> dist.TorchDistribution:
    """Give the draws of a density of vectors the shape of a site."""
    if shape == flow.event_shape:
        return flow
    return dist.TransformedDistribution(flow, [ReshapeTransform(flow.event_shape, shape)])


_DRAW = "_pyroflows_draw"
