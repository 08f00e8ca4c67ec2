"""The same fit from several starts, to see whether they agree."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from tqdm.auto import tqdm

from ..random_state import preserved
from .checks import at_least
from .density import ModelDensity
from .export import Groups, assemble, weighted_groups
from .fit import fit
from .posterior import VariationalPosterior
from .summary import describe

RHAT_GOOD = 1.05
SAME_FOR_ALL = ("prior", "prior_predictive", "observed_data", "constant_data")


def fit_restarts(
    model: Callable,
    build_guide: Callable[[Callable], AutoContinuous],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_restarts: int = 4,
    seed: int = 0,
    executor: Executor | None = None,
    progress: bool = True,
    **options: Any,
) -> Restarts:
    """Fit a guide from several starts and tell whether the answers agree.

    Guides that miss a mode of the posterior can look perfect: their own draws never see it. Fits
    from different starts that disagree reveal it. Starts differ by their seed: let the guide start
    at a draw from the prior, as in the example, where there may be several modes.

    Parameters
    ----------
    model
        A Pyro model.
    build_guide
        Returns a fresh guide for a model, for instance ``pf.AutoRealNVP``.
    args, kwargs
        Arguments of the model.
    num_restarts
        Number of fits, at least 2. Default: 4.
    seed
        The fits have the seeds ``seed``, ``seed + 1``, ...
    executor
        Runs the fits, for instance a ``ProcessPoolExecutor``; model, arguments and ``build_guide``
        must then be picklable. Default: one after the other, here.
    progress
        Whether to show progress.
    **options
        Further arguments of :func:`pyroflows.fit`.

    Returns
    -------
    Restarts
        The results, the best of them, and how far they agree. Fits that fail are left out with a
        warning. An interrupt (Ctrl-C) ends the present fit early, as in :func:`pyroflows.fit`; one
        between fits, or while an executor works, returns those that are there.

    Raises
    ------
    ValueError
        If ``num_restarts`` is below 2.
    Exception
        What the last fit raised, if all of them fail.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> from pyro.infer.autoguide import init_to_sample
    >>> def model():
    ...     x = pyro.sample("x", dist.Normal(0.0, 4.0))
    ...     pyro.sample("y", dist.Normal(x.square(), 1.0), obs=torch.tensor(9.0))
    >>> def build_guide(model):
    ...     return pf.AutoRealNVP(model, num_layers=2, init_loc_fn=init_to_sample)
    >>> restarts = pf.fit_restarts(model, build_guide, num_steps=50, progress=False)
    >>> bool(restarts.rhat["x"] > 1.1)  # some found x = 3, others x = -3
    True
    """
    num_restarts = at_least("num_restarts", num_restarts, num_restarts, minimum=2)
    settings = {"kwargs": kwargs, "progress": progress and executor is None, **options}
    jobs = [
        _Job(model, build_guide, args, {**settings, "seed": seed + i}) for i in range(num_restarts)
    ]
    results: list[VariationalPosterior] = []
    failure: Exception | None = None
    with tqdm(total=num_restarts, disable=not progress, desc="restarts") as bar:
        futures = [executor.submit(_run, job) for job in jobs] if executor else [None] * len(jobs)
        try:
            for job, future in zip(jobs, futures, strict=True):
                try:
                    results.append(_result(job, future))
                    bar.set_postfix(ELBO=", ".join(f"{result.elbo:.3f}" for result in results))
                except (ValueError, RuntimeError, FloatingPointError) as error:
                    failure = error
                    warnings.warn(
                        f"the fit with seed {job.options['seed']} failed: {error}", stacklevel=2
                    )
                bar.update()
        except KeyboardInterrupt:
            for future in futures:
                if future is not None:
                    future.cancel()
            if not results:
                raise
            warnings.warn(
                f"interrupted after {len(results)} of {num_restarts} fits: the result holds those",
                stacklevel=2,
            )
    if not results and failure is not None:
        raise failure
    return Restarts(results)


class Restarts:
    """Hold fits of one model from several starts.

    Attributes
    ----------
    results
        The fits.
    best
        The one with the highest ELBO.

    Examples
    --------
    >>> import pyro, pyro.distributions as dist, pyroflows as pf
    >>> def model(data):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    ...     with pyro.plate("item", len(data)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=data)
    >>> def build_guide(model):
    ...     return pf.AutoRealNVP(model, num_layers=2)
    >>> options = {"num_restarts": 2, "num_steps": 10, "progress": False}
    >>> restarts = pf.fit_restarts(model, build_guide, (torch.ones(3),), **options)
    >>> restarts.agree, restarts.best in restarts.results
    (True, True)
    """

    def __init__(self, results: Sequence[VariationalPosterior]) -> None:
        self.results = list(results)
        self.best = max(self.results, key=lambda result: result.elbo)

    @property
    def rhat(self) -> pd.Series:
        r"""Return :math:`\hat R` of each latent number between the fits' draws [1].

        Near 1 the fits agree; above 1.05 they found different answers.

        References
        ----------
        [1] A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner. Rank-normalization,
            folding, and localization: an improved R-hat for assessing convergence of MCMC.
            `arXiv:1903.08008 <https://arxiv.org/abs/1903.08008>`_, 2019.
        """
        tables = [
            describe(result.density.constrain(result.draws), result.log_weights_psis.exp())
            for result in self.results
        ]
        means = pd.concat([table["mean"] for table in tables], axis=1)
        variances = pd.concat([table["sd"] ** 2 for table in tables], axis=1)
        within = variances.mean(axis=1)
        return np.sqrt(1 + means.var(axis=1) / within).rename("rhat")

    @property
    def agree(self) -> bool:
        """Tell whether all fits found the same answer."""
        return bool((self.rhat < RHAT_GOOD).all())

    def summary(self) -> pd.DataFrame:
        """Tabulate the verdicts of the fits, one a row, the best ELBO first."""
        table = pd.DataFrame([result.scalars() for result in self.results])
        table["num_steps"] = [len(result.losses) for result in self.results]
        table.index.name = "restart"
        return table.sort_values("elbo", ascending=False)

    def to_frame(self) -> pd.DataFrame:
        """Return the draws of all fits as a table, a row each, numbered within each fit."""
        tables = {i: result.to_frame() for i, result in enumerate(self.results)}
        return pd.concat(tables, names=["restart"])

    def to_arviz(self, **options: Any) -> Any:
        """Convert to ArviZ: each fit is a chain, so that its R-hat compares fits.

        Parameters
        ----------
        **options
            Those of :meth:`VariationalPosterior.to_arviz`.

        Returns
        -------
        arviz.InferenceData or xarray.DataTree
            The former with ArviZ 0.x, the latter with ArviZ 1.x.
        """
        names = {key: options.pop(key, None) for key in ("dims", "coords")}
        groups = _stack([weighted_groups(result, **options) for result in self.results])
        attrs = {**self.best.attributes(), "max_rhat": float(self.rhat.max())}
        return assemble(self.best.density, groups, attrs, **names)

    def __repr__(self) -> str:
        return (
            f"Restarts({len(self.results)} fits, best elbo={self.best.elbo:.3f}, "
            f"max rhat={self.rhat.max():.3f})"
        )


class _Job(NamedTuple):
    """Say what one fit is of, so that it can be sent elsewhere."""

    model: Callable
    build_guide: Callable[[Callable], AutoContinuous]
    args: tuple
    options: dict[str, Any]


class _Outcome(NamedTuple):
    """Hold what has to be sent back of a fit: no model, no graphs."""

    guide: dict[str, Tensor]
    parameters: list[Tensor]
    tensors: tuple[Tensor, ...]


def _fit(job: _Job) -> VariationalPosterior:
    return fit(job.model, job.build_guide(job.model), job.args, **job.options)


def _run(job: _Job) -> _Outcome:
    result = _fit(job)
    parameters = [parameter.detach() for parameter in result.density.parameters()]
    tensors = (result.losses, result.draws, result.log_p, result.log_q)
    return _Outcome(result.guide.state_dict(), parameters, tensors)


def _result(job: _Job, future: Future | None) -> VariationalPosterior:
    if future is None:
        return _fit(job)
    outcome: _Outcome = future.result()
    with preserved():
        guide = job.build_guide(job.model)
        density = ModelDensity(job.model, guide, job.args, job.options["kwargs"])
    guide.load_state_dict(outcome.guide)
    with torch.no_grad():
        for parameter, value in zip(density.parameters(), outcome.parameters, strict=True):
            parameter.copy_(value)
    return VariationalPosterior(density, *outcome.tensors)


def _stack(groups: Sequence[Groups]) -> Groups:
    """Put the chains of several objects into one; what they share is taken from the first."""
    return {
        name: {
            key: value
            if name in SAME_FOR_ALL
            else np.concatenate([other[name][key] for other in groups])
            for key, value in group.items()
        }
        for name, group in groups[0].items()
    }
