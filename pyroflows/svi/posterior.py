"""What variational inference returns: draws, densities and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from ..diagnostics import effective_sample_size, log_evidence, psis
from ..distributions import Flow
from .density import ModelDensity

if TYPE_CHECKING:
    import arviz as az

CHUNK = 2000  # draws evaluated at once
KHAT_GOOD, KHAT_USABLE = 0.5, 0.7


class VariationalPosterior:
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
    """

    def __init__(
        self,
        density: ModelDensity,
        losses: Tensor,
        draws: Tensor,
        log_p: Tensor,
        log_q: Tensor,
    ) -> None:
        self.density = density
        self.losses = losses
        self.draws = draws
        self.log_p = log_p
        self.log_q = log_q
        self.log_weights = log_p - log_q
        self._assess()

    @classmethod
    def from_guide(
        cls, density: ModelDensity, losses: Tensor, num_draws: int, seed: int = 0
    ) -> VariationalPosterior:
        """Draw from a fitted guide and weight the draws against the model."""
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)  # not the noise the guide was fitted on
            return cls(density, losses, *weighted_draws(density, num_draws))

    def _assess(self) -> None:
        weights = self.log_weights.double()
        # A draw where the model's density is NaN counts as one of density zero.
        weights = weights.nan_to_num(nan=-math.inf, posinf=math.inf)
        self.elbo = weights.mean().item()
        self.elbo_standard_error = (weights.std() / len(weights) ** 0.5).item()
        self.log_weights_psis, self.khat = psis(weights)
        self.ess = effective_sample_size(self.log_weights_psis)
        self.log_evidence, self.log_evidence_standard_error = log_evidence(weights)

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
        """Say in words whether to trust the answer."""
        if self.khat < KHAT_GOOD:
            return "The guide is close to the posterior: use its draws as they are."
        if self.khat < KHAT_USABLE:
            return (
                "The guide is near the posterior: weighted answers and sample(..., resample=True) "
                "are reliable, plain draws are slightly off."
            )
        return (
            "The guide misses part of the posterior (k-hat >= 0.7): even weighted answers are "
            "unreliable. Try a larger flow (num_layers, hidden_dims), more steps, or a "
            "reparametrised model."
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
            If ``num_samples`` is less than 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return self.site_values(self._sample_unconstrained(num_samples, resample))

    def _sample_unconstrained(self, num_samples: int, resample: bool) -> Tensor:
        if not resample:
            return _draw(self.density, num_samples)[0]
        z, log_p, log_q = weighted_draws(self.density, max(4 * num_samples, len(self.draws)))
        weights = psis((log_p - log_q).double().nan_to_num(nan=-math.inf))[0].exp()
        return z[torch.multinomial(weights, num_samples, replacement=True)]

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

    def summary(self) -> pd.DataFrame:
        """Tabulate each latent number: the guide's answer and the importance-weighted one.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: mean, standard deviation and the 5 %, 50 % and 95 %
            quantiles of the guide's draws, then the mean and standard deviation of the weighted
            draws. The verdict is in ``attrs``.
        """
        weights = self.log_weights_psis.exp()
        rows = {}
        for name, value in self.site_values(self.draws).items():
            flat = value.double().reshape(len(value), -1)
            for i, index in enumerate(_indices(value.shape[1:])):
                rows[name + index] = _describe(flat[:, i], weights)
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.attrs.update(self.scalars(), verdict=self.verdict)
        return table

    def scalars(self) -> dict[str, float]:
        """Return the numbers of the verdict."""
        return {
            "elbo": self.elbo,
            "elbo_standard_error": self.elbo_standard_error,
            "khat": self.khat,
            "ess": self.ess,
            "log_evidence": self.log_evidence,
            "log_evidence_standard_error": self.log_evidence_standard_error,
        }

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
            If the guide or the model's arguments cannot be written that way.
        ValueError
            If ``path`` cannot be written.
        """
        from .storage import save

        save(self, path)

    def to_arviz(self, **options: Any) -> az.InferenceData:
        """Convert to ArviZ, see :func:`pyroflows.to_arviz`."""
        from .export import to_arviz

        return to_arviz(self, **options)

    def _posterior(self) -> torch.distributions.Distribution:
        return self.guide.get_posterior(*self.density.args, **self.density.kwargs)

    def __repr__(self) -> str:
        return (
            f"VariationalPosterior({type(self.guide).__name__}, D={self.draws.shape[-1]}, "
            f"elbo={self.elbo:.3f}, log_evidence={self.log_evidence:.3f}, khat={self.khat:.2f}, "
            f"ess={self.ess:.0f} of {len(self.draws)})"
        )


@torch.no_grad()
def weighted_draws(density: ModelDensity, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return draws ``(S, D)`` from the guide and their log-densities under model and guide."""
    parts = []
    for start in range(0, num_draws, CHUNK):
        z, log_q = _draw(density, min(CHUNK, num_draws - start))
        parts.append((z, density(z), log_q))
    z, log_p, log_q = (torch.cat(part) for part in zip(*parts, strict=True))
    return z, log_p, log_q


def _draw(density: ModelDensity, num_draws: int) -> tuple[Tensor, Tensor]:
    posterior = density.guide.get_posterior(*density.args, **density.kwargs)
    if isinstance(posterior, Flow):
        return posterior.rsample_and_log_prob((num_draws,))
    z = posterior.sample((num_draws,))
    return z, posterior.log_prob(z)


def _indices(shape: torch.Size) -> list[str]:
    if not shape:
        return [""]
    grid = torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape))
    return [f"[{', '.join(map(str, index))}]" for index in grid.tolist()]


def _describe(draws: Tensor, weights: Tensor) -> dict[str, float]:
    q05, q50, q95 = draws.quantile(draws.new_tensor([0.05, 0.5, 0.95])).tolist()
    weighted_mean = weights @ draws
    weighted_sd = (weights @ (draws - weighted_mean).square()).sqrt()
    return {
        "mean": draws.mean().item(),
        "sd": draws.std().item(),
        "q05": q05,
        "median": q50,
        "q95": q95,
        "weighted_mean": weighted_mean.item(),
        "weighted_sd": weighted_sd.item(),
    }
