"""Leave-one-out cross-validation against a conjugate model, where it has a closed form."""

import math
from collections.abc import Callable
from typing import NamedTuple

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics.loo import LOO, loo
from pyroflows.svi.density import ModelDensity
from tests.models import HEIGHTS, PRIOR_SD, conjugate, log_normal, mixture, realnvp

NUM_DRAWS = 4000
OFF = 0.4  # how far the approximation is shifted, in posterior standard deviations
WIDTH = 1.3


class Exact(NamedTuple):
    """Hold the posterior of a normal mean, and what it predicts, in closed form."""

    mean: Tensor
    sd: Tensor
    elpd_i: Tensor
    lpd_i: Tensor


def exact(y: Tensor) -> Exact:
    y = y.double()

    def posterior(total: Tensor, size: int) -> tuple[Tensor, Tensor]:
        precision = torch.tensor(1 / PRIOR_SD**2 + size).double()
        return total / precision, precision.rsqrt()

    def predicted(mean: Tensor, sd: Tensor) -> Tensor:
        return log_normal(y, mean, (1 + sd.square()).sqrt())

    everything = posterior(y.sum(), len(y))
    without = posterior(y.sum() - y, len(y) - 1)
    return Exact(*everything, predicted(*without), predicted(*everything))


def data() -> Tensor:
    return 1.0 + torch.randn(12, generator=torch.Generator().manual_seed(0))


def approximate(y: Tensor, weighted: bool) -> LOO:
    """Leave out by draws from a normal distribution that is shifted and too wide."""
    answer = exact(y)
    noise = torch.randn(NUM_DRAWS, generator=torch.Generator().manual_seed(1)).double()
    draws = answer.mean + answer.sd * (OFF + WIDTH * noise)
    log_likelihood = log_normal(y.double(), draws.unsqueeze(-1), 1.0)
    log_p = log_normal(draws, 0.0, PRIOR_SD) + log_likelihood.sum(-1)
    log_q = -0.5 * noise.square()  # up to a constant
    return loo(log_likelihood, log_p - log_q if weighted else None)


def test_leaving_out_by_weights_is_exact_for_an_approximation_that_is_off() -> None:
    """Five Monte Carlo errors of each of 12 numbers: a false alarm in 10^5 seeds."""
    answer, result = exact(data()), approximate(data(), weighted=True)
    assert ((result.elpd_i - answer.elpd_i).abs() < 5 * result.mcse_i).all()
    assert result.mcse_i.max() < 0.02
    assert result.is_reliable
    # That of the difference, from draws that both have in common, is smaller than the sum.
    assert result.p == pytest.approx((answer.lpd_i - answer.elpd_i).sum().item(), abs=0.1)
    assert result.elpd == pytest.approx(answer.elpd_i.sum().item(), abs=0.1)
    standard_error = math.sqrt(12) * answer.elpd_i.std(correction=0).item()
    assert result.standard_error == pytest.approx(standard_error, rel=0.05)


def test_without_the_correction_it_is_not() -> None:
    """What says that the test above can fail: the same draws taken for the posterior's."""
    answer, result = exact(data()), approximate(data(), weighted=False)
    off = (result.elpd_i - answer.elpd_i).abs() / result.mcse_i
    assert off.max() > 10
    assert abs(result.p - (answer.lpd_i - answer.elpd_i).sum().item()) > 0.3


def test_the_monte_carlo_error_is_that_of_repetitions() -> None:
    """Of 200 repetitions; their spread is known to 5 %, and four times that is allowed."""
    y, generator = data(), torch.Generator().manual_seed(2)
    answer = exact(y)
    results = []
    for _ in range(200):
        noise = torch.randn(500, generator=generator).double()
        draws = answer.mean + answer.sd * noise
        results.append(loo(log_normal(y.double(), draws.unsqueeze(-1), 1.0)))
    spread = torch.stack([result.elpd_i for result in results]).std(0)
    stated = torch.stack([result.mcse_i for result in results]).mean(0)
    assert ((stated / spread - 1).abs() < 0.2).all()


def test_shapes_and_tables() -> None:
    log_likelihood = log_normal(torch.zeros(2, 3), torch.randn(100, 1, 1), 1.0)
    result = loo(log_likelihood, dims=("row", "column"))
    assert result.elpd_i.shape == result.khat.shape == (2, 3)
    table = result.summary()
    assert table.index.names == ["row", "column"]
    assert table["elpd"].sum() == pytest.approx(result.elpd) == table.attrs["elpd"]
    assert "of 6)" in repr(result)
    single = loo(log_likelihood[:, 0]).summary()
    assert single.index.name == "observation_dim_0"
    assert len(single) == 3


def test_draws_of_density_zero_do_not_count() -> None:
    """A model may be NaN or impossible where the guide still draws."""
    noise = torch.randn(500, 1, generator=torch.Generator().manual_seed(1)).double()
    log_likelihood = log_normal(data().double(), 0.3 * noise, 1.0)
    log_weights = 0.3 * noise[:, 0]
    impossible = torch.full((20, 12), -math.inf)
    more = loo(torch.cat([log_likelihood, impossible]), torch.cat([log_weights, impossible[:, 0]]))
    torch.testing.assert_close(
        more.elpd_i, loo(log_likelihood, log_weights).elpd_i, rtol=0, atol=2e-2
    )
    with pytest.raises(ValueError, match="must be finite at draws that log_weights give weight"):
        loo(torch.cat([log_likelihood, impossible]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5),), r"log_likelihood must have shape \(S, N, ...\), got \(5,\)"),
        ((torch.zeros(5, 2), torch.zeros(4)), r"log_weights must have shape \(5, ...\), got \(4,"),
        ((torch.full((5, 2), math.nan),), "log_likelihood must not hold NaN"),
        ((torch.zeros(5, 2), None, ["a", "b"]), r"dims must name 1 dimensions, \(2,\), got \['a'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loo(*arguments)


# Of a fitted guide


def result_of(model: Callable, num_draws: int = NUM_DRAWS) -> pf.VariationalPosterior:
    """Return the result of a normal guide that is off as above, instead of fitted."""
    guide = AutoDiagonalNormal(model)
    density = ModelDensity(model, guide, (HEIGHTS,))
    guide.loc.data.fill_(exact(HEIGHTS).mean + OFF * exact(HEIGHTS).sd)
    guide.scale = WIDTH * exact(HEIGHTS).sd.float().reshape(1)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(1), num_draws)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
def test_a_guide_that_is_off_is_corrected() -> None:
    """Five Monte Carlo errors of each of 4 numbers: a false alarm in 10^5 seeds."""
    result, answer = result_of(conjugate), exact(HEIGHTS)
    left_out = result.loo()
    assert left_out.dims == ("item",)
    assert ((left_out.elpd_i - answer.elpd_i).abs() < 5 * left_out.mcse_i).all()
    assert left_out.mcse_i.max() < 0.02
    assert left_out.is_reliable
    by_arviz = az.loo(result.to_arviz(num_prior_draws=2), pointwise=True)  # of plain draws
    off = np.abs(by_arviz.loo_i.values - answer.elpd_i.numpy())
    assert (off > 5 * left_out.mcse_i.numpy()).any()


def unfitted(model: Callable) -> pf.VariationalPosterior:
    """Return the result of a guide at its start: narrow, and where the prior is."""
    density = ModelDensity(model, realnvp(model), (HEIGHTS,))
    return pf.VariationalPosterior.from_guide(density, torch.zeros(1), 500)


def test_weights_that_cannot_be_trusted_are_told() -> None:
    assert not unfitted(conjugate).loo().is_reliable


def two_sites(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
    pyro.sample("total", dist.Normal(mean, 1.0), obs=y.sum())


def scaled(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("item", len(y)), pyro.poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_the_site_is_chosen() -> None:
    result = result_of(two_sites, num_draws=100)
    assert result.loo("y").elpd_i.shape == (4,)
    for site, message in (
        (None, r"one of the model's observed sites \['y', 'total'\], got None"),
        ("z", r"one of the model's observed sites \['y', 'total'\], got 'z'"),
        ("total", "'total' is one observation: .* belong in a pyro.plate"),
    ):
        with pytest.raises(ValueError, match=message):
            result.loo(site)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mixture, "sums discrete sites out"),
        (scaled, "likelihood of site 'y' is scaled"),
    ],
)
def test_dependent_and_scaled_observations_are_refused(model: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unfitted(model).loo()


# In ArviZ


# What arviz 0.23 uses of newer releases of pandas and matplotlib.
@pytest.mark.filterwarnings("ignore:The inplace keyword")
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_arviz_compares_and_plots() -> None:
    """A model of the data is ahead of one that knows of no spread of its mean."""

    def rigid(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(-2.0, 0.1))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    results = {model.__name__: result_of(model).loo() for model in (conjugate, rigid)}
    converted = {name: result.to_arviz() for name, result in results.items()}
    table = az.compare(converted)
    assert list(table.index) == ["conjugate", "rigid"]
    assert table.loc["conjugate", "elpd_loo"] == pytest.approx(results["conjugate"].elpd)
    assert table.loc["conjugate", "se"] == pytest.approx(results["conjugate"].standard_error)
    assert table.loc["rigid", "elpd_diff"] == pytest.approx(
        results["conjugate"].elpd - results["rigid"].elpd
    )
    one = results["conjugate"].to_arviz(coords={"item": list("abcd")})
    assert list(one["loo_i"].coords["item"].values) == list("abcd")
    np.testing.assert_allclose(one["pareto_k"].values, results["conjugate"].khat)
    az.plot_khat(one)
    plt.close("all")
