"""What variational inference returns: weighted draws, densities and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from ..diagnostics import psis
from ..diagnostics.loo import LOO, loo
from ..random_state import seeded
from .density import ModelDensity
from .export import assemble, pointwise_log_likelihood, weighted_groups
from .storage import read, write
from .weighted_posterior import WeightedPosterior
from .weighting import draw, weighted_draws, without_nan

STORED_TENSORS = ("losses", "draws", "log_p", "log_q")


class VariationalPosterior(WeightedPosterior):
    r"""Hold a fitted guide together with weighted draws that say how good it is.

    The draws :math:`z_s` come from the guide and carry importance weights
    :math:`w_s = p(z_s, y) / q(z_s)`. From them follow the verdict and every weighted answer.

    Attributes
    ----------
    model, guide
        The model and its fitted guide.
    density
        The model's log-density in the guide's coordinates, with the model's arguments.
    losses
        Negative ELBO of each step, shape ``(num_steps,)``.
    draws
        Unconstrained draws from the guide, shape ``(S, D)``.
    log_p, log_q
        Log-density of the draws under the model (up to the evidence) and the guide, shape ``(S,)``.
    log_weights
        ``log_p - log_q``.
    elbo, elbo_standard_error
        Mean of the log-weights: a lower bound on the log evidence, in nats.
    khat
        Tail index of the weights: below 0.5 the guide is close to the posterior, up to 0.7
        weighted answers are reliable, above they are not.
    ess
        Effective number of the weighted draws.
    log_evidence, log_evidence_standard_error
        Estimate of the log evidence by importance sampling, in nats.

    Where there are fewer than 1000 draws of an :class:`pyroflows.AmortizedFlow`, because the data
    are many, ``khat``, ``ess``, ``log_evidence``, and all that rests on weights, is NaN.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def model(data):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("item", len(data)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
    >>> guide = pf.AutoRealNVP(model, num_layers=2)
    >>> result = pf.fit(model, guide, (torch.ones(3),), num_steps=10, progress=False)
    >>> result.is_reliable, result.sample(5)["mean"].shape
    (True, torch.Size([5]))
    """

    def __init__(
        self,
        density: ModelDensity,
        losses: Tensor,
        draws: Tensor,
        log_p: Tensor,
        log_q: Tensor,
    ) -> None:
        super().__init__(draws, log_p, log_q, density.min_weighted_draws)
        self.density = density
        self.losses = losses

    @classmethod
    def from_guide(
        cls, density: ModelDensity, losses: Tensor, num_draws: int, seed: int = 0
    ) -> VariationalPosterior:
        """Draw from a fitted guide and weight the draws against the model."""
        with seeded(seed + 1):  # not the noise the guide was fitted on
            return cls(density, losses, *weighted_draws(density, num_draws))

    @property
    def model(self) -> Callable:
        """Return the model."""
        return self.density.model

    @property
    def guide(self) -> AutoContinuous:
        """Return the fitted guide."""
        return self.density.guide

    @property
    def verdict(self) -> str:
        """Say in words whether to trust the answer, and what to do if not."""
        if not self.is_weighted:
            return (
                f"k-hat was not computed: it takes {self.min_weighted_draws} draws of all "
                f"{self.draws.shape[-1]} latent dimensions, which grow with the data; there are "
                f"{len(self.draws)}, unless num_draws asks for more. The ELBO, {self.elbo:.1f} "
                f"with standard error {self.elbo_standard_error:.1f}, is a lower bound on the log "
                "evidence: see whether longer fits and larger guides raise it."
            )
        if self.is_close:
            return (
                "The guide is close to the posterior, where it has mass: use its draws as they "
                "are. Only fits from other starts (pf.fit_restarts) can find modes it has missed."
            )
        if self.is_reliable:
            return (
                f"The guide is near the posterior (k-hat = {self.khat:.2f}): weighted answers and "
                "sample(..., resample=True) are reliable, plain draws are slightly off."
            )
        return (
            f"The guide misses part of the posterior (k-hat = {self.khat:.2f}, above 0.7): even "
            f"weighted answers are unreliable. {self.density.remedies}"
        )

    @torch.no_grad()
    def sample(self, num_samples: int, resample: bool = False, seed: int | None = None) -> dict:
        """Draw from the posterior.

        Parameters
        ----------
        num_samples
            Number of draws ``S``.
        resample
            Whether to draw from the guide's draws according to their smoothed importance weights,
            which corrects the guide where k-hat is below 0.7. The draws are then at least four
            times as many as ``num_samples``; resampled ones can repeat.
        seed
            Makes the draws reproducible; default: the global random state.

        Returns
        -------
        dict
            From site names, deterministic ones included, to tensors ``(S, *site_shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is less than 1, or there are no weights to resample by.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if resample:
            self._check_weights("sample without resample=True")
        with seeded(seed):
            return self.site_values(self._sample_unconstrained(num_samples, resample))

    def _sample_unconstrained(self, num_samples: int, resample: bool) -> Tensor:
        if not resample:
            return draw(self.density, num_samples)[0]
        z, log_p, log_q = weighted_draws(self.density, max(4 * num_samples, len(self.draws)))
        log_weights = (log_p - log_q).double().nan_to_num(nan=-math.inf, neginf=-math.inf)
        smoothed, _ = psis(log_weights)
        return z[torch.multinomial(smoothed.exp(), num_samples, replacement=True)]

    @torch.no_grad()
    def site_values(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained vectors ``(S, D)`` to values of all latent and deterministic sites."""
        values = self.density.constrain(z)
        return {**values, **self.density.deterministic(z)}

    @torch.no_grad()
    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the guide's log-density of site values ``(S, *site_shape)``, of shape ``(S,)``.

        Deterministic sites are ignored.

        Raises
        ------
        ValueError
            If a latent site is missing, or its values have the wrong shape or leave its support.
        """
        z, log_det = self.density.unconstrain(values)
        return self._posterior().log_prob(z) + log_det

    def loo(self, site: str | None = None) -> LOO:
        """Estimate how well each observation is predicted by all others, without further fits.

        The weights that leave an observation out also correct the guide, see
        :func:`pyroflows.diagnostics.loo`, which ``arviz.loo`` of plain draws does not do. Give
        ``result.loo().to_arviz()`` to ``arviz.compare``.

        Parameters
        ----------
        site
            The observed site. Default: the only one.

        Raises
        ------
        ValueError
            If there is no such site, its observations are not independent or scaled, or there are
            no weights.
        """
        self._check_weights("compare ELBOs, or the likelihood of data that were held out")
        values, dims = pointwise_log_likelihood(self.density, self.draws, site)
        return loo(values, without_nan(self.log_weights), dims)

    def to(self, device: torch.device | str) -> VariationalPosterior:
        """Move the guide, the model's arguments and the draws to a device; return the result."""
        density = self.density.to(device)
        tensors = (self.draws, self.log_p, self.log_q)
        return VariationalPosterior(density, self.losses, *(t.to(device) for t in tensors))

    def save(self, path: str | Path) -> None:
        """Write the result to a file; see :func:`pyroflows.load`.

        The file holds tensors and JSON (safetensors): loading it never executes code.

        Raises
        ------
        TypeError
            If the guide or the model's arguments cannot be written that way; an ``AmortizedFlow``
            cannot, but its ``state_dict()`` can.
        ValueError
            If ``path`` cannot be written.
        """
        write(path, self.density, {name: getattr(self, name) for name in STORED_TENSORS})

    def to_arviz(
        self,
        *,
        resample: bool = False,
        num_prior_draws: int = 1000,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        seed: int = 0,
    ) -> Any:
        """Convert to ArviZ.

        The draws are one chain of the group ``posterior``, with ``unconstrained_posterior``,
        ``sample_stats`` (``lp``, ``log_q``, ``log_weight``, ``log_weight_psis``),
        ``log_likelihood``, ``log_prior``, ``posterior_predictive``, ``prior``,
        ``prior_predictive``, ``observed_data`` and ``constant_data`` (arguments of the model that
        are not observed). Dimensions are named after plates. The verdict is in the attributes.

        Parameters
        ----------
        resample
            Whether to resample the draws by their smoothed importance weights; the weights, used
            up, are then equal.
        num_prior_draws
            Number of draws from the prior.
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions, for instance ``{"school": names}`` for a plate called ``school``.
        seed
            Makes the result reproducible.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.

        Examples
        --------
        >>> import pyro, pyro.distributions as dist, pyroflows as pf
        >>> def model(data):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("item", len(data)):
        ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
        >>> guide = pf.AutoRealNVP(model, num_layers=2)
        >>> result = pf.fit(model, guide, (torch.ones(3),), num_steps=10, progress=False)
        >>> result.to_arviz()["log_likelihood"]["x"].dims
        ('chain', 'draw', 'item')
        """
        if resample:
            self._check_weights("convert without resample=True")
        groups = weighted_groups(self, resample, num_prior_draws, seed)
        return assemble(self.density, groups, self.attributes(), dims, coords)

    def attributes(self) -> dict[str, Any]:
        """Return the verdict, and how it came about, as the attributes of an ArviZ object."""
        return {
            **self.scalars(),
            "pareto_k": self.khat,
            "verdict": self.verdict,
            "method": type(self.guide).__name__,
            "flow": str(getattr(self.guide, "flow", "")),
            "num_steps": len(self.losses),
            "inference_library": "pyroflows",
        }

    def _check_weights(self, instead: str) -> None:
        if not self.is_weighted:
            raise ValueError(
                f"importance weights take {self.min_weighted_draws} draws, got "
                f"{len(self.draws)}: fit with a larger num_draws, or {instead}"
            )

    def _posterior(self) -> torch.distributions.Distribution:
        return self.guide.get_posterior(*self.density.args, **self.density.kwargs)

    def __repr__(self) -> str:
        return (
            f"VariationalPosterior({type(self.guide).__name__}, D={self.draws.shape[-1]}, "
            f"elbo={self.elbo:.3f}, log_evidence={self.log_evidence:.3f}, khat={self.khat:.2f}, "
            f"ess={self.ess:.0f} of {len(self.draws)})"
        )


def load(path: str | Path, model: Callable) -> VariationalPosterior:
    """Read a result written by :meth:`VariationalPosterior.save`.

    The file holds no code and loading it runs none but the model's. Learned parameters of the
    model (``pyro.param``) are put back in place.

    Parameters
    ----------
    path
        The file.
    model
        The Pyro model the result belongs to.

    Raises
    ------
    ValueError
        If the file cannot be read, is not such a result, or belongs to another model.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf, tempfile
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> result = pf.fit(model, pf.AutoRealNVP(model, num_layers=2), num_steps=10, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result.save(f"{folder}/result.safetensors")
    ...     again = pf.load(f"{folder}/result.safetensors", model)
    >>> again.elbo == result.elbo
    True
    """
    density, tensors = read(path, model, STORED_TENSORS)
    return VariationalPosterior(density, *tensors)
