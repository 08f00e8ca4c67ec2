"""Which noise flow matching joins to which parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Coupling: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

GROUP_SIZE = 128  # rows assigned at a time: the cost of an assignment grows as their cube
SMALLEST_SCALE = 1e-6  # of an entry of conditions: smaller ones are constant


def independent(noise: Tensor, w: Tensor, condition: Tensor) -> Tensor:
    """Return the noise as it came: any noise goes with any parameters."""
    return noise


def optimal_transport(
    noise: Tensor, w: Tensor, condition: Tensor, condition_weight: float
) -> Tensor:
    r"""Return the noise, reordered to be close to the parameters, given alike conditions.

    Each row of noise :math:`\epsilon_j` belongs to a condition :math:`c_j`, and the permutation
    :math:`\sigma` of each group of rows minimises

    .. math:: \sum_i \| w_i - \epsilon_{\sigma(i)} \|^2
        + \lambda \| c_i - c_{\sigma(i)} \|^2 ,

    with each entry of conditions in units of its standard deviation over the batch [1, 2]. With a
    large weight no row changes its place. With a weight of 0 noise depends on the condition, while
    draws start from noise that does not: they are wrong. Costs ``O(G^2 (D + C + G))`` a group, on
    the CPU.

    Parameters
    ----------
    noise, w
        Rows ``(N, D)``.
    condition
        Rows ``(N, C)``.
    condition_weight
        The weight :math:`\lambda`.

    References
    ----------
    [1] H. K. Cheng, A. Schwing. The curse of conditions: analyzing and improving optimal transport
        for conditional flow-based generation.
        `arXiv:2503.10636 <https://arxiv.org/abs/2503.10636>`_, 2025.
    [2] J. Chemseddine, P. Hagemann, G. Steidl, C. Wald. Conditional Wasserstein distances with
        applications in Bayesian OT flow matching.
        `arXiv:2403.18705 <https://arxiv.org/abs/2403.18705>`_, 2024.
    """
    scale = condition.double().std(0, correction=0).clamp(min=SMALLEST_SCALE)
    groups = zip(
        noise.double().split(GROUP_SIZE),
        w.double().split(GROUP_SIZE),
        (condition.double() / scale).split(GROUP_SIZE),
        strict=True,
    )
    return torch.cat([_assigned(*group, condition_weight) for group in groups]).to(noise)


def _assigned(noise: Tensor, w: Tensor, condition: Tensor, weight: float) -> Tensor:
    """Return the rows of noise in the order of least cost."""
    cost = torch.cdist(w, noise).square() + weight * torch.cdist(condition, condition).square()
    if not bool(cost.isfinite().all()):
        raise FloatingPointError("the summaries or the parameters are not finite")
    order = torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
    return noise[order.to(noise.device)]


def coupling_of(name: str, condition_weight: float) -> Coupling:
    """Return a coupling by its name.

    Raises
    ------
    ValueError
        If there is none of the name, or the weight is negative or not finite.
    """
    if not 0 <= condition_weight < float("inf"):
        raise ValueError(
            f"condition_weight must be finite and not negative, got {condition_weight}"
        )
    couplings: dict[str, Coupling] = {
        "independent": independent,
        "optimal_transport": partial(optimal_transport, condition_weight=condition_weight),
    }
    if name not in couplings:
        raise ValueError(f"coupling must be one of {[*couplings]}, got {name!r}")
    return couplings[name]
