"""More pairs to learn from, drawn from a likelihood learned from those that are there."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...distributions.maximum_likelihood import DensityFit
from ...random_state import seeded
from ..model.observations import ObservationSpace
from ..model.simulations import Simulations
from ..posteriors.likelihood_model import LikelihoodModel

NUM_PAIRS = 300_000
MAX_ENTRIES = 5_000_000  # of observations, in all pairs together
MAX_SIZE = 64  # entries of an observation whose likelihood is worth learning
CHUNK = 4096  # observations at a time: what fits in the caches is several times faster
MEMORY_SHARE = 0.1  # of the steps: training that gets no better for longer has memorised its data


def can_augment(observations: ObservationSpace, simulations: Simulations) -> bool:
    """Tell whether the density of an observation can be learned: it is small and complete.

    Where simulations were left out as invalid, pairs from the whole prior would bring back
    parameters that never gave an observation.
    """
    return (
        simulations.num_invalid == 0
        and len(observations.names) == 1
        and observations.size <= MAX_SIZE
        and observations.missing is None
    )


def steps_to_wait(num_steps: int) -> int:
    """Return after how many steps without getting better training has memorised its data."""
    return max(1, round(MEMORY_SHARE * num_steps))


def has_memorised(fit: DensityFit, num_steps: int) -> bool:
    """Tell whether training was best long before its end: it wants more data."""
    return not fit.interrupted and num_steps - fit.best_step > steps_to_wait(num_steps)


@torch.no_grad()
def draw_pairs(model: LikelihoodModel, shape: torch.Size, seed: int) -> tuple[Tensor, Tensor]:
    """Draw parameters from the prior, and observations from the learned likelihood.

    The simulator is left as soon as it has drawn its parameters: pairs cost next to nothing.

    Parameters
    ----------
    model
        The simulator with a learned likelihood.
    shape
        Shape of an observation as a tensor.
    seed
        Determines the pairs.

    Returns
    -------
    Tensor, Tensor
        Unconstrained parameters ``(N, D)`` and observations ``(N, *shape)``.
    """
    size = model.observations.size  # of what is independent given the parameters
    num_rows = shape.numel() // size
    num_pairs = max(1, min(NUM_PAIRS, MAX_ENTRIES // shape.numel()))
    like = next(model.flow.parameters())
    z = model.prior_draws(num_pairs, seed).to(like.dtype)
    with seeded(seed):
        parts = [
            model.flow.condition(rows).sample()
            for rows in z.to(like).repeat_interleave(num_rows, 0).split(CHUNK)
        ]
    x = torch.cat(parts).to(z).reshape(len(z), *shape)
    finite = x.flatten(1).isfinite().all(1)
    return z[finite], x[finite]


def warn_of_failure(reason: object) -> None:
    """Say that the posterior has to do without more pairs."""
    warnings.warn(
        f"the posterior is learned from the simulations alone, without pairs from a learned "
        f"likelihood: {reason}",
        stacklevel=4,
    )
