"""Posterior predictive checks: right tail probabilities, misfits found, ArviZ groups."""

from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, PredictiveCheck, predictive_check
from tests.simulators import conjugate

N = 2000


def vector(scale: float = 1.0) -> None:
    """Draw three noisy copies of a parameter."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta.unsqueeze(-1).expand(*theta.shape, 3), scale).to_event(1))


def several() -> None:
    """Draw two sites of different shapes."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta, 1.0).to_event(1))
    pyro.sample("count", dist.Poisson(theta.sum(-1).exp()))


def check(x: Any = None, model: Any = vector, draws: Any = None, **options: Any) -> PredictiveCheck:
    draws = {"theta": torch.zeros(N)} if draws is None else draws
    x = torch.zeros(3) if x is None else x
    return predictive_check(draws, model, x=x, progress=False, **options)


def test_tail_probabilities_of_entries_are_those_of_the_model() -> None:
    """At theta = 0 each entry is standard normal: 5 errors of 2000 draws, doubled, are .11."""
    x = torch.tensor([0.0, 1.0, -2.0])
    p_values = check(x).p_values
    expected = 2 * dist.Normal(0.0, 1.0).cdf(-x.abs())
    assert list(p_values) == ["x[0]", "x[1]", "x[2]"]
    for p, exact in zip(p_values.values(), expected.tolist()):
        assert p == pytest.approx(exact, abs=2 * 5 * (exact / 2 * (1 - exact / 2) / N) ** 0.5)


def test_tail_probabilities_are_never_zero_nor_above_one() -> None:
    p_values = check(torch.tensor([100.0, -100.0, 0.0])).p_values
    assert p_values["x[0]"] == p_values["x[1]"] == pytest.approx(2 / (N + 1))
    assert check(torch.zeros(3), kwargs={"scale": 1e-9}).p_values["x[0]"] <= 1


def test_plates_give_moments_and_extremes() -> None:
    """Three points of variance 1, observed with a spread of 5: mean right, extremes wrong."""
    x = torch.tensor([-5.0, 0.0, 5.0])
    result = check(x, conjugate, {"mean": torch.zeros(N)})
    assert set(result.p_values) == {f"{name}(x)" for name in ("mean", "sd", "min", "max")}
    assert result.p_values["mean(x)"] > 0.5
    assert all(result.p_values[f"{name}(x)"] < 0.01 for name in ("sd", "min", "max"))
    assert "smallest p-value" in repr(result)


def test_plates_of_another_size_need_its_argument() -> None:
    draws, x = {"mean": torch.zeros(100)}, torch.zeros(7)
    assert len(check(x, conjugate, draws, args=(7,)).simulations) == 100
    with pytest.raises(ValueError, match=r"'x' has shape \(3,\) in the simulator, got x of shape"):
        check(x, conjugate, draws)


def test_statistics_of_the_user() -> None:
    statistics = {"range": lambda x: x.amax(-1) - x.amin(-1)}
    result = check(torch.tensor([0.0, 0.0, 20.0]), statistics=statistics)
    assert result.observed_statistics == {"range": 20.0}
    assert result.p_values["range"] == pytest.approx(2 / (N + 1))
    table = result.summary()
    assert list(table.index) == ["range"]
    assert list(table.columns) == ["observed", "mean", "sd", "5%", "95%", "p_value"]
    assert table.loc["range", "5%"] < table.loc["range", "mean"] < table.loc["range", "95%"]


def test_several_sites() -> None:
    x = {"x": torch.zeros(2), "count": torch.tensor(400)}
    draws = {"theta": torch.zeros(N, 2)}
    result = check(x, several, draws)
    assert list(result.p_values) == ["x[0]", "x[1]", "count"]
    assert result.p_values["count"] < 0.01 < result.p_values["x[0]"]
    statistics = {"sum": lambda values: values["x"].sum(-1) + values["count"]}
    assert check(x, several, draws, statistics=statistics).observed_statistics == {"sum": 400.0}


def test_a_posterior_is_sampled_and_the_seed_determines_all() -> None:
    posterior = FlowMatching(vector, width=16, num_blocks=1).fit(
        num_simulations=300, num_steps=20, progress=False
    )
    one, other = (
        predictive_check(
            posterior, vector, x=torch.zeros(3), num_samples=50, seed=3, progress=False
        )
        for _ in range(2)
    )
    assert len(one.simulations) == 50
    assert one.p_values == other.p_values
    drawn = posterior.sample(50, x=torch.zeros(3), seed=3)["theta"]
    assert torch.equal(one.simulations.parameters["theta"], drawn)


def test_entries_that_are_missing_do_not_count() -> None:
    assert list(check(torch.tensor([0.0, torch.nan, 1.0])).p_values) == ["x[0]", "x[2]"]
    result = check(torch.tensor([0.0, torch.nan, 1.0]), conjugate, {"mean": torch.zeros(N)})
    assert result.observed_statistics["mean(x)"] == 0.5


def test_arviz_groups_fit_together() -> None:
    data = check(torch.tensor([0.0, 1.0, 2.0]), draws={"theta": torch.zeros(40)}).to_arviz()
    assert data["posterior"]["theta"].shape == (1, 40)
    replicated, observed = data["posterior_predictive"]["x"], data["observed_data"]["x"]
    assert replicated.shape == (1, 40, 3)
    assert replicated.dims[2:] == observed.dims
    assert np.allclose(observed, [0.0, 1.0, 2.0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # arviz and matplotlib disagree
def test_arviz_plots_them() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    data = check(torch.arange(3.0), draws={"theta": torch.zeros(40)}).to_arviz()
    plot = az.plot_ppc if hasattr(az, "plot_ppc") else az.plot_ppc_dist
    plot(data)
    plt.close("all")


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (lambda x: x, r"must return shape \(1,\) for 1 observations, got \(1, 3\)"),
        (lambda x: x.mean(), r"must return shape \(1,\) for 1 observations, got \(\)"),
        (lambda x: x.sum(-1) * torch.nan, "is not finite for any simulated observation"),
    ],
)
def test_wrong_statistics_are_refused(statistic: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(statistics={"wrong": statistic})


def test_a_statistic_that_is_nan_for_the_observation_is_refused() -> None:
    x = torch.tensor([0.0, torch.nan, 1.0])
    with pytest.raises(ValueError, match=r"statistics\['mean'\] must be a number for x, got NaN"):
        check(x, statistics={"mean": lambda x: x.mean(-1)})


def test_unknown_sites_are_refused() -> None:
    def observe(x: dict[str, Tensor]) -> None:
        check(x)

    with pytest.raises(ValueError, match=r"observed \['y'\] are not sites"):
        observe({"y": torch.zeros(3)})
