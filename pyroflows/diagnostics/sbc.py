"""Simulation-based calibration: ranks of true parameters among posterior draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pandas as pd
import torch
from scipy.special import chdtrc
from torch import Tensor

from pyroflows.diagnostics.checks import check_tensor
from pyroflows.diagnostics.ecdf import (
    RankECDF,
    bin_counts,
    bin_edges,
    check_ranks,
    rank_ecdf,
    uniformity_p_values,
)
from pyroflows.diagnostics.entries import entry_names
from pyroflows.diagnostics.export import to_arviz

from ..random_state import seeded

_MINIMUM_PER_BIN = 5


def ranks(draws: Tensor, truth: Tensor, seed: int = 0) -> Tensor:
    r"""Count the draws below each true value, ties broken at random.

    If the true parameters come from the prior, data from the model given them, and independent
    draws from the exact posterior given the data, the ranks are uniform on
    :math:`\{0, \dots, L\}`.

    Parameters
    ----------
    draws : Tensor, shape ``(L, N, *event)``
        ``L`` posterior draws for each of ``N`` data sets.
    truth : Tensor, shape ``(N, *event)``
        The parameters that the data sets were simulated from.
    seed : int, default 0
        Seed for the order of ties.

    Returns
    -------
    Tensor, shape ``(N, *event)``
        Integers from 0 to L, on the CPU.

    Raises
    ------
    TypeError
        If an argument is not a tensor.
    ValueError
        If shapes disagree, there are no draws or no data sets, or NaN.

    Examples
    --------
    >>> import torch
    >>> ranks(torch.tensor([[1.0, 8.0], [2.0, 9.0], [3.0, 7.0]]), torch.tensor([2.5, 7.5]))
    tensor([2, 1])
    """
    return _ranks(draws, truth, torch.Generator().manual_seed(seed))


def _ranks(draws: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    check_tensor("truth", truth, "N")
    check_tensor("draws", draws, "L", *truth.shape)
    if draws.ndim != truth.ndim + 1:
        raise ValueError(
            f"draws must have shape ('L', {', '.join(map(str, truth.shape))}) as truth has shape "
            f"{tuple(truth.shape)}, got {tuple(draws.shape)}"
        )
    truth = truth.to(draws.device)
    below, ties = (draws < truth).sum(0).cpu(), (draws == truth).sum(0).cpu()
    share = torch.rand(ties.shape, generator=generator, dtype=torch.float64)
    return below + (share * (ties + 1)).long()


@dataclass(frozen=True, eq=False, repr=False)
class SBC:
    """Hold the ranks of true parameters among posterior draws, and test them.

    Attributes
    ----------
    ranks : Tensor, shape (N, D)
        Ranks from 0 to ``num_draws`` of D parameters in N replicates.
    num_draws : int
        Posterior draws in each replicate.
    names : tuple of str
        Names of the D parameters.

    Examples
    --------
    >>> import torch
    >>> even = torch.arange(101).unsqueeze(-1)
    >>> SBC(even, 100, ("rate",)).passes()
    True
    >>> SBC(even // 2, 100, ("rate",)).passes()  # the truth is always in the lower half
    False
    """

    ranks: Tensor
    num_draws: int
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        check_ranks(self.ranks, self.num_draws)
        if self.ranks.ndim != 2:
            raise ValueError(f"ranks must have shape (N, D), got {tuple(self.ranks.shape)}")
        if len(self.names) != self.ranks.shape[1]:
            raise ValueError(
                f"names must be as many as parameters, {self.ranks.shape[1]}, got {len(self.names)}"
            )
        if len(self.ranks) < 2 * _MINIMUM_PER_BIN:
            raise ValueError(
                f"SBC needs at least {2 * _MINIMUM_PER_BIN} replicates, got {len(self.ranks)}"
            )

    @classmethod
    def from_draws(
        cls, draws: Tensor, truth: Tensor, names: Sequence[str] | None = None, seed: int = 0
    ) -> SBC:
        """Rank true parameters among posterior draws.

        Parameters
        ----------
        draws : Tensor, shape (L, N, D)
            ``L`` posterior draws for each of ``N`` simulated data sets, ``N`` at least 10.
        truth : Tensor, shape (N, D)
            The parameters that the data sets were simulated from.
        names : sequence of str, optional
            Names of the parameters; default: ``theta[0]``, ``theta[1]``, ...
        seed : int, default 0
            Seed for the order of ties.
        """
        check_tensor("truth", truth, "N", "D")
        labels = entry_names("theta", truth.shape[1:]) if names is None else names
        return cls(ranks(draws, truth, seed), len(draws), tuple(labels))

    @property
    def pit(self) -> Tensor:
        """Return probability integral transforms: ranks as midpoints in [0, 1], shape (N, D)."""
        return (self.ranks.double() + 0.5) / (self.num_draws + 1)

    @cached_property
    def p_values(self) -> Tensor:
        """Return exact p-values of the simultaneous ECDF bands, shape (D,)."""
        return uniformity_p_values(self.ranks, self.num_draws)

    @cached_property
    def chi_square_p_values(self) -> Tensor:
        """Return chi-square p-values of the rank histograms, shape (D,).

        The histogram has about ``2 N**0.4`` bins, each with five ranks or more on average.
        """
        size = len(self.ranks)
        num_bins = max(min(round(2 * size**0.4), size // _MINIMUM_PER_BIN), 2)
        edges = bin_edges(self.num_draws, num_bins)
        widths = edges.diff(
            prepend=edges.new_zeros(1), append=edges.new_tensor([self.num_draws + 1])
        )
        expected = (size * widths.double() / (self.num_draws + 1)).unsqueeze(-1)
        statistic = ((bin_counts(self.ranks, edges) - expected).square() / expected).sum(0)
        return torch.from_numpy(chdtrc(len(edges), statistic.numpy()))

    def passes(self, alpha: float = 0.01) -> bool:
        """Say whether no test of any parameter rejects calibration.

        Both tests of all parameters together raise a false alarm with a probability of ``alpha``
        at most (Bonferroni).
        """
        p_values = torch.cat([self.p_values, self.chi_square_p_values])
        return bool(p_values.min() >= alpha / len(p_values))

    def ecdf(self, confidence: float = 0.95) -> RankECDF:
        """Return ECDFs of the ranks minus the uniform one, with simultaneous bands.

        See :func:`~pyroflows.diagnostics.rank_ecdf`.
        """
        return rank_ecdf(self.ranks, self.num_draws, confidence)

    def summary(self) -> pd.DataFrame:
        """Tabulate each parameter.

        Returns
        -------
        pandas.DataFrame
            ``mean_pit`` and ``sd_pit``, mean and standard deviation of the share of draws below the
            truth, 0.5 and 0.29 if calibrated; the p-values of the two tests.
        """
        columns = {
            "mean_pit": self.pit.mean(0),
            "sd_pit": self.pit.std(0),
            "p_value": self.p_values,
            "chi_square_p_value": self.chi_square_p_values,
        }
        return pd.DataFrame({n: c.numpy() for n, c in columns.items()}, index=list(self.names))

    def to_arviz(self) -> Any:
        """Return ranks and their PIT values as ArviZ data.

        See :func:`pyroflows.diagnostics.export.to_arviz`.
        """
        return to_arviz({"sbc": self}, self.names)

    def __repr__(self) -> str:
        p_values = ", ".join(f"{name}: {p:.2g}" for name, p in zip(self.names, self.p_values))
        return f"SBC({len(self.ranks)} replicates x {self.num_draws} draws, p-values {p_values})"


class SimulatedPairs(Protocol):
    """What :func:`sbc` needs of simulations: tensors ``(N, *shape)`` by site."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Return draws from the prior."""

    @property
    def observations(self) -> Mapping[str, Tensor]:
        """Return the data simulated from them."""


def sbc(
    posterior: Any,
    simulations: SimulatedPairs,
    num_draws: int = 1000,
    batch_size: int = 100,
    seed: int = 0,
) -> SBC:
    r"""Check the calibration of an amortized posterior on simulations.

    Ranks the true parameters among posterior draws for each simulated data set; they are uniform
    if the posterior is exact [1, 2]. A posterior that is too narrow gives ranks near 0 and L,
    one that is too wide ranks near :math:`L / 2`, a biased one ranks at one end. Uniform ranks of
    single parameters do not prove a posterior: the prior has them too.

    Parameters
    ----------
    posterior
        Anything with ``sample(num_draws, x=observations)`` that returns a mapping from sites to
        independent draws of shape ``(num_draws, batch, *site_shape)`` for a batch of data sets.
    simulations : SimulatedPairs
        Anything with ``parameters`` and ``observations``, both mappings of sites to tensors of
        shape ``(N, *site_shape)``: at least 10 draws from the prior, and the data simulated from
        them, that the posterior was not trained on.
    num_draws : int, default 1000
        Number ``L`` of posterior draws for each data set.
    batch_size : int, default 100
        Data sets to sample for at once. Memory grows with ``num_draws * batch_size``.
    seed : int, default 0
        Seed of torch's generators while sampling, and of the order of ties; the global random
        state is left as it was.

    Returns
    -------
    SBC
        Ranks, their p-values and bands.

    Raises
    ------
    TypeError
        If parameters or draws are not tensors.
    ValueError
        If there are no parameters, sizes disagree, ``num_draws`` or ``batch_size`` is below 1, a
        site is missing from the draws or its draws have another shape, or there is NaN.

    References
    ----------
    [1] Cook, Gelman, Rubin, "Validation of software for Bayesian models using posterior
        quantiles", Journal of Computational and Graphical Statistics 15(3), 2006,
        doi:10.1198/106186006X136976.
    [2] Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian inference algorithms
        with simulation-based calibration", 2018,
        `arXiv:1804.06788 <https://arxiv.org/abs/1804.06788>`_.

    Examples
    --------
    A normal mean with a standard normal prior and one observation of unit variance:

    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Exact:
    ...     def sample(self, num_draws, x):
    ...         return {"mu": x["y"] / 2 + 0.5**0.5 * torch.randn(num_draws, *x["y"].shape)}
    >>> generator = torch.Generator().manual_seed(0)
    >>> mu = torch.randn(500, generator=generator)
    >>> y = mu + torch.randn(500, generator=generator)
    >>> simulations = SimpleNamespace(parameters={"mu": mu}, observations={"y": y})
    >>> sbc(Exact(), simulations, num_draws=100).passes()
    True
    """
    if num_draws < 1 or batch_size < 1:
        raise ValueError(
            f"num_draws and batch_size must be at least 1, got {num_draws} and {batch_size}"
        )
    size = _num_pairs(simulations)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    with seeded(seed):
        for start in range(0, size, batch_size):
            rows = slice(start, start + batch_size)
            x = {name: value[rows] for name, value in simulations.observations.items()}
            truth = {name: value[rows] for name, value in simulations.parameters.items()}
            draws = posterior.sample(num_draws, x=x)
            batches.append(_site_ranks(draws, truth, num_draws, generator))
    names = [
        entry
        for name, value in simulations.parameters.items()
        for entry in entry_names(name, value.shape[1:])
    ]
    return SBC(torch.cat(batches), num_draws, tuple(names))


def _num_pairs(simulations: SimulatedPairs) -> int:
    if not simulations.parameters:
        raise ValueError("simulations must hold at least one parameter site, got none")
    size: str | int = "N"
    for name, value in simulations.parameters.items():
        check_tensor(f"parameters[{name!r}]", value, size)
        size = len(value)
    for name, value in simulations.observations.items():
        if len(value) != size:
            raise ValueError(
                f"observations[{name!r}] must have {size} rows as parameters have, got {len(value)}"
            )
    return int(size)


def _site_ranks(
    draws: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    num_draws: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the ranks of all entries of all sites, side by side."""
    columns = []
    for name, value in truth.items():
        if name not in draws:
            raise ValueError(f"the posterior must draw site {name!r}, it draws {sorted(draws)}")
        check_tensor(f"draws of site {name!r}", draws[name], num_draws, *value.shape)
        columns.append(_ranks(draws[name], value, generator).reshape(len(value), -1))
    return torch.cat(columns, -1)
