"""Expected coverage: how often credible regions hold the true parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroflows.diagnostics.checks import check_tensor
from pyroflows.diagnostics.ecdf import RankECDF, check_ranks, rank_ecdf, uniformity_p_values
from pyroflows.diagnostics.export import to_arviz
from pyroflows.diagnostics.sbc import ranks


@dataclass(frozen=True, eq=False, repr=False)
class Coverage:
    r"""Hold how large credible regions must be to hold the true parameters, and test it.

    Attributes
    ----------
    ranks : Tensor, shape (N,)
        How many draws lie inside the smallest region that reaches the truth, in N replicates.
        Uniform on 0 to ``num_draws`` if the posterior is calibrated.
    num_draws : int
        Posterior draws in each replicate.

    Examples
    --------
    >>> import torch
    >>> Coverage(torch.arange(101), 100).passes()
    True
    >>> Coverage(torch.arange(101) // 2, 100).passes()  # regions are too large
    False
    """

    ranks: Tensor
    num_draws: int

    def __post_init__(self) -> None:
        check_ranks(self.ranks, self.num_draws)
        if self.ranks.ndim != 1:
            raise ValueError(f"ranks must have shape (N,), got {tuple(self.ranks.shape)}")

    @property
    def pit(self) -> Tensor:
        """Return the credibility at which a region reaches the truth, shape (N,)."""
        return (self.ranks.double() + 0.5) / (self.num_draws + 1)

    @property
    def levels(self) -> Tensor:
        """Return the credibilities of the curve, shape (K,)."""
        return self.ecdf.levels

    @property
    def curve(self) -> Tensor:
        """Return the share of truths that the regions of each credibility hold, shape (K,)."""
        return self.levels + self.ecdf.difference

    @cached_property
    def ecdf(self) -> RankECDF:
        """Return the curve minus the diagonal, with simultaneous 95 % binomial bands."""
        return rank_ecdf(self.ranks, self.num_draws)

    @cached_property
    def p_value(self) -> float:
        """Return the exact p-value of the simultaneous bands for a calibrated posterior."""
        return uniformity_p_values(self.ranks, self.num_draws).item()

    def passes(self, alpha: float = 0.01) -> bool:
        """Say whether calibration is not rejected, with false alarms in a share of ``alpha``."""
        return self.p_value >= alpha

    @property
    def area(self) -> float:
        r"""Return the area between curve and diagonal, :math:`\int_0^1 |C(a) - a| \, da`."""
        levels = torch.cat([torch.zeros(1), self.levels, torch.ones(1)])
        distance = F.pad(self.ecdf.difference.abs(), (1, 1))
        return torch.trapezoid(distance, levels).item()

    @property
    def atc(self) -> float:
        r"""Return the signed area at high credibility, :math:`\int_{1/2}^1 (C(a) - a) \, da`.

        Positive if the posterior is too wide, negative if it is too narrow.
        """
        # The integral of a step at u over that range is 1 - max(u, 1/2); that of a is 3/8.
        return 5 / 8 - self.pit.clamp(min=0.5).mean().item()

    def to_arviz(self) -> Any:
        """Return ranks and their PIT values as ArviZ data.

        See :func:`pyroflows.diagnostics.export.to_arviz`.
        """
        return to_arviz({"coverage": self})

    def __repr__(self) -> str:
        return (
            f"Coverage({len(self.ranks)} replicates x {self.num_draws} draws, "
            f"p-value {self.p_value:.2g}, area to curve {self.atc:+.3f})"
        )


def coverage(draw_log_probs: Tensor, truth_log_probs: Tensor, seed: int = 0) -> Coverage:
    r"""Compare the credibility of highest-density regions with the share of truths they hold.

    The highest-density region of credibility :math:`a` holds the draws of largest posterior
    density. It should hold the true parameters of a share :math:`a` of simulated data sets [1]:
    a curve above the diagonal tells a conservative posterior, one below it an overconfident one.

    Parameters
    ----------
    draw_log_probs : Tensor, shape (L, N)
        Posterior log densities of ``L`` draws for each of ``N`` data sets, each data set up to a
        constant of its own.
    truth_log_probs : Tensor, shape (N,)
        Those of the parameters that the data sets were simulated from. Minus infinity says that
        the posterior excludes the truth.
    seed : int, default 0
        Seed for the order of ties.

    Returns
    -------
    Coverage
        The curve, its bands, areas and p-value.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        If shapes disagree, there are no draws or no data sets, or NaN.

    Notes
    -----
    Regions depend on the parametrisation: log densities of constrained and unconstrained
    parameters give different, equally valid, tests. A posterior that ignores the data passes if
    it equals the prior; :func:`~pyroflows.diagnostics.local_c2st` tells it apart.

    References
    ----------
    [1] Hermans, Delaunoy, Rozet, Wehenkel, Begy, Louppe, "A trust crisis in simulation-based
        inference? Your posterior approximations can be unfaithful", Transactions on Machine
        Learning Research, 2022, `arXiv:2110.06581 <https://arxiv.org/abs/2110.06581>`_.

    Examples
    --------
    A posterior three times too narrow:

    >>> import torch
    >>> from torch.distributions import Normal
    >>> generator = torch.Generator().manual_seed(0)
    >>> posterior = Normal(0.0, 1.0)
    >>> truth = 3 * torch.randn(500, generator=generator)
    >>> draws = torch.randn(100, 500, generator=generator)
    >>> result = coverage(posterior.log_prob(draws), posterior.log_prob(truth))
    >>> result.passes(), result.atc < -0.1
    (False, True)
    """
    check_tensor("truth_log_probs", truth_log_probs, "N")
    check_tensor("draw_log_probs", draw_log_probs, "L", *truth_log_probs.shape)
    # Draws of higher density than the truth lie inside the region that just reaches it.
    return Coverage(ranks(-draw_log_probs, -truth_log_probs, seed), len(draw_log_probs))
