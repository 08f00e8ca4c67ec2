"""What all densities of parameters given observations have in common."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.embedding import MarkMissing, SetEmbedding
from ..model.masking import Masking
from ..model.observations import ObservationSpace, Standardizer
from .outliers import ObservationCheck
from .preconditioner import LinearGaussian
from .subset_gaussian import MAX_SIZE, SubsetGaussian

SET_EMBEDDING_DIM = 64


class ConditionalDensity(nn.Module):
    """Model unconstrained parameters given an observation, both as tensors.

    Holds what comes before any flow: the scales of the observations, their summary, and the linear
    regression whose residual ``w`` the flow has to model.

    Parameters
    ----------
    dim
        Size of the parameter vector ``z``.
    observations
        The observations, as the simulator gives them.
    embedding
        A module that summarises a standardised observation, NaN where entries are missing, of which
        a copy is trained. Default: the observation itself, with marks of what is missing, or a
        :class:`SetEmbedding` for sets.
    """

    def __init__(
        self,
        dim: int,
        observations: ObservationSpace,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.is_set = observations.is_set
        self.event_dim = observations.event_dim
        self.may_miss = observations.missing is not None
        self.varies = observations.sizes is not None and len({*observations.sizes}) > 1
        size = observations.size
        self.check = ObservationCheck(observations)
        self.standardizer = Standardizer(size)
        self.embedding = self._embedding(size) if embedding is None else copy.deepcopy(embedding)
        self.masking = Masking(observations)
        self.takes_subsets = (
            observations.missing == "random" and not self.is_set and size <= MAX_SIZE
        )
        self.linear = self._linear(size)

    def _linear(self, size: int) -> LinearGaussian | SubsetGaussian:
        if self.takes_subsets:
            return SubsetGaussian(self.dim, size)
        example = torch.zeros(1, size) if self.is_set else torch.zeros(size)
        num_scaling = self._availability(example).shape[-1]
        return LinearGaussian(self.dim, self.features(example).shape[-1], num_scaling)

    def _embedding(self, size: int) -> nn.Module:
        if self.is_set:
            return SetEmbedding(size, SET_EMBEDDING_DIM)
        return MarkMissing() if self.may_miss else nn.Identity()

    @torch.no_grad()
    def prepare(self, z: Tensor, x: Any) -> None:
        """Read scales and the regression from simulated pairs."""
        seen = self.masking.frozen(x, seed=0)
        self.check.fit(seen)
        self.standardizer.fit(x)
        self.linear.fit(z, self.features(self.standardizer(x if self.takes_subsets else seen)))

    def begin(self, z: Tensor, x: Any, num_steps: int, seed: int, progress: bool) -> None:
        """Learn what comes before the training, in about a quarter of its steps: here nothing."""

    @property
    def context_dim(self) -> int:
        """Return the size of the summary of an observation."""
        example = next(self.standardizer.buffers()).new_zeros(1, 1, self.standardizer.loc.shape[0])
        with torch.no_grad(), _evaluating(self.embedding):
            return self.embedding(example if self.is_set else example[0]).shape[-1]

    def features(self, x: Tensor) -> Tensor:
        """Return what the regression sees of standardised observations; last, how much there is."""
        if self.takes_subsets:
            return x
        availability = self._availability(x)
        if not self.is_set:
            return torch.cat([x.nan_to_num(), availability], -1)
        mean = x.nanmean(-2)
        deviation = (x - mean.unsqueeze(-2)).square().nanmean(-2).sqrt().nan_to_num()
        shrunk = mean.nan_to_num().unsqueeze(-2) * self._shrinkage(availability)
        return torch.cat([shrunk.flatten(-2), deviation, availability], -1)

    def _availability(self, x: Tensor) -> Tensor:
        """Return which entries are missing, or how many are there in a set, if that varies."""
        missing = x.isnan()
        if not self.is_set:
            return missing.to(x) if self.may_miss else x[..., :0]
        counts = (~missing).sum(-2).to(x).log1p()
        if self.may_miss:
            return counts
        return counts[..., :1] if self.varies else counts[..., :0]

    def _shrinkage(self, log_counts: Tensor) -> Tensor:
        """Return factors of means, functions of counts that together shrink as posteriors do."""
        if log_counts.shape[-1] == 0:
            return log_counts.new_ones(1, 1)
        return torch.stack([(-power * log_counts).exp() for power in (0.0, 0.5, 1.0, 2.0)], -2)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return what training maximises the mean of, one number a row."""
        raise NotImplementedError

    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        """Return draws of ``z``, ``(num_samples, *batch, D)``, given ``x``, ``(*batch, ...)``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the log-density of ``z`` given ``x``."""
        raise NotImplementedError


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Have no statistics of batches in a ``with`` block, and all modes as they were after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
