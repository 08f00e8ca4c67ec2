"""A posterior given one observation, corrected by the simulator's own density."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...diagnostics.loo import LOO, loo
from ...random_state import seeded
from ...svi.density import ModelDensity
from ...svi.export import log_densities, pointwise_log_likelihood
from ...svi.weighted_posterior import WeightedPosterior
from ..model.joint_density import JointDensity
from ..model.space import ParameterSpace
from .export import export_posterior, given


class CorrectedPosterior(WeightedPosterior):
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
    elbo, elbo_standard_error
        Mean of the log-weights: a lower bound on :math:`\log p(x)`, in nats.
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
        If weighted answers are unreliable: k-hat is 0.7 or more.

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
        super().__init__(draws, log_p.double(), log_q.double())
        self.space = space
        self.observed = dict(observed)
        self.about = dict(about)
        self.joint = joint
        if not self.is_reliable:
            warnings.warn(self.verdict, stacklevel=3)

    @property
    def verdict(self) -> str:
        """Say in words whether to trust the answer."""
        if self.is_close:
            return "The learned posterior is close to the true one: use its draws as they are."
        if self.is_reliable:
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
        return self.site_values(self.draws[self._resampled(num_samples, seed)])

    def site_values(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained vectors ``(S, D)`` to values of all sites."""
        return self.space.constrain(z)

    def _resampled(self, num_samples: int, seed: int | None) -> Tensor:
        with seeded(seed):
            weights = self.log_weights_psis.exp()
            return torch.multinomial(weights, num_samples, replacement=True)

    def loo(self, site: str | None = None) -> LOO:
        """Estimate how well each point of the observation is predicted by all others.

        The weights that leave a point out also correct the learned posterior, see
        :func:`pyroflows.diagnostics.loo`, which ``arviz.loo`` of plain draws does not do. Give
        ``corrected.loo().to_arviz()`` to ``arviz.compare``.

        Parameters
        ----------
        site
            The observed site. Default: the only one.

        Raises
        ------
        ValueError
            If the simulator is not known, there is no such site, or its points are not in a plate
            or scaled.
        """
        if self.joint is None:
            raise ValueError("the simulator of this posterior is not known: correct another")
        density, z = self._given(self.joint, self.draws)
        values, dims = pointwise_log_likelihood(density, z, site)
        return loo(values, self.log_weights, dims)

    def _given(self, joint: JointDensity, draws: Tensor) -> tuple[ModelDensity, Tensor]:
        """Return the density of the simulator given the observation, and draws as its vectors."""
        best = self.space.constrain(self.draws[self.log_weights.argmax()])
        density = given(joint, self.observed, best)
        return density, density.unconstrain(self.space.constrain(draws))[0]

    def to_arviz(
        self,
        *,
        resample: bool = False,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        seed: int | None = 0,
    ) -> Any:
        """Convert to ArviZ.

        The draws are one chain of the group ``posterior``, with their weights in ``sample_stats``,
        the observation in ``observed_data`` and, where the simulator is known, the log-densities of
        points of the observation in ``log_likelihood``, those of parameters in ``log_prior``, and
        other arguments of the model in ``constant_data``. The verdict is in the attributes.

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
        groups: dict[str, Mapping[str, Tensor]] = {
            "posterior": self.space.constrain(self.draws[index]),
            "sample_stats": {name: value[index] for name, value in stats.items()},
            "observed_data": self.observed,
        }
        if self.joint is not None:
            groups |= log_densities(*self._given(self.joint, self.draws[index]))
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
