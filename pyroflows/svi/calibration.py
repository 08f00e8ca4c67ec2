"""Simulation-based calibration of variational fits: is what they say right on average?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from tqdm.auto import tqdm

from ..diagnostics import SBC, ranks, symmetry_p_values
from ..diagnostics.entries import entry_names
from ..diagnostics.export import to_arviz
from ..random_state import seeded
from .checks import at_least
from .density import ModelDensity, is_deterministic
from .fit import fit
from .posterior import VariationalPosterior

NUM_REPLICATIONS = 100
MIN_REPLICATIONS = 10  # what SBC needs
FAILURES = (ArithmeticError, RuntimeError, ValueError)  # of a fit; others are mistakes in the call


@dataclass(frozen=True, eq=False, repr=False)
class VariationalCalibration:
    """Hold the ranks of true latent variables among the draws of guides fitted to their data.

    Attributes
    ----------
    guide
        Ranks among the draws of the guides, a column for each entry of each latent site.
    resampled
        Ranks among the same draws, resampled by their smoothed importance weights.
    khat
        Tail index of the weights of each replication, shape ``(N,)``.
    failures
        What became of the replications without a fit, by their number.

    Examples
    --------
    >>> even = torch.arange(101).unsqueeze(-1)
    >>> exact, biased = SBC(even, 100, ("mean",)), SBC(even // 2, 100, ("mean",))
    >>> check = VariationalCalibration(guide=biased, resampled=exact, khat=torch.full((101,), 0.6))
    >>> check.is_unbiased()
    False
    """

    guide: SBC
    resampled: SBC
    khat: Tensor
    failures: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def symmetry_p_values(self) -> Tensor:
        """Return p-values of :func:`symmetry_p_values` for the guides, shape ``(D,)``."""
        return symmetry_p_values(self.guide.ranks, self.guide.num_draws)

    def is_unbiased(self, alpha: float = 0.01) -> bool:
        """Say whether the ranks among the guides' draws are symmetric, whatever their spread.

        Raises a false alarm with a probability of ``alpha`` at most (Bonferroni).
        """
        return bool(self.symmetry_p_values.min() >= alpha / len(self.symmetry_p_values))

    def passes(self, alpha: float = 0.01) -> bool:
        """Say whether the guides are neither biased nor of the wrong spread.

        All tests of the guides' draws together raise a false alarm with a probability of ``alpha``
        at most (Bonferroni). The same for resampled draws is ``resampled.passes(alpha)``.
        """
        return self.is_unbiased(alpha / 3) and self.guide.passes(alpha * 2 / 3)

    def to_arviz(self) -> Any:
        """Return ranks and their PIT values as ArviZ data, replications as draws."""
        return to_arviz({"guide": self.guide, "resampled": self.resampled}, self.guide.names)

    def summary(self) -> pd.DataFrame:
        """Tabulate each latent number.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: ``mean_pit`` and ``sd_pit``, mean and standard deviation
            of the share of the guide's draws below the truth (0.5 and 0.29 if calibrated; a mean
            above means that the guide lies too low, a deviation above that it is too narrow); the
            p-values of its symmetry and of its uniformity, two tests of :class:`SBC`; and those
            two for resampled draws.
        """
        columns = {
            "mean_pit": self.guide.pit.mean(0),
            "sd_pit": self.guide.pit.std(0),
            "symmetry_p_value": self.symmetry_p_values,
            "p_value": self.guide.p_values,
            "chi_square_p_value": self.guide.chi_square_p_values,
            "resampled_p_value": self.resampled.p_values,
            "resampled_chi_square_p_value": self.resampled.chi_square_p_values,
        }
        return pd.DataFrame(
            {name: column.numpy() for name, column in columns.items()}, index=list(self.guide.names)
        )

    def __repr__(self) -> str:
        return (
            f"VariationalCalibration({len(self.khat)} replications, {len(self.failures)} failed, "
            f"median khat={self.khat.median():.2f}, passes={self.passes()}, "
            f"resampled passes={self.resampled.passes()})"
        )


def calibration(
    model: Callable,
    build_guide: Callable[[Callable], AutoContinuous],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_replications: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> VariationalCalibration:
    r"""Check whether a kind of guide is calibrated, on data simulated from the model itself.

    Each replication draws latent variables :math:`\theta` from the prior and data :math:`y` given
    them, fits a fresh guide to ``y``, and records the rank of each true entry :math:`\theta_j`
    among the guide's draws. Under the exact posterior ranks are uniform. Guides are often too
    narrow without being off; then ranks still are symmetric [1]. The same draws resampled by their
    importance weights are ranked too: they should be uniform where k-hat is below 0.7.

    This judges the algorithm on average over the prior, not the fit to one data set: for that, see
    k-hat of :func:`pyroflows.fit`. Uniform ranks are necessary, not sufficient.

    Parameters
    ----------
    model
        A Pyro model with proper priors, whose data are observed sites. The values of those sites
        are replaced; other uses that the model makes of its arguments stay as they are.
    build_guide
        Makes a guide for a model, such as :class:`pyroflows.AutoRealNVP`; called anew each time.
    args, kwargs
        Arguments of the model, which give the shape of the data, and their values where they are
        not observed sites.
    num_replications
        Number of replications ``N``, at least 10. Default: 100.
    seed
        Makes the result reproducible; the global random state is left alone.
    progress
        Whether to show a progress bar.
    **options
        Options of :func:`pyroflows.fit`. ``num_steps``: most guides need fewer than its default,
        at which this takes as long as ``N`` full fits. ``num_draws``: how many draws ranks count.

    Returns
    -------
    VariationalCalibration
        Ranks and their tests. Fits that fail are left out and listed. After an interrupt (Ctrl-C)
        it holds the replications that were finished, if they are 10 or more.

    Raises
    ------
    TypeError
        If the guide is not an ``AutoContinuous``, or an option unknown.
    ValueError
        If a number is out of range; if the joint distribution cannot be simulated: no observed
        sites, factors, improper priors, likelihoods that are scaled, as in subsampled plates,
        parameters that are learned; or if fewer than 10 fits succeed.

    Warns
    -----
    UserWarning
        If fits failed, or the run was interrupted.

    References
    ----------
    [1] Y. Yao, A. Vehtari, D. Simpson, A. Gelman. Yes, but did it work? Evaluating variational
        inference. `arXiv:1802.02538 <https://arxiv.org/abs/1802.02538>`_, 2018.
    [2] S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman. Validating Bayesian inference
        algorithms with simulation-based calibration.
        `arXiv:1804.06788 <https://arxiv.org/abs/1804.06788>`_, 2018.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> from pyro.infer.autoguide import AutoMultivariateNormal
    >>> def model(data):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(data)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
    >>> data = torch.zeros(5)  # only its shape counts
    >>> options = {"num_replications": 20, "num_steps": 1, "progress": False}
    >>> result = calibration(model, AutoMultivariateNormal, (data,), **options)
    >>> result.passes()
    True
    """
    num_replications = at_least(
        "num_replications", num_replications, NUM_REPLICATIONS, MIN_REPLICATIONS
    )
    if not callable(model):
        raise TypeError(f"model must be a callable, got {type(model).__name__}")
    if not callable(build_guide):
        raise TypeError(
            "build_guide must make a guide for a model, such as pf.AutoRealNVP, got "
            f"{type(build_guide).__name__}"
        )
    with seeded(seed):
        try:
            density = ModelDensity(model, build_guide(model), args, kwargs)
            _check_can_simulate(density)
        except NotImplementedError as error:  # what improper distributions raise
            raise ValueError(f"model must have proper priors to simulate from: {error}") from error
        runs = _Runs()
        with tqdm(range(num_replications), disable=not progress, desc="calibration") as bar:
            for number in bar:
                try:
                    runs.add(*_replicate(density, build_guide, seed + number, options))
                    bar.set_postfix(khat=f"{runs.khat[-1]:.2f}")
                except FAILURES as error:
                    runs.failures[number] = f"{type(error).__name__}: {error}"
                except KeyboardInterrupt:
                    if len(runs.khat) < MIN_REPLICATIONS:
                        raise
                    warnings.warn(
                        f"interrupted after {number} of {num_replications} replications: the "
                        "result holds those",
                        stacklevel=2,
                    )
                    break
    return runs.result(_names(density))


class _Runs:
    """Gather the ranks of replications."""

    def __init__(self) -> None:
        self.guide: list[Tensor] = []
        self.resampled: list[Tensor] = []
        self.khat: list[float] = []
        self.failures: dict[int, str] = {}
        self.num_draws = 0

    def add(self, result: VariationalPosterior, truth: Tensor) -> None:
        """Rank true entries ``(D,)`` among the draws of a fitted guide."""
        draws = _columns(result.density, result.density.constrain(result.draws))
        weights = result.log_weights_psis.exp().cpu()
        picked = draws[torch.multinomial(weights, len(draws), replacement=True)]
        seed = len(self.khat)  # of the order of ties
        among = [ranks(each.unsqueeze(1), truth.unsqueeze(0), seed) for each in (draws, picked)]
        self.guide.append(among[0])
        self.resampled.append(among[1])
        self.khat.append(result.khat)
        self.num_draws = len(draws)

    def result(self, names: tuple[str, ...]) -> VariationalCalibration:
        """Return what was gathered; raise if it is too little, warn if fits failed."""
        if self.failures:
            number, reason = next(iter(self.failures.items()))
            message = (
                f"{len(self.failures)} of {len(self.failures) + len(self.khat)} fits failed, the "
                f"first in replication {number}: {reason}"
            )
            if len(self.khat) < MIN_REPLICATIONS:
                raise ValueError(f"{message}; ranks need {MIN_REPLICATIONS} fits at least")
            warnings.warn(f"{message}; the ranks leave them out", stacklevel=3)
        return VariationalCalibration(
            SBC(torch.cat(self.guide), self.num_draws, names),
            SBC(torch.cat(self.resampled), self.num_draws, names),
            torch.tensor(self.khat),
            self.failures,
        )


def _replicate(
    density: ModelDensity,
    build_guide: Callable[[Callable], AutoContinuous],
    seed: int,
    options: Mapping[str, Any],
) -> tuple[VariationalPosterior, Tensor]:
    """Fit a fresh guide to data from the model; return the fit and the true entries ``(D,)``."""
    values = _simulate(density)
    model = poutine.condition(density.model, {name: values[name] for name in density.data_sites})
    with warnings.catch_warnings():
        # A fit that was cut short says nothing about the guide, so that its warning is an error.
        warnings.filterwarnings("error", "interrupted after", UserWarning)
        warnings.filterwarnings("ignore", "The guide misses part of the posterior", UserWarning)
        try:
            result = fit(
                model,
                build_guide(model),
                density.args,
                density.kwargs,
                seed=seed,
                progress=False,
                **options,
            )
        except UserWarning as warning:
            if isinstance(warning.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    latent = {name: values[name].unsqueeze(0) for name in density.sites}
    return result, _columns(density, latent).squeeze(0)


@torch.no_grad()
def _simulate(density: ModelDensity) -> dict[str, Tensor]:
    """Draw the values of all latent sites, and of those that hold data, from the model."""
    with poutine.block():
        trace = poutine.trace(density.without_data()).get_trace(*density.args, **density.kwargs)
    return {name: trace.nodes[name]["value"] for name in (*density.sites, *density.data_sites)}


def _check_can_simulate(density: ModelDensity) -> None:
    """Raise ``ValueError`` unless the model's joint distribution is one that can be drawn from."""
    sites = density.prototype.nodes
    reasons = {
        "learns parameters": [n for n, site in sites.items() if site["type"] == "param"],
        "has factors": [n for n, site in sites.items() if _is_factor(site)],
        "scales likelihoods or subsamples": [n for n, site in sites.items() if _is_scaled(site)],
    }
    for reason, names in reasons.items():
        if names:
            raise ValueError(
                f"model must be one that data can be simulated from, but it {reason}: {names}"
            )
    if not density.data_sites:
        raise ValueError("model must observe data, as pyro.sample(..., obs=data); it has none")
    _simulate(density)


def _is_factor(site: dict) -> bool:
    is_sample = site["type"] == "sample"
    return is_sample and isinstance(site["fn"], Unit) and not is_deterministic(site)


def _is_scaled(site: dict) -> bool:
    return site["type"] == "sample" and bool((torch.as_tensor(site["scale"]) != 1).any())


def _columns(density: ModelDensity, values: Mapping[str, Tensor]) -> Tensor:
    """Return all entries of the latent sites ``(S, *site_shape)`` side by side, ``(S, D)``."""
    parts = [values[name] for name in density.sites]
    return torch.cat([part.reshape(len(part), -1) for part in parts], -1).cpu()


def _names(density: ModelDensity) -> tuple[str, ...]:
    sites = density.sites.items()
    return tuple(entry for name, site in sites for entry in entry_names(name, site["value"].shape))
