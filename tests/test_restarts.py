"""Several fits of one model: whether they agree, wherever they run, and what becomes of them."""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_sample

import pyroflows as pf
from tests.models import HEIGHTS, conjugate, conjugate_answer, log_normal

QUICK = {"num_steps": 50, "num_particles": 64, "num_draws": 2000, "progress": False}


def build(model: Callable) -> pf.AutoFlow:
    return pf.AutoRealNVP(model, num_layers=2, hidden_dims=(8,), init_loc_fn=init_to_sample)


def square() -> None:
    """Observe the square of a number, which leaves its sign open: modes at 3 and -3."""
    x = pyro.sample("x", dist.Normal(0.0, 4.0))
    pyro.deterministic("one", torch.ones(()))
    pyro.sample("y", dist.Normal(x.square(), 1.0), obs=torch.tensor(9.0))


@cache
def agreeing() -> pf.Restarts:
    return pf.fit_restarts(conjugate, build, (HEIGHTS,), num_restarts=3, **QUICK)


@cache
def disagreeing() -> pf.Restarts:
    return pf.fit_restarts(square, build, num_restarts=4, **QUICK)


def test_fits_that_found_the_posterior_agree() -> None:
    """Means of 2000 draws: R-hat exceeds 1 by about 1 / 4000, 1.01 is forty times that."""
    restarts = agreeing()
    mean, sd, log_evidence = conjugate_answer(HEIGHTS)
    assert restarts.agree
    assert restarts.rhat["mean"] < 1.01
    for result in restarts.results:
        assert result.sample(2000, seed=3)["mean"].mean().item() == pytest.approx(
            mean, abs=5 * sd / 2000**0.5
        )
        assert result.elbo == pytest.approx(log_evidence, abs=0.02)


def test_fits_that_found_different_modes_disagree() -> None:
    """Each fit finds either sign: all four the same by chance in one seed of eight, not in 0."""
    restarts = disagreeing()
    signs = [result.draws.mean().sign().item() for result in restarts.results]
    assert set(signs) == {-1.0, 1.0}
    assert not restarts.agree
    assert restarts.rhat["x"] > 2
    assert list(restarts.rhat.index) == ["x"]
    # Each is blind to the other mode: it misses half of the evidence.
    grid = torch.linspace(-6.0, 6.0, 100_001, dtype=torch.float64)
    joint = log_normal(grid, 0.0, 4.0) + log_normal(grid.square(), 9.0, 1.0)
    log_evidence = joint.logsumexp(0) + math.log(grid[1] - grid[0])
    for result in restarts.results:
        assert result.log_evidence == pytest.approx(log_evidence.item() - math.log(2), abs=0.02)


def test_the_summary_is_sorted_by_elbo() -> None:
    restarts = agreeing()
    table = restarts.summary()
    assert table["elbo"].is_monotonic_decreasing
    assert table["elbo"].iloc[0] == restarts.best.elbo
    assert sorted(table.index) == [0, 1, 2]
    assert (table["num_steps"] == 50).all()
    assert "3 fits" in repr(restarts)


def test_fits_are_chains_in_arviz() -> None:
    az = pytest.importorskip("arviz")
    data = agreeing().to_arviz(num_prior_draws=20)
    assert data["posterior"]["mean"].shape == (3, 2000)
    assert data["sample_stats"]["log_weight"].shape == (3, 2000)
    assert data["log_likelihood"]["y"].shape == (3, 2000, len(HEIGHTS))
    assert data["prior"]["mean"].shape == (1, 20)
    assert data["observed_data"]["y"].shape == (len(HEIGHTS),)
    assert data["posterior"].attrs["max_rhat"] < 1.01
    assert float(az.rhat(data)["mean"]) < 1.02
    other = disagreeing().to_arviz(num_prior_draws=2)
    assert float(az.rhat(other, var_names=["x"])["x"]) > 1.5


def test_processes_give_the_same_answers() -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        restarts = pf.fit_restarts(
            conjugate, build, (HEIGHTS,), num_restarts=3, executor=executor, **QUICK
        )
    for one, other in zip(restarts.results, agreeing().results, strict=True):
        torch.testing.assert_close(one.draws, other.draws, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            one.sample(5, seed=1)["mean"], other.sample(5, seed=1)["mean"], rtol=1e-4, atol=1e-4
        )
    assert restarts.best.elbo == pytest.approx(agreeing().best.elbo, abs=1e-4)


def fails_for(*seeds: int) -> Callable[[Callable], Any]:
    calls = iter(range(100))

    def builder(model: Callable) -> pf.AutoFlow:
        if next(calls) in seeds:
            raise ValueError("no such guide")
        return build(model)

    return builder


def test_a_failed_fit_does_not_lose_the_others() -> None:
    with pytest.warns(UserWarning, match="the fit with seed 1 failed: no such guide"):
        restarts = pf.fit_restarts(conjugate, fails_for(1), (HEIGHTS,), num_restarts=3, **QUICK)
    assert len(restarts.results) == 2


@pytest.mark.filterwarnings("ignore:the fit with seed")
def test_what_fails_always_is_raised() -> None:
    with pytest.raises(ValueError, match="no such guide"):
        pf.fit_restarts(conjugate, fails_for(0, 1), (HEIGHTS,), num_restarts=2, **QUICK)


def test_an_interrupt_keeps_the_fits_that_are_there() -> None:
    calls = iter(range(100))

    def builder(model: Callable) -> pf.AutoFlow:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return build(model)

    with pytest.warns(UserWarning, match="interrupted after 2 of 4 fits"):
        restarts = pf.fit_restarts(conjugate, builder, (HEIGHTS,), num_restarts=4, **QUICK)
    assert len(restarts.results) == 2


def test_one_restart_is_refused() -> None:
    with pytest.raises(ValueError, match="num_restarts must be at least 2, got 1"):
        pf.fit_restarts(conjugate, build, (HEIGHTS,), num_restarts=1)
