"""The posterior an estimator has learned, for any observation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ... import tensor_file
from ...diagnostics.frames import frame
from ...distributions.maximum_likelihood import DensityFit
from ...random_state import seeded
from ..densities.conditional import ConditionalDensity
from ..model.joint_density import JointDensity
from ..model.observations import ObservationSpace
from ..model.space import ParameterSpace
from .corrected import CorrectedPosterior
from .export import export_posterior
from .mode import climb
from .tables import batch_dims, tabulate

FORMAT = "pyroflows.Posterior/2"
MODE_DRAWS = 500  # draws to find the neighbourhood of the mode by
MODE_STARTS = 3


class Posterior:
    """Sample and evaluate the posterior of a simulator's parameters for any observation.

    What estimators return; :meth:`FlowMatching.load` reads one from a file.

    Attributes
    ----------
    space
        The parameters.
    observations
        The observations.
    density
        What was trained: a density of unconstrained parameters given an observation.
    fit
        How the training went; ``None`` for a posterior from a file.
    joint
        The simulator's own density, ``None`` where the simulator is not known.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = pf.sbi.NeuralPosterior(simulator, num_layers=2)
    >>> posterior = estimator.fit(num_simulations=500, num_steps=50, progress=False)
    >>> draws = posterior.sample(100, x=torch.tensor([0.0, 1.0]))  # two observations
    >>> draws["theta"].shape, posterior.log_prob(draws, x=torch.tensor([0.0, 1.0])).shape
    (torch.Size([100, 2]), torch.Size([100, 2]))
    """

    def __init__(
        self,
        space: ParameterSpace,
        observations: ObservationSpace,
        density: ConditionalDensity,
        about: Mapping[str, Any],
        fit: DensityFit | None = None,
        joint: JointDensity | None = None,
    ) -> None:
        self.space = space
        self.observations = observations
        self.density = density.eval().requires_grad_(False)
        self.about = dict(about)
        self.fit = fit
        self.joint = joint

    def sample(
        self, num_samples: int, *, x: Tensor | Mapping[str, Tensor], seed: int | None = None
    ) -> dict[str, Tensor]:
        """Draw parameters given one observation, or each of a batch.

        Parameters
        ----------
        num_samples
            Number of draws ``S``.
        x
            The observation: a tensor for one observed site, else a dict of tensors, each of shape
            ``(*batch, *shape)``.
        seed
            Makes the draws reproducible; the global random state is left alone then.

        Returns
        -------
        dict
            From sites to draws ``(S, *batch, *shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is below 1, or ``x`` has the wrong shape or numbers that are not
            finite.
        """
        observed = self._tensor(x)
        self.density.check.warn(observed)
        return self.space.constrain(self._draw(num_samples, observed, seed))

    def misspecification(self, *, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return how likely the model is to give an observation as unusual as this one, or each.

        Parameters
        ----------
        x
            The observation, as for :meth:`sample`, which warns where the probability is below
            1/1000.

        Returns
        -------
        Tensor
            Exact p-values, shape ``(*batch,)``, see :class:`OutlierCheck`.
        """
        return self.density.check.p_value(self._tensor(x))

    def _draw(self, num_samples: int, observed: Tensor, seed: int | None) -> Tensor:
        """Return unconstrained draws ``(S, *batch, D)``."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with seeded(seed):
            return self.density.sample(num_samples, observed)

    def log_prob(self, values: Mapping[str, Tensor], *, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Return the log-density of parameters given an observation.

        Parameters
        ----------
        values
            From sites to values of shape ``(*batch, *shape)``.
        x
            The observation, as for :meth:`sample`; its batch broadcasts against that of the values.

        Returns
        -------
        Tensor
            Shape ``(*batch,)``.
        """
        z = self.space.unconstrain(values).to(self.density.linear.loc)
        return self._log_prob(z, self._tensor(x))

    def _log_prob(self, z: Tensor, observed: Tensor) -> Tensor:
        """Return the log-density, in the parameters' own space, at unconstrained vectors."""
        return self.density.log_prob(z, observed) - self.space.log_abs_det_jacobian(z)

    def map(self, *, x: Tensor | Mapping[str, Tensor], seed: int | None = 0) -> dict[str, Tensor]:
        """Find the parameters of highest density given one observation, or each of a batch.

        The density is that of the parameters in their own space; its mode is not that of their
        unconstrained coordinates. The best of some draws climb its gradient, all observations at
        once. Where the density rises to the edge of the prior, so does the answer.

        Parameters
        ----------
        x
            The observation, as for :meth:`sample`.
        seed
            Makes the draws, and so the answer, reproducible.

        Returns
        -------
        dict
            From sites to values ``(*batch, *shape)``.
        """
        observed = self._tensor(x)
        draws = self._draw(MODE_DRAWS, observed, seed)
        with torch.no_grad():
            heights = self._log_prob(draws, observed)
        return self.space.constrain(
            climb(lambda z: self._log_prob(z, observed), draws, heights, MODE_STARTS)
        )

    def correct(
        self,
        *,
        x: Tensor | Mapping[str, Tensor],
        num_samples: int = 4000,
        seed: int | None = 0,
    ) -> CorrectedPosterior:
        """Weight draws given one observation by the simulator's own density.

        For models whose observed sites have a density given the parameters. The weights tell how
        good the draws are, correct them, and estimate the evidence.

        Parameters
        ----------
        x
            One observation.
        num_samples
            Number of draws.
        seed
            Makes the draws reproducible.

        Raises
        ------
        ValueError
            If ``x`` is a batch, or the model has no density of the observed sites: they are
            ``pyro.deterministic``, or there is noise that is no parameter.
        """
        if self.joint is None:
            raise ValueError(
                "the simulator of this posterior is not known: get it from an estimator's fit or "
                "load"
            )
        self.joint.check_tractable()
        observed = self._tensor(x)
        if batch_shape := self._batch_shape(observed):
            raise ValueError(f"x must be one observation, got a batch {tuple(batch_shape)}")
        draws = self._draw(num_samples, observed, seed)
        with torch.no_grad():
            log_q = self.density.log_prob(draws, observed)
            log_p = self.joint.log_joint(draws, self._sites(x))
        return CorrectedPosterior(
            self.space, draws, log_p, log_q, self._sites(x), self.about, self.joint
        )

    def summary(
        self,
        *,
        x: Tensor | Mapping[str, Tensor],
        num_samples: int = 4000,
        seed: int | None = 0,
    ) -> pd.DataFrame:
        """Tabulate each parameter given one observation, or each of a batch.

        Parameters
        ----------
        x
            The observation, as for :meth:`sample`.
        num_samples
            Number of draws.
        seed
            Makes the draws reproducible.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: mean, standard deviation and the 5 %, 50 % and 95 %
            quantiles. For a batch the index starts with the number of the observation.
        """
        observed = self._tensor(x)
        draws = self.space.constrain(self._draw(num_samples, observed, seed))
        return tabulate(draws, len(self._batch_shape(observed)))

    def to_frame(
        self,
        *,
        x: Tensor | Mapping[str, Tensor],
        num_samples: int = 1000,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Return draws as a table, a row each; arguments as in :meth:`to_arviz`."""
        observed = self._tensor(x)
        draws = self.space.constrain(self._draw(num_samples, observed, seed))
        return frame(draws, ("draw", *batch_dims(len(self._batch_shape(observed)))))

    def to_arviz(
        self,
        *,
        x: Tensor | Mapping[str, Tensor],
        num_samples: int = 1000,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        seed: int | None = None,
    ) -> Any:
        """Return draws given one observation, or each of a batch, as ArviZ data.

        The draws are one chain of the group ``posterior``, with their log-density ``lp`` in
        ``sample_stats``, the observations in ``observed_data`` and other arguments of the model in
        ``constant_data``. A batch is the dimension ``observation``; other dimensions are named
        after plates.

        Parameters
        ----------
        x
            The observation, as for :meth:`sample`.
        num_samples
            Number of draws.
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions, for instance ``{"observation": names}``.
        seed
            Makes the draws reproducible.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        observed = self._tensor(x)
        z = self._draw(num_samples, observed, seed)
        with torch.no_grad():
            log_prob = self._log_prob(z, observed)
        groups = {
            "posterior": self.space.constrain(z),
            "sample_stats": {"lp": log_prob},
            "observed_data": self._sites(x),
        }
        batch = batch_dims(log_prob.dim() - 1)
        return export_posterior(
            groups, self.about, self.joint, batch_dims=batch, dims=dims, coords=coords
        )

    def save(self, path: str | Path) -> None:
        """Write the posterior to a file of tensors and JSON; see :meth:`FlowMatching.load`."""
        tensor_file.write(path, FORMAT, self.density.state_dict(), self.about)

    def to(self, device: torch.device | str) -> Posterior:
        """Move to a device, in place."""
        self.density.to(device)
        return self

    def _tensor(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        observed = self.observations.tensor(x).to(self.density.linear.loc)
        only = self.about.get("observation")
        if only is not None and not _repeats(observed, observed.new_tensor(only)):
            warnings.warn(
                "this posterior was refined for one observation, and is wrong for the others it "
                "is asked for now",
                stacklevel=3,
            )
        return observed

    def _sites(self, x: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = x if isinstance(x, Mapping) else {self.observations.names[0]: x}
        return {name: torch.as_tensor(values[name]) for name in self.observations.names}

    def _batch_shape(self, observed: Tensor) -> torch.Size:
        return observed.shape[: observed.dim() - self.observations.event_dim]


def _repeats(observed: Tensor, only: Tensor) -> bool:
    """Tell whether all observations of a batch are one and the same."""
    same_size = observed.shape[observed.dim() - only.dim() :] == only.shape
    return same_size and torch.allclose(observed, only, equal_nan=True)
