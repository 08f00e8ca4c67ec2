"""Whether an observation is like those that were simulated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from scipy.stats import betabinom
from torch import Tensor, nn

from ..model.observations import ObservationSpace, Standardizer

NUM_REFERENCES = 1000
NUM_SCORES = 20_000
NUM_COMPONENTS = 32
NUM_NEIGHBOURS = 5
LEVEL = 1e-3  # of the warning: how often it is a false alarm
RESOLUTION = 1e-3  # features that vary less than this do not vary


class ObservationCheck(nn.Module):
    """Compare observations with simulated ones, see :class:`OutlierCheck`.

    The features are the entries of a vector, and which are missing; of a set they are means,
    standard deviations and numbers of what is there.

    Parameters
    ----------
    observations
        The observations, as the simulator gives them.

    Examples
    --------
    >>> check = ObservationCheck(ObservationSpace({"x": torch.Size([2])})).fit(torch.randn(5000, 2))
    >>> bool(check.p_value(torch.tensor([8.0, -8.0])) < 0.001)
    True
    """

    def __init__(self, observations: ObservationSpace) -> None:
        super().__init__()
        self.is_set = observations.is_set
        self.may_miss = observations.missing is not None
        size = observations.size
        num_kinds = 3 if self.is_set else 1 + self.may_miss
        self.standardizer = Standardizer(size)
        self.outliers = OutlierCheck(num_kinds * size)

    @torch.no_grad()
    def fit(self, x: Tensor) -> ObservationCheck:
        """Learn what is usual from simulated observations, ``(N, V)`` or ``(N, n, V)``."""
        self.standardizer.fit(x)
        self.outliers.fit(self._features(x))
        return self

    def p_value(self, x: Tensor) -> Tensor:
        """Return the p-values, shape ``(*batch,)``, of a batch of observations."""
        return self.outliers.p_value(self._features(x))

    def warn(self, x: Tensor) -> None:
        """Warn if some of these observations lie outside of the simulations."""
        self.outliers.warn(self._features(x))

    def _features(self, x: Tensor) -> Tensor:
        standard = self.standardizer(x)
        missing = standard.isnan()
        if self.is_set:
            mean = standard.nanmean(-2).nan_to_num()
            deviation = (standard - mean.unsqueeze(-2)).square().nanmean(-2).nan_to_num().sqrt()
            return torch.cat([mean, deviation, (~missing).sum(-2).to(x).log1p()], -1)
        parts = [standard.nan_to_num(), missing.to(x)] if self.may_miss else [standard]
        return torch.cat(parts, -1)


class OutlierCheck(nn.Module):
    r"""Compare observations with simulated ones by the distance to their nearest neighbours.

    A posterior knows nothing where nothing was simulated: a model that cannot produce an
    observation is misspecified, and its posterior arbitrary [1]. Features are whitened by the
    principal components of some simulations, the references; what lies off the first 32 components
    counts as one more. The score of an observation is its mean distance to the five nearest
    references. Its rank among the scores of other simulations is uniform if it comes from the
    model, whatever the features, so that

    .. math:: p = \frac{1 + \#\{ i : s_i \geq s \}}{M + 1}

    is an exact p-value [2].

    Parameters
    ----------
    dim
        Number of features ``F``.

    Notes
    -----
    Up to 1000 references and 20 000 scores are kept, also in files. An observation costs as much as
    a layer of 1000 units.

    References
    ----------
    [1] M. Schmitt, P.-C. Bürkner, U. Köthe, S. T. Radev. Detecting model misspecification in
        amortized Bayesian inference with neural networks.
        `arXiv:2112.08866 <https://arxiv.org/abs/2112.08866>`_, 2021.
    [2] S. Bates, E. Candès, L. Lei, Y. Romano, M. Sesia. Testing for outliers with conformal
        p-values. `arXiv:2104.08279 <https://arxiv.org/abs/2104.08279>`_, 2021.

    Examples
    --------
    >>> check = OutlierCheck(2).fit(torch.randn(5000, 2))
    >>> p_values = check.p_value(torch.tensor([[0.0, 1.0], [8.0, -8.0]]))
    >>> (p_values > 0.01).tolist()
    [True, False]
    """

    loc: Tensor
    axes: Tensor
    residual_scale: Tensor
    references: Tensor
    scores: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("axes", torch.zeros(dim, 0))
        self.register_buffer("residual_scale", torch.ones(()))
        self.register_buffer("references", torch.zeros(0, 1))
        self.register_buffer("scores", torch.zeros(0))

    @torch.no_grad()
    def fit(self, features: Tensor) -> OutlierCheck:
        """Learn what is usual from features of simulated observations, shape ``(N, F)``."""
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        rows = features.index_select(0, order[: NUM_REFERENCES + NUM_SCORES].to(features.device))
        num_references = min(NUM_REFERENCES, len(rows) // 2)
        references, others = rows[:num_references], rows[num_references:]
        self._fit_axes(references)
        self.references = self._whiten(references)
        self.scores = self._score(others).sort().values
        return self

    @torch.no_grad()
    def p_value(self, features: Tensor) -> Tensor:
        """Return the p-values, shape ``(*batch,)``, of features ``(*batch, F)``.

        Small if an observation lies farther from the simulations than they do from each other;
        1 before any fit.
        """
        scores = self._score(features.reshape(-1, features.shape[-1]))
        num_larger = len(self.scores) - torch.searchsorted(self.scores, scores)
        return ((1 + num_larger) / (1 + len(self.scores))).reshape(features.shape[:-1])

    def warn(self, features: Tensor) -> None:
        """Warn if some of these observations lie outside of the simulations.

        For observations from the model, one call in 1000 warns, whatever their number; with fewer
        than 1000 simulations, one in as many as there are, less the references.
        """
        p_values, total = self.p_value(features), features.shape[:-1].numel()
        allowed = max(1, int(LEVEL * (len(self.scores) + 1)))
        level = allowed / (len(self.scores) + 1)
        num_outside = int((p_values <= level).sum())
        # The share of the model's observations beyond a score is itself uncertain.
        chance = betabinom.sf(num_outside - 1, total, allowed, len(self.scores) + 1 - allowed)
        if len(self.scores) and num_outside and chance <= level * (1 + 1e-9):
            what = "the observation lies" if total == 1 else f"{num_outside} of {total} lie"
            warnings.warn(
                f"{what} outside of what was simulated (p = {p_values.min().item():.2g}): the "
                "posterior is a guess there; check the model, or its prior, against the data",
                stacklevel=4,
            )

    def _fit_axes(self, rows: Tensor) -> None:
        """Find the principal components and their scales."""
        self.loc.copy_(rows.mean(0))
        centred = (rows - self.loc).double()
        _, deviations, axes = torch.linalg.svd(centred, full_matrices=False)
        deviations = deviations / max(1, len(rows)) ** 0.5
        kept = int((deviations[:NUM_COMPONENTS] > RESOLUTION).sum())
        self.axes = (axes[:kept].T / deviations[:kept]).to(rows.dtype)
        residuals = self._residual(rows - self.loc)
        self.residual_scale.copy_(residuals.square().mean().sqrt().clamp(min=RESOLUTION))

    def _residual(self, centred: Tensor) -> Tensor:
        """Return the distance from the space of the components."""
        directions = nn.functional.normalize(self.axes, dim=0)
        return torch.linalg.vector_norm(centred - centred @ directions @ directions.T, dim=-1)

    def _whiten(self, features: Tensor) -> Tensor:
        centred = features - self.loc
        residual = self._residual(centred) / self.residual_scale
        return torch.cat([centred @ self.axes, residual.unsqueeze(-1)], -1)

    def _score(self, features: Tensor) -> Tensor:
        if not len(self.references):
            return features.new_zeros(len(features))
        whitened, nearest = self._whiten(features), min(NUM_NEIGHBOURS, len(self.references))
        return torch.cat(
            [
                torch.cdist(part, self.references).topk(nearest, largest=False).values.mean(-1)
                for part in whitened.split(NUM_REFERENCES)
            ]
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any
    ) -> None:
        """Make room for what is read, the size of which depends on the simulations."""
        for name, buffer in self.named_buffers():
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, buffer.new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
