"""Draws of Markov chains that ran in the base space of a guide."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from ..diagnostics.frames import frame
from ..random_state import seeded
from .density import CHUNK
from .export import Groups, assemble, model_groups
from .posterior import VariationalPosterior
from .summary import describe

BASE = "base_vector"  # what the sampler's coordinates are called
RHAT_GOOD = 1.01
ESS_GOOD = 400


class NeuTraPosterior:
    r"""Hold draws of Markov chains that ran in the base space of a fitted guide.

    Attributes
    ----------
    result
        The variational result whose guide gave the coordinates.
    base
        The draws in base space, shape ``(chains, samples, D)``; near standard normal where the
        guide is good.
    unconstrained
        The same draws as unconstrained latent vectors, shape ``(chains, samples, D)``.
    draws
        The same draws by site, deterministic sites included: tensors
        ``(chains, samples, *site_shape)``.
    stats
        What is known of each draw, tensors ``(chains, samples)``: ``lp``, the log joint density in
        unconstrained space; ``log_det``, that of the guide's map; ``diverging``; ``n_steps`` of
        the trajectory; ``step_size``.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def model():
    ...     pyro.sample("x", dist.Normal(0.0, 1.0))
    >>> result = pf.fit(model, pf.AutoRealNVP(model, num_layers=2), num_steps=10, progress=False)
    >>> chains = pf.neutra(result, num_samples=50, warmup_steps=50, progress=False)
    >>> chains.shape, sorted(chains.diagnostics)
    (torch.Size([1, 50]), ['divergences', 'ess_bulk', 'ess_tail', 'rhat'])
    """

    def __init__(
        self,
        result: VariationalPosterior,
        base: Tensor,
        unconstrained: Tensor,
        log_p: Tensor,
        log_det: Tensor,
        stats: Mapping[str, Tensor],
    ) -> None:
        self.result = result
        self.base = base
        self.unconstrained = unconstrained
        self.stats = {"lp": log_p, "log_det": log_det, **stats}
        self.draws = {
            name: value.reshape(*self.shape, *value.shape[1:])
            for name, value in _site_values(result, unconstrained.flatten(0, 1)).items()
        }

    @property
    def shape(self) -> torch.Size:
        """Return the numbers of chains and of draws of each."""
        return self.base.shape[:2]

    @property
    def divergences(self) -> int:
        """Return how many transitions diverged after the warm-up."""
        return int(self.stats["diverging"].sum())

    @functools.cached_property
    def diagnostics(self) -> dict[str, float]:
        """Return how trustworthy the draws are.

        Returns
        -------
        dict
            ``divergences``, and over all entries of the unconstrained vector the largest ``rhat``
            and the smallest ``ess_bulk`` and ``ess_tail``. A single chain is cut in two to compute
            its R-hat.
        """
        table = _diagnose(self.unconstrained)
        return {
            "divergences": self.divergences,
            # NaN, where a chain never moved, must show.
            "rhat": float(table["rhat"].max(skipna=False)),
            "ess_bulk": float(table["ess_bulk"].min(skipna=False)),
            "ess_tail": float(table["ess_tail"].min(skipna=False)),
        }

    @property
    def verdict(self) -> str:
        """Say in words whether to trust the answer."""
        total = math.prod(self.shape)
        if self.divergences:
            return (
                f"{self.divergences} of {total} transitions diverged: the draws may miss a part of "
                "the posterior. Raise target_accept_prob, or fit a larger flow (num_layers, "
                "hidden_dims)."
            )
        rhat = self.diagnostics["rhat"]
        if not rhat < RHAT_GOOD:
            return (
                f"The chains do not agree (R-hat {rhat:.3f}, should be below {RHAT_GOOD}): raise "
                "warmup_steps and num_samples, or fit a larger flow."
            )
        ess = min(self.diagnostics["ess_bulk"], self.diagnostics["ess_tail"])
        if not ess >= ESS_GOOD:
            return (
                f"The chains agree, but the draws are worth only {ess:.0f} independent ones, less "
                f"than {ESS_GOOD}: raise num_samples."
            )
        return "The chains agree and no transition diverged: use the draws."

    def sample(self, num_samples: int, seed: int | None = None) -> dict[str, Tensor]:
        """Pick from the draws of all chains at random.

        Parameters
        ----------
        num_samples
            Number of draws ``S``; none is repeated unless there are fewer.
        seed
            Makes the choice reproducible; default: the global random state.

        Returns
        -------
        dict
            From site names, deterministic ones included, to tensors ``(S, *site_shape)``.

        Raises
        ------
        ValueError
            If ``num_samples`` is less than 1.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        total = math.prod(self.shape)
        with seeded(seed):
            rounds = math.ceil(num_samples / total)
            index = torch.cat([torch.randperm(total) for _ in range(rounds)])[:num_samples]
        index = index.to(self.base.device)
        return {name: value.flatten(0, 1)[index] for name, value in self.draws.items()}

    def summary(self) -> pd.DataFrame:
        """Tabulate each latent number.

        Returns
        -------
        pandas.DataFrame
            One row per entry of each site: mean, standard deviation, the 5 %, 50 % and 95 %
            quantiles, R-hat and effective sample sizes. The verdict is in ``attrs``.
        """
        total = math.prod(self.shape)
        flat = {name: value.flatten(0, 1) for name, value in self.draws.items()}
        table = describe(flat, torch.full((total,), 1 / total, device=self.base.device))
        table = table.drop(columns=["weighted_mean", "weighted_sd"])
        diagnosed = pd.concat([_diagnose(value) for value in self.draws.values()])
        table[list(diagnosed.columns)] = diagnosed.to_numpy()
        table.attrs.update(self.diagnostics, verdict=self.verdict)
        return table

    def to_frame(self) -> pd.DataFrame:
        """Return the draws as a table, a row each, by chain and draw."""
        return frame(self.draws, ("chain", "draw"))

    def to_arviz(
        self,
        *,
        num_prior_draws: int = 1000,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        seed: int = 0,
    ) -> Any:
        """Convert to ArviZ.

        The groups are those of :meth:`pyroflows.VariationalPosterior.to_arviz`, with all chains:
        ``posterior``, ``unconstrained_posterior``, ``log_likelihood`` and so on. In addition
        ``base_posterior`` holds the draws where the sampler saw them, as the variable
        ``base_vector``; and ``sample_stats`` has ``lp``, ``log_det``, ``diverging``, ``n_steps``
        and ``step_size``. The diagnostics and the verdict are in the attributes.

        Parameters
        ----------
        num_prior_draws
            Number of draws from the prior.
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions, for instance ``{"school": names}`` for a plate called ``school``.
        seed
            Makes the result reproducible.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        density = self.result.density
        with seeded(seed), torch.no_grad():
            flat = model_groups(density, self.unconstrained.flatten(0, 1), num_prior_draws)
        groups = self._with_chains(flat)
        groups["base_posterior"] = {BASE: _numpy(self.base)}
        groups["sample_stats"] = {name: _numpy(value) for name, value in self.stats.items()}
        attrs = {
            **self.diagnostics,
            "verdict": self.verdict,
            "method": f"NUTS in the base space of {type(self.result.guide).__name__}",
            "inference_library": "pyroflows",
        }
        return assemble(density, groups, attrs, dims, coords)

    def _with_chains(self, groups: Groups) -> Groups:
        """Return groups of one long chain ``(1, chains * samples, *shape)`` with all chains."""
        return {
            group: {
                name: value
                if group.startswith("prior") or group.endswith("_data")
                else value.reshape(*self.shape, *value.shape[2:])
                for name, value in values.items()
            }
            for group, values in groups.items()
        }

    def __repr__(self) -> str:
        chains, samples = self.shape
        return (
            f"NeuTraPosterior({type(self.result.guide).__name__}, D={self.base.shape[-1]}, "
            f"chains={chains}, samples={samples}, divergences={self.divergences})"
        )


def _site_values(result: VariationalPosterior, z: Tensor) -> dict[str, Tensor]:
    parts = [result.site_values(part) for part in z.split(CHUNK)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _diagnose(draws: Tensor) -> pd.DataFrame:
    """Tabulate R-hat and effective sample sizes of each entry of ``(chains, samples, *shape)``."""
    import arviz  # imported late: it takes seconds

    entries = _numpy(draws.double().reshape(*draws.shape[:2], -1))
    with np.errstate(all="ignore"):  # entries that never change, as in a Cholesky factor
        return pd.DataFrame(
            {
                "rhat": arviz.rhat(_dataset(_at_least_two_chains(entries)))["x"].to_numpy(),
                "ess_bulk": arviz.ess(_dataset(entries), method="bulk")["x"].to_numpy(),
                "ess_tail": arviz.ess(_dataset(entries), method="tail")["x"].to_numpy(),
            }
        )


def _dataset(entries: np.ndarray) -> xr.Dataset:
    return xr.Dataset({"x": (("chain", "draw", "entry"), entries)})


def _at_least_two_chains(entries: np.ndarray) -> np.ndarray:
    """Cut a single chain ``(1, samples, entries)`` in two; leave several as they are."""
    if len(entries) > 1:
        return entries
    half = entries.shape[1] // 2
    return np.concatenate([entries[:, :half], entries[:, -half:]])


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
