"""Whether an amortized posterior is calibrated: all checks on simulations in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...diagnostics import SBC, Coverage, coverage, tarp
from ...diagnostics.entries import entry_names
from ...diagnostics.export import to_arviz
from ...random_state import seeded
from ..model.simulations import Simulations


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Hold three checks of the draws of an amortized posterior.

    Attributes
    ----------
    sbc
        Ranks of the true entries of each parameter among posterior draws.
    tarp
        How often regions around random points hold the truth.
    coverage
        How often regions of highest density hold the truth; ``None`` if not asked for.

    Examples
    --------
    >>> even = torch.arange(101)
    >>> sbc, tarp = SBC(even.unsqueeze(-1), 100, ("rate",)), Coverage(even, 100)
    >>> check = Calibration(sbc, tarp, None)
    >>> check.passes(), check.summary().index.to_list()
    (True, ['sbc rate', 'tarp'])
    """

    sbc: SBC
    tarp: Coverage
    coverage: Coverage | None

    def passes(self, alpha: float = 0.01) -> bool:
        """Say whether no check rejects calibration.

        All together raise a false alarm with a probability of ``alpha`` at most (Bonferroni).
        """
        checks = [check for check in (self.sbc, self.tarp, self.coverage) if check is not None]
        return all(check.passes(alpha / len(checks)) for check in checks)

    def summary(self) -> pd.DataFrame:
        """Return a table of p-values, a row for each entry of a parameter and each other check."""
        rows = {
            f"sbc {name}": {"p_value": p, "chi_square_p_value": q}
            for name, p, q in zip(
                self.sbc.names,
                self.sbc.p_values.tolist(),
                self.sbc.chi_square_p_values.tolist(),
            )
        }
        for name, check in (("tarp", self.tarp), ("coverage", self.coverage)):
            if check is not None:
                rows[name] = {"p_value": check.p_value}
        return pd.DataFrame.from_dict(rows, orient="index")

    def to_arviz(self) -> Any:
        """Return ranks and their PIT values as ArviZ data, replicates as draws.

        The variables ``sbc``, with the dimension ``parameter``, ``tarp`` and ``coverage``; see
        :func:`pyroflows.diagnostics.export.to_arviz`.
        """
        checks: dict[str, SBC | Coverage] = {"sbc": self.sbc, "tarp": self.tarp}
        if self.coverage is not None:
            checks["coverage"] = self.coverage
        return to_arviz(checks, self.sbc.names)

    def __repr__(self) -> str:
        return f"Calibration({self.sbc!r}, tarp={self.tarp!r}, coverage={self.coverage!r})"


def calibration(
    posterior: Any,
    simulations: Simulations,
    *,
    num_draws: int = 1000,
    num_densities: int = 50,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Check the calibration of an amortized posterior on simulations it was not trained on.

    Draws once for all of simulation-based calibration, TARP and expected coverage, see
    :mod:`pyroflows.diagnostics`.

    Parameters
    ----------
    posterior
        Anything that samples and evaluates as :class:`Posterior` does.
    simulations
        ``N`` draws of the model, some hundreds or more.
    num_draws
        Number ``L`` of posterior draws for each simulation.
    num_densities
        For how many of them to evaluate the density, which takes longer than to draw; 0 leaves
        the expected coverage out.
    batch_size
        Simulations to draw for at once.
    seed
        Determines draws and the order of ties; the global random state is left alone.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Calibration
        The checks.

    Raises
    ------
    ValueError
        If a number is too small, or the simulations are those of another model.

    Notes
    -----
    Costs ``N L`` draws, all in memory at once, and ``N num_densities`` densities.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> def sample(num_draws, x):
    ...     return {"mean": x["x"] / 2 + 0.5**0.5 * torch.randn(num_draws, *x["x"].shape)}
    >>> exact = SimpleNamespace(sample=sample)
    >>> generator = torch.Generator().manual_seed(0)
    >>> mean, noise = torch.randn(2, 500, generator=generator)
    >>> simulations = Simulations({"mean": mean}, {"x": mean + noise})
    >>> calibration(exact, simulations, num_draws=100, num_densities=0).passes()
    True
    """
    _check_counts(1, num_draws=num_draws, batch_size=batch_size, num_simulations=len(simulations))
    _check_counts(0, num_densities=num_densities)
    some = min(num_densities, num_draws)
    draws, draw_densities, true_densities = [], [], []
    with seeded(seed), torch.no_grad():
        starts = range(0, len(simulations), batch_size)
        for start in tqdm(starts, desc="calibration", unit="batch", disable=not progress):
            part = simulations[start : start + batch_size]
            drawn = posterior.sample(num_draws, x=part.observations)
            draws.append(_columns(drawn, part.parameters))
            if some:
                first = {name: value[:some] for name, value in drawn.items()}
                true = part.parameters
                draw_densities.append(posterior.log_prob(first, x=part.observations).cpu())
                true_densities.append(posterior.log_prob(true, x=part.observations).cpu())
    truth, names = _columns(simulations.parameters, simulations.parameters), _names(simulations)
    all_draws = torch.cat(draws, 1)
    density = None
    if some:
        density = coverage(torch.cat(draw_densities, 1), torch.cat(true_densities), seed)
    sbc = SBC.from_draws(all_draws, truth, names, seed)
    return Calibration(sbc, tarp(all_draws, truth, seed=seed), density)


def _columns(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tensor:
    """Return all entries of all sites side by side, ``(*batch, D)``, on the CPU."""
    parts = []
    for name, value in like.items():
        if name not in values:
            raise ValueError(f"the posterior must draw site {name!r}, it draws {sorted(values)}")
        batch_shape = values[name].shape[: values[name].dim() - value.dim() + 1]
        parts.append(values[name].reshape(*batch_shape, -1))
    return torch.cat(parts, -1).cpu()


def _names(simulations: Simulations) -> list[str]:
    sites = simulations.parameters.items()
    return [entry for name, value in sites for entry in entry_names(name, value.shape[1:])]


def _check_counts(least: int, **counts: int) -> None:
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} must be at least {least}, got {count}")
