"""The loss of flow matching."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .ode import Field

VALIDATION_REPEATS = 4


def squared_error(velocity: Field, w: Tensor, time: Tensor, noise: Tensor) -> Tensor:
    r"""Return the squared error of a field on straight lines from noise to data, row by row.

    .. math:: \left\| v(t, (1 - t) \epsilon + t w) - (w - \epsilon) \right\|^2
    """
    between = torch.lerp(noise, w, time.unsqueeze(-1))
    return (velocity(time, between) - (w - noise)).square().sum(-1)


def standard_rate(time: Tensor) -> Tensor:
    """Return the field, over ``w``, whose flow leaves a normal variable as it is at both ends."""
    return (2 * time - 1) / (time.square() + (1 - time).square())


def frozen_noise(w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield times and noise that are the same at each validation, times evenly spread."""
    generator = torch.Generator().manual_seed(0)
    for i in range(VALIDATION_REPEATS):
        time = (torch.rand(len(w), generator=generator) + i) / VALIDATION_REPEATS
        noise = torch.randn(w.shape, generator=generator)
        yield time.to(w), noise.to(w)
