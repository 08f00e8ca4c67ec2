"""What importance weights say about the draws that carry them, and about where these came from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pandas as pd
import torch
from torch import Tensor

from ..diagnostics import effective_sample_size, log_evidence, psis
from ..diagnostics.frames import frame
from .summary import describe
from .weighting import without_nan

KHAT_GOOD, KHAT_USABLE = 0.5, 0.7
# Weights that are nearly equal: the share of the draws that they are worth, and the largest one
# relative to their average.
EQUAL_SHARE, EQUAL_LARGEST = 0.99, 2.0


class WeightedPosterior(ABC):
    r"""Hold draws from an approximate posterior, and what their importance weights say of it.

    The draws :math:`z_s` come from the approximation :math:`q` and have the weights
    :math:`w_s = p(z_s, y) / q(z_s)`.

    Parameters
    ----------
    draws
        Unconstrained draws, shape ``(S, D)``.
    log_p, log_q
        Log-density of the draws under the model (up to the evidence) and the approximation, shape
        ``(S,)``. Where the former is NaN, it counts as zero density.
    min_weighted_draws
        With fewer draws, all that rests on weights is NaN.

    Attributes
    ----------
    log_weights
        ``log_p - log_q``.
    log_weights_psis
        The same smoothed and normalised, in double precision.
    elbo, elbo_standard_error
        Mean of the log-weights: a lower bound on the log evidence, in nats.
    khat
        Tail index of the weights: below 0.5 the approximation is close to the posterior, up to 0.7
        weighted answers are reliable, above they are not.
    ess
        Effective number of the weighted draws.
    log_evidence, log_evidence_standard_error
        Estimate of the log evidence by importance sampling, in nats.
    """

    def __init__(
        self, draws: Tensor, log_p: Tensor, log_q: Tensor, min_weighted_draws: int = 0
    ) -> None:
        self.draws = draws
        self.log_p = log_p
        self.log_q = log_q
        self.log_weights = log_p - log_q
        self.min_weighted_draws = min_weighted_draws
        self._assess()

    def _assess(self) -> None:
        weights = without_nan(self.log_weights).double()
        self.elbo = weights.mean().item()
        self.elbo_standard_error = (weights.std() / len(weights) ** 0.5).item()
        if not self.is_weighted:
            self.log_weights_psis = torch.full_like(weights, math.nan)
            self.khat = self.ess = self._largest_log_weight = math.nan
            self.log_evidence = self.log_evidence_standard_error = math.nan
            return
        smoothed, self.khat = psis(without_nan(self.log_weights))
        self.log_weights_psis = smoothed.double()
        self.ess = effective_sample_size(self.log_weights_psis)
        self.log_evidence, self.log_evidence_standard_error = log_evidence(weights)
        self._largest_log_weight = weights.max().item() - self.log_evidence

    @property
    @abstractmethod
    def verdict(self) -> str:
        """Say in words whether to trust the answer, and what to do if not."""

    @abstractmethod
    def site_values(self, z: Tensor) -> dict[str, Tensor]:
        """Map unconstrained vectors ``(S, D)`` to values of all sites."""

    @property
    def is_weighted(self) -> bool:
        """Tell whether the draws are enough for importance weights, and what rests on these."""
        return len(self.draws) >= self.min_weighted_draws

    @property
    def is_close(self) -> bool:
        """Tell whether the draws can be used as they are."""
        return self.khat < KHAT_GOOD or self._has_equal_weights

    @property
    def is_reliable(self) -> bool:
        """Tell whether weighted answers can be trusted."""
        return self.khat < KHAT_USABLE or self._has_equal_weights

    @property
    def _has_equal_weights(self) -> bool:
        # The shape of a tail says nothing where it has no weight: of fits that were exact but for
        # one part in a thousand, k-hat went up to 6, and a million draws had no larger weight than
        # 3.3 times the average.
        has_tail = self._largest_log_weight >= math.log(EQUAL_LARGEST)
        return not has_tail and self.ess > EQUAL_SHARE * len(self.draws)

    def summary(self) -> pd.DataFrame:
        """Tabulate each latent number: the answer of the draws and the importance-weighted one.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: mean, standard deviation and the 5 %, 50 % and 95 %
            quantiles of the draws, then the mean and standard deviation of the weighted draws. The
            verdict is in ``attrs``.
        """
        table = describe(self.site_values(self.draws), self.log_weights_psis.exp())
        table.attrs.update(self.scalars(), verdict=self.verdict)
        return table

    def to_frame(self) -> pd.DataFrame:
        """Return the draws as a table, a row each, with their smoothed log-weights."""
        values = self.site_values(self.draws)
        return frame({**values, "log_weight_psis": self.log_weights_psis})

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
