"""What all densities of parameters given observations have in common."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.embedding import SetEmbedding
from .observations import ObservationSpace, Standardizer
from .preconditioner import LinearGaussian

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
        A module that summarises a standardised observation, of which a copy is trained. Default:
        the observation itself, or a :class:`SetEmbedding` for sets.
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
        size = observations.size
        self.standardizer = Standardizer(size)
        default = SetEmbedding(size, SET_EMBEDDING_DIM) if self.is_set else nn.Identity()
        self.embedding = default if embedding is None else copy.deepcopy(embedding)
        self.linear = LinearGaussian(dim, 2 * size + 1 if self.is_set else size)

    @torch.no_grad()
    def prepare(self, z: Tensor, x: Any) -> None:
        """Read scales and the regression from simulated pairs."""
        self.standardizer.fit(x)
        self.linear.fit(z, self.features(self.standardizer(x)))

    @property
    def context_dim(self) -> int:
        """Return the size of the summary of an observation."""
        example = next(self.standardizer.buffers()).new_zeros(1, 1, self.standardizer.loc.shape[0])
        with torch.no_grad():
            return self.embedding(example if self.is_set else example[0]).shape[-1]

    def features(self, x: Tensor) -> Tensor:
        """Return what the regression sees of standardised observations."""
        if not self.is_set:
            return x
        deviation = x.std(-2, unbiased=False)
        log_size = torch.full_like(x[..., 0, :1], x.shape[-2]).log()
        return torch.cat([x.mean(-2), deviation, log_size], -1)

    def score(self, z: Tensor, x: Tensor) -> Tensor:
        """Return what training maximises the mean of, one number a row."""
        raise NotImplementedError

    def sample(self, num_samples: int, x: Tensor) -> Tensor:
        """Return draws of ``z``, ``(num_samples, *batch, D)``, given ``x``, ``(*batch, ...)``."""
        raise NotImplementedError

    def log_prob(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the log-density of ``z`` given ``x``."""
        raise NotImplementedError
