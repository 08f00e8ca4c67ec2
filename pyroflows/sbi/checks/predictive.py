"""Posterior predictive checks: whether the fitted model gives data like those observed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ...diagnostics.entries import entry_names
from ..model.exchangeable import exchangeable_sites
from ..model.export import export
from ..model.simulations import Simulations
from ..simulation.simulate import BATCH_SIZE, simulate_at

Statistics = Mapping[str, Callable[[Any], Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class PredictiveCheck:
    """Hold observations simulated at posterior draws, and compare the observed one with them.

    Attributes
    ----------
    simulations
        Posterior draws, and an observation simulated at each of them.
    observations
        What was observed, by site.
    statistics
        Test statistics by name: their values in simulated observations, ``(N,)`` less those that
        are not finite.
    observed_statistics
        Their values in what was observed.

    Examples
    --------
    >>> simulated = torch.arange(99.0)
    >>> simulations = Simulations({"mean": torch.zeros(99)}, {"x": simulated})
    >>> observed = {"x": torch.tensor(99.0)}
    >>> PredictiveCheck(simulations, observed, {"x": simulated}, {"x": 99.0}).p_values
    {'x': 0.02}
    """

    simulations: Simulations
    observations: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    observed_statistics: Mapping[str, float]

    @cached_property
    def p_values(self) -> dict[str, float]:
        r"""Return a two-sided tail probability for each statistic.

        .. math:: p = 2 \min\left(
            \frac{1 + \#\{ i : T_i \ge T \}}{N + 1}, \frac{1 + \#\{ i : T_i \le T \}}{N + 1}
            \right)

        and 1 at most. Parameters having been fitted to the same data, it is conservative: values
        near 1 are no proof, small ones are a misfit.
        """
        return {
            name: _two_sided(values, self.observed_statistics[name])
            for name, values in self.statistics.items()
        }

    def summary(self) -> pd.DataFrame:
        """Return a table with a row for each statistic: observed, simulated, tail probability."""
        rows = {
            name: {
                "observed": self.observed_statistics[name],
                "mean": values.mean().item(),
                "sd": values.std().item(),
                "5%": values.quantile(0.05).item(),
                "95%": values.quantile(0.95).item(),
                "p_value": self.p_values[name],
            }
            for name, values in self.statistics.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def to_frame(self) -> pd.DataFrame:
        """Return draws and simulated observations as a table, a row each."""
        return self.simulations.to_frame()

    def to_arviz(
        self,
        *,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
    ) -> Any:
        """Return ArviZ data with posterior, posterior predictive draws and the observation.

        Parameters
        ----------
        dims
            Names of the dimensions of a site, instead of those of its plates.
        coords
            Labels of dimensions.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        groups = {
            "posterior": self.simulations.parameters,
            "posterior_predictive": self.simulations.observations,
            "observed_data": self.observations,
        }
        names = {**self.simulations.dims, **(dims or {})}
        return export(groups, {}, dims=names, coords=coords)

    def __repr__(self) -> str:
        name = min(self.p_values, key=self.p_values.__getitem__)
        return (
            f"PredictiveCheck({len(self.simulations)} draws, {len(self.statistics)} statistics, "
            f"smallest p-value {self.p_values[name]:.2g} of {name})"
        )


def predictive_check(
    posterior: Any,
    simulator: Callable,
    *,
    x: Any,
    num_samples: int = 1000,
    statistics: Statistics | None = None,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> PredictiveCheck:
    """Simulate observations at posterior draws and compare the observed one with them [1].

    Parameters
    ----------
    posterior
        A posterior, or its draws, ``(N, *shape)`` by site.
    simulator
        The model.
    x
        What was observed: a tensor of shape ``(*shape)``, or a dict of them by site.
    num_samples
        Number ``N`` of draws from the posterior, unless these are given.
    statistics
        Functions by name, of observations ``(N, *shape)``, a dict of them if ``x`` is one, to
        ``N`` numbers. Default: the entries; mean, standard deviation, smallest and largest of
        entries in a plate.
    args, kwargs
        Arguments of the model, with which it simulates observations of the shape of ``x``.
    seed, executor, batch_size, progress
        See :func:`simulate`; the seed determines the posterior draws as well.

    Returns
    -------
    PredictiveCheck
        Draws, tail probabilities, a summary and ArviZ data.

    Raises
    ------
    ValueError
        If simulated observations have another shape than ``x``, or a statistic does not give one
        number for each, or NaN for ``x``.

    References
    ----------
    [1] A. Gelman, X.-L. Meng, H. Stern. Posterior predictive assessment of model fitness via
        realized discrepancies. Statistica Sinica 6, 1996.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist
    >>> def simulator():
    ...     theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(theta, 1.0).expand([20]).to_event(1))
    >>> draws = {"theta": torch.randn(500) / 20**0.5}
    >>> x = 5 * torch.linspace(-1, 1, 20)
    >>> statistics = {"sd": lambda x: x.std(-1)}
    >>> check = predictive_check(draws, simulator, x=x, statistics=statistics, progress=False)
    >>> check.p_values["sd"] < 0.01
    True
    """
    by_site = isinstance(x, Mapping)
    observations = {n: torch.as_tensor(v) for n, v in _by_site(posterior, x).items()}
    draws = posterior
    if not isinstance(posterior, Mapping):
        draws = posterior.sample(num_samples, x=observations, seed=seed)
    simulations = simulate_at(
        simulator,
        draws,
        [*observations],
        args=args,
        kwargs=kwargs,
        seed=seed,
        executor=executor,
        batch_size=batch_size,
        keep_nan=any(bool(value.isnan().any()) for value in observations.values()),
        progress=progress,
    )
    _check_shapes(observations, simulations)
    if statistics is None:
        plated = exchangeable_sites(simulator, [*observations], [*draws], args, kwargs)
        compute = partial(_default_statistics, observations, plated)
    else:
        compute = partial(_statistics, statistics, by_site)
    observed = compute({name: value.unsqueeze(0) for name, value in observations.items()})
    return PredictiveCheck(
        simulations,
        observations,
        {name: _finite(name, values) for name, values in compute(simulations.observations).items()},
        {name: _number(name, value) for name, value in observed.items()},
    )


def _by_site(posterior: Any, x: Any) -> Mapping[str, Any]:
    if isinstance(x, Mapping):
        return x
    return {"x" if isinstance(posterior, Mapping) else posterior.observations.names[0]: x}


def _check_shapes(observations: Mapping[str, Tensor], simulations: Simulations) -> None:
    for name, value in observations.items():
        simulated = simulations.observations[name].shape[1:]
        if value.shape != simulated:
            raise ValueError(
                f"observed site {name!r} has shape {tuple(simulated)} in the simulator, got x of "
                f"shape {tuple(value.shape)}; args or kwargs may change the simulator's"
            )


def _default_statistics(
    observations: Mapping[str, Tensor], plated: Collection[str], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return entries, or moments and extremes over a plate, where they were observed."""
    statistics = {}
    for name, observed in observations.items():
        rows = values[name].double()
        if name in plated:
            there = ~observed.reshape(len(observed), -1).isnan()
            columns = rows.reshape(len(rows), *there.shape).unbind(2)
            for label, points, kept in zip(entry_names(name, observed.shape[1:]), columns, there.T):
                if bool(kept.any()):
                    statistics.update(_of_points(label, points[:, kept]))
        else:
            entries = rows.reshape(len(rows), -1).unbind(1)
            known = (~observed.isnan()).flatten().tolist()
            labelled = zip(entry_names(name, observed.shape), entries, known)
            statistics.update({label: entry for label, entry, kept in labelled if kept})
    return statistics


def _of_points(label: str, points: Tensor) -> dict[str, Tensor]:
    """Return moments and extremes of points ``(N, n)``."""
    return {
        f"mean({label})": points.mean(1),
        f"sd({label})": points.std(1, unbiased=False),
        f"min({label})": points.amin(1),
        f"max({label})": points.amax(1),
    }


def _statistics(
    functions: Statistics, by_site: bool, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what the functions of a user make of observations."""
    size = len(next(iter(values.values())))
    results = {}
    for name, function in functions.items():
        result = torch.as_tensor(function(values if by_site else next(iter(values.values()))))
        if result.shape != (size,):
            raise ValueError(
                f"statistics[{name!r}] must return shape ({size},) for {size} observations, got "
                f"{tuple(result.shape)}"
            )
        results[name] = result.double()
    return results


def _finite(name: str, values: Tensor) -> Tensor:
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"statistics[{name!r}] is not finite for any simulated observation")
    return finite


def _number(name: str, value: Tensor) -> float:
    if bool(value.isnan().any()):  # no order, hence no tail
        raise ValueError(f"statistics[{name!r}] must be a number for x, got NaN")
    return value.item()


def _two_sided(values: Tensor, observed: float) -> float:
    above, below = (values >= observed).sum().item(), (values <= observed).sum().item()
    return min(1.0, 2 * (1 + min(above, below)) / (1 + len(values)))
