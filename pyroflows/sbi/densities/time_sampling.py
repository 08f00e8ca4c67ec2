"""The times at which flow matching trains its velocity field."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

TimeSampling: TypeAlias = Callable[[Tensor], Tensor]

EXPONENT = 1.0  # of the density of times in the power law


def uniform(like: Tensor) -> Tensor:
    """Draw times that favour none."""
    return torch.rand_like(like)


def power(like: Tensor) -> Tensor:
    r"""Draw times of density :math:`(1 + \alpha) t^\alpha`, here ``2 t``: late ones, near the data.

    They are :math:`u^{1 / (1 + \alpha)}` of uniform ``u`` [1].

    References
    ----------
    [1] J. Wildberger, M. Dax, S. Buchholz, S. R. Green, J. H. Macke, B. Schölkopf. Flow matching
        for scalable simulation-based inference.
        `arXiv:2305.17161 <https://arxiv.org/abs/2305.17161>`_, 2023.
    """
    return torch.rand_like(like) ** (1 / (1 + EXPONENT))


def logit_normal(like: Tensor) -> Tensor:
    """Draw times whose logits are standard normal: middle ones, where noise and data mix [1].

    References
    ----------
    [1] P. Esser et al. Scaling rectified flow transformers for high-resolution image synthesis.
        `arXiv:2403.03206 <https://arxiv.org/abs/2403.03206>`_, 2024.
    """
    return torch.randn_like(like).sigmoid()


TIME_SAMPLINGS: dict[str, TimeSampling] = {
    "uniform": uniform,
    "power": power,
    "logit_normal": logit_normal,
}
