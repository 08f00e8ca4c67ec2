"""A posterior given one observation, corrected by the simulator's own density."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...diagnostics import effective_sample_size, log_evidence, psis
from ...diagnostics.frames import frame
from ...random_state import seeded
from ...svi.summary import describe
from ..model.joint_density import JointDensity
from ..model.space import ParameterSpace
from .export import export_posterior

KHAT_GOOD, KHAT_USABLE = 0.5, 0.7


class CorrectedPosterior:
    r"""Hold weighted draws given one observation; what :meth:`Posterior.correct` returns.

    The draws come from the learned posterior :math:`q(z \mid x)` and carry importance weights
    :math:`w_s = p(x, z_s) / q(z_s \mid x)` [1], smoothed where their tail is heavy [2].

    Attributes
    ----------
    draws
        Unconstrained draws, shape ``(S, D)``.
    log_p, log_q
        Their log-densities: jointly with the observation under the simulator, and under the
        learned posterior, shape ``(S,)``.
    log_weights
        ``log_p - log_q``.
    log_weights_psis
        The same smoothed, and normalised.
    khat
        Tail index of the weights: below 0.5 the learned posterior is close to the true one, up to
        0.7 weighted answers are reliable, above they are not.
    ess
        Effective number of the weighted draws.
    log_evidence, log_evidence_standard_error
        Estimate of :math:`\log p(x)`, in nats.

    Warns
    -----
    UserWarning
        If k-hat is 0.7 or more.

    References
    ----------
    [1] M. Dax, S. R. Green, J. Gair, M. Puerrer, J. Wildberger, J. H. Macke, A. Buonanno,
        B. Schoelkopf. Neural importance sampling for rapid and reliable gravitational-wave
        inference. `arXiv:2210.05686 <https://arxiv.org/abs/2210.05686>`_, 2022.
    [2] A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry. Pareto smoothed importance sampling.
        `arXiv:1507.02646 <https://arxiv.org/abs/1507.02646>`_, 2015.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0))
    >>> estimator = pf.sbi.FlowMatching(simulator)
    >>> posterior = estimator.fit(num_simulations=2000, num_steps=50, progress=False)
    >>> corrected = posterior.correct(x=torch.tensor(1.0))
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).item()
    >>> abs(corrected.log_evidence - exact) < 0.1
    True
    """

    def __init__(
        self,
        space: ParameterSpace,
        draws: Tensor,
        log_p: Tensor,
        log_q: Tensor,
        observed: Mapping[str, Tensor],
        about: Mapping[str, Any],
        joint: JointDensity | None = None,
    ) -> None:
        self.space = space
        self.draws = draws
        self.log_p = log_p
        self.log_q = log_q
        self.observed = dict(observed)
        self.about = dict(about)
        self.joint = joint
        self.log_weights = log_p.double() - log_q.double()
        self.log_weights_psis, self.khat = psis(self.log_weights)
        self.ess = effective_sample_size(self.log_weights_psis)
        self.log_evidence, self.log_evidence_standard_error = log_evidence(self.log_weights)
        if self.khat >= KHAT_USABLE:
            warnings.warn(self.verdict, stacklevel=3)

    @property
    def verdict(self) -> str:
        """Say in words whether to trust the answer."""
        if self.khat < KHAT_GOOD:
            return "The learned posterior is close to the true one: use its draws as they are."
        if self.khat < KHAT_USABLE:
            return (
                "The learned posterior is near the true one: weighted answers and sample(...) are "
                "reliable, plain draws are slightly off."
            )
        return (
            f"The learned posterior misses part of the true one (k-hat {self.khat:.2f} >= 0.7): "
            "even weighted answers are unreliable. Train on more simulations, or refine it for "
            "this observation."
        )

    def sample(self, num_samples: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """Draw from the weighted draws, with replacement.

        Parameters
        ----------
        num_samples
            Number of draws ``S``; many more than ``ess`` are repetitions.
        seed
            Makes the draws reproducible.

        Returns
        -------
        dict
            From sites to draws ``(S, *shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is below 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        return self.space.constrain(self.draws[self._resampled(num_samples, seed)])

    def _resampled(self, num_samples: int, seed: int | None) -> Tensor:
        with seeded(seed):
            weights = self.log_weights_psis.exp()
            return torch.multinomial(weights, num_samples, replacement=True)

    def summary(self) -> pd.DataFrame:
        """Tabulate each parameter: the learned answer and the importance-weighted one.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: mean, standard deviation and the 5 %, 50 % and 95 %
            quantiles of the learned posterior, then mean and standard deviation of the weighted
            draws. The verdict is in ``attrs``.
        """
        table = describe(self.space.constrain(self.draws), self.log_weights_psis.exp())
        table.attrs.update(self.scalars(), verdict=self.verdict)
        return table

    def scalars(self) -> dict[str, float]:
        """Return the numbers of the verdict."""
        return {
            "khat": self.khat,
            "ess": self.ess,
            "log_evidence": self.log_evidence,
            "log_evidence_standard_error": self.log_evidence_standard_error,
        }

    def to_frame(self) -> pd.DataFrame:
        """Return the learned draws as a table, a row each, with their smoothed log-weights."""
        values = self.space.constrain(self.draws)
        return frame({**values, "log_weight_psis": self.log_weights_psis})

    def to_arviz(
        self,
        *,
        resample: bool = False,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        seed: int | None = 0,
    ) -> Any:
        """Convert to ArviZ: draws, weights and the observation, the verdict in the attributes.

        Parameters
        ----------
        resample
            Whether to resample the draws by their weights; the weights, used up, are then equal.
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions.
        seed
            Makes the resampling reproducible.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        size = len(self.draws)
        index = self._resampled(size, seed) if resample else torch.arange(size)
        stats = {
            "lp": self.log_p,
            "log_q": self.log_q,
            "log_weight": self.log_weights,
            "log_weight_psis": self.log_weights_psis,
        }
        if resample:
            stats["log_weight"] = torch.zeros_like(self.log_weights)
            stats["log_weight_psis"] = torch.full_like(self.log_weights, -math.log(size))
        groups = {
            "posterior": self.space.constrain(self.draws[index]),
            "sample_stats": {name: value[index] for name, value in stats.items()},
            "observed_data": self.observed,
        }
        about = {
            **self.about,
            **self.scalars(),
            "pareto_k": self.khat,
            "verdict": self.verdict,
        }
        return export_posterior(groups, about, self.joint, dims=dims, coords=coords)

    def __repr__(self) -> str:
        return (
            f"CorrectedPosterior(D={self.draws.shape[-1]}, log_evidence={self.log_evidence:.3f}, "
            f"khat={self.khat:.2f}, ess={self.ess:.0f} of {len(self.draws)})"
        )
