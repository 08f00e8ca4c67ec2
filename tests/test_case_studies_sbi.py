"""The case studies of simulation-based inference: simulators, exact answers, runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.stats import kstest
from torch import Tensor

from case_studies import black_box, epidemic, exchangeable, predator_prey, slcp, two_moons

REFERENCE = os.environ.get("PYROFLOWS_REFERENCE_DIR")
needs_reference = pytest.mark.skipif(
    REFERENCE is None, reason="PYROFLOWS_REFERENCE_DIR names no folder of reference posteriors"
)
P_VALUE = 1e-4  # false alarms of each test of a distribution


def reference(task: str, index: int) -> tuple[Tensor, Tensor]:
    """Return an observation of a benchmark and draws from its posterior."""
    file = np.load(Path(REFERENCE or "") / "sbibm" / f"{task}.npz")
    return tuple(
        torch.from_numpy(file[name][index]).float()
        for name in ("observations", "reference_posterior_samples")
    )


def log_prob_sum(model, values: dict[str, Tensor]) -> float:
    """Return the log-density of a model at given values of all sites."""
    return pyro.poutine.trace(pyro.condition(model, values)).get_trace().log_prob_sum().item()


def standard_errors(draws: Tensor, others: Tensor) -> Tensor:
    """Return differences of means, in their standard errors."""
    error = (draws.var(0) / len(draws) + others.var(0) / len(others)).sqrt()
    return (draws.mean(0) - others.mean(0)) / error


# Two moons


def test_exact_draws_of_two_moons_come_from_the_crescent():
    """For this observation no part of a crescent lies outside of the prior."""
    theta = two_moons.exact_draws(torch.zeros(2), 5000, seed=1)
    first, second = theta.T.double()
    point = torch.stack([(first + second).abs(), first - second], -1) / 2**0.5
    offset = point - torch.tensor([0.25, 0.0])
    radius, angle = offset.norm(dim=-1), torch.atan2(offset[:, 1], offset[:, 0])
    assert kstest(radius, "norm", args=(0.1, 0.01)).pvalue > P_VALUE
    assert kstest(angle, "uniform", args=(-np.pi / 2, np.pi)).pvalue > P_VALUE
    share = (first + second > 0).double().mean().item()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 5000**0.5)


@needs_reference
@pytest.mark.parametrize("index", range(3))
def test_exact_draws_of_two_moons_agree_with_the_benchmark(index):
    x, theta = reference("two_moons", index)
    draws = two_moons.exact_draws(x, 10_000, seed=1)
    for values, others in zip((draws.T, draws.sum(-1)), (theta.T, theta.sum(-1)), strict=True):
        pairs = zip(torch.atleast_2d(values), torch.atleast_2d(others), strict=True)
        assert all(kstest(*pair).pvalue > P_VALUE for pair in pairs)


# Epidemic


def test_nobody_is_lost_in_an_epidemic():
    beta, gamma = epidemic.BETA.sample((50,)), epidemic.GAMMA.sample((50,))
    shares = epidemic.compartments(beta, gamma, epidemic.ALL_DAYS)
    assert shares.shape == (50, 160, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(50, 160), rtol=0, atol=1e-5)
    assert shares.min() > -1e-5
    assert (shares[..., 0].diff() <= 1e-6).all()
    assert (shares[..., 2].diff() >= -1e-6).all()


def test_an_epidemic_agrees_with_an_adaptive_solver():
    beta, gamma = torch.tensor([0.3, 0.9]), torch.tensor([0.12, 0.2])
    shares = epidemic.compartments(beta, gamma)
    for i in range(2):
        b, g = beta[i].item(), gamma[i].item()
        solution = solve_ivp(
            lambda _, y, b=b, g=g: [-b * y[0] * y[1], b * y[0] * y[1] - g * y[1], g * y[1]],
            (0, 160),
            [1 - 1e-6, 1e-6, 0],
            t_eval=epidemic.TEST_DAYS.numpy(),
            rtol=1e-9,
            atol=1e-12,
        )
        np.testing.assert_allclose(shares[i].numpy(), solution.y.T, rtol=0, atol=3e-4)


def test_the_grid_of_the_epidemic_has_the_density_of_the_model():
    x = epidemic.observe(0)
    log_rates = torch.tensor([[-1.2, -2.1], [-1.1, -2.0]])
    joint = epidemic._log_joint(log_rates, x)
    for i, (beta, gamma) in enumerate(log_rates.exp()):
        density = log_prob_sum(epidemic.epidemic, {"beta": beta, "gamma": gamma, "x": x})
        expected = density + log_rates[i].sum().item()
        assert joint[i].item() == pytest.approx(expected, abs=1e-2)


def test_exact_draws_of_the_epidemic_surround_the_truth():
    draws = epidemic.stack(epidemic.exact_draws(epidemic.observe(0), 4000))
    truth = epidemic.stack(epidemic.TRUTH)
    assert ((draws.mean(0) - truth) / draws.std(0)).abs().max() < 4
    assert draws[:, 2].std() < 0.1  # hundreds of counted cases know the ratio to some percent


# Predators and prey


def test_populations_agree_with_an_adaptive_solver():
    rates = {
        name: torch.tensor([value, 1.3 * value]) for name, value in predator_prey.TRUTH.items()
    }
    sizes = predator_prey.populations(rates)
    assert sizes.shape == (2, 10, 2)
    for i in range(2):
        a, b, c, d = (rates[name][i].item() for name in predator_prey.NAMES)
        solution = solve_ivp(
            lambda _, y, a=a, b=b, c=c, d=d: [
                a * y[0] - b * y[0] * y[1],
                d * y[0] * y[1] - c * y[1],
            ],
            (0, 20),
            predator_prey.START,
            t_eval=predator_prey.TIMES.numpy(),
            rtol=1e-10,
            atol=1e-10,
        )
        np.testing.assert_allclose(sizes[i].numpy(), solution.y.T, rtol=2e-3)


def test_populations_keep_what_the_equations_conserve():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = {name: prior.sample((200,)) for name, prior in predator_prey.PRIOR.items()}
    double = {name: value.double() for name, value in rates.items()}
    sizes = predator_prey.populations(double, predator_prey.TIMES.double())
    growth, predation, mortality, reproduction = (
        double[name].unsqueeze(-1) for name in predator_prey.NAMES
    )

    def conserved(prey: Tensor, predators: Tensor) -> Tensor:
        eaten = reproduction * prey - mortality * prey.log()
        return eaten + predation * predators - growth * predators.log()

    start = conserved(*torch.tensor(predator_prey.START, dtype=torch.float64))
    change = conserved(*sizes.unbind(-1)) - start
    assert (change.abs() / (1 + start.abs())).max() < 0.01


# Points in a plate


def test_the_conjugate_posterior_is_that_of_the_model():
    """Draws from the prior, weighted by the likelihood, have the same moments."""
    x = torch.tensor([0.3, 1.4, -0.2, 0.9, 1.1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        variance = dist.InverseGamma(exchangeable.SHAPE, exchangeable.RATE).sample((400_000,))
        mean = (variance / exchangeable.STRENGTH).sqrt() * torch.randn(400_000)
    likelihood = dist.Normal(mean, variance.sqrt()).log_prob(x.unsqueeze(-1)).sum(0)
    weights = likelihood.double().softmax(0).unsqueeze(-1)
    theta = torch.stack([mean, variance.log()], -1).double()
    draws = exchangeable.exact_draws(x, 100_000).double()
    number = 1 / weights.square().sum()
    for power in (1, 2):
        expected = (weights * theta**power).sum(0)
        error = (draws**power).std(0) * (1 / number + 1 / len(draws)).sqrt()
        assert ((draws**power).mean(0) - expected).abs().lt(5 * error).all()


# A queue


def test_a_queue_served_by_hand():
    arrivals, services = np.array([1.0, 2.0, 10.0]), np.array([3.0, 1.0, 2.0])
    assert black_box.departures(arrivals, services).tolist() == [4.0, 5.0, 12.0]


def test_nobody_leaves_sooner_than_served():
    generator = np.random.default_rng(0)
    arrivals, services = np.cumsum(generator.exponential(2, 500)), generator.uniform(1, 3, 500)
    leaving = black_box.departures(arrivals, services)
    assert (np.diff(leaving) >= services[1:] - 1e-9).all()
    assert (leaving >= arrivals + services - 1e-9).all()
    # A server who always has somebody waiting is never idle.
    assert black_box.departures(np.zeros(500), services)[-1] == pytest.approx(services.sum())


# SLCP


def test_the_likelihood_of_slcp_is_that_of_the_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta, x = 6 * torch.rand(20, 5) - 3, slcp.observe(0)
    log_prior = -5 * np.log(2 * slcp.BOUND)
    for row, value in zip(theta, slcp.log_likelihood(theta, x), strict=True):
        expected = log_prob_sum(slcp.slcp, {"theta": row, "x": x}) - log_prior
        assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-2)


@needs_reference
def test_exact_draws_of_slcp_agree_with_the_benchmark():
    x, theta = reference("slcp", 0)
    draws, number = slcp.exact_draws(x.reshape(4, 2), 10_000, num_prior_draws=4_000_000)
    assert number > 500
    features, others = (torch.cat([v, v.square()], -1) for v in (draws, theta))
    inflation = 1 + 10_000 / number  # of the variance: draws are repeated
    assert standard_errors(features, others).abs().max() < 5 * inflation**0.5


# Runs


def run(name: str, out: Path) -> dict:
    """Run a case study in fast mode; return its metrics."""
    command = [sys.executable, "-m", f"case_studies.{name}", "--fast", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for picture in out.glob("*.png"):
        assert picture.stat().st_size > 5000
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
def test_two_moons_in_fast_mode(tmp_path):
    metrics = run("two_moons", tmp_path)
    assert len(metrics["C2ST"]) == len(two_moons.OBSERVATIONS)
    assert 0.45 < metrics["mean C2ST"] < 0.85
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "calibration.png",
        "flow.png",
        "posteriors.png",
    }
    data = az.from_netcdf(tmp_path / "two_moons.nc")
    assert data.posterior["theta"].shape == (1, 1000, 2)


@pytest.mark.slow
def test_epidemic_in_fast_mode(tmp_path):
    metrics = run("epidemic", tmp_path)
    assert 0.45 < metrics["C2ST"] < 0.8
    assert abs(metrics["reproduction number, mean"] - 2.5) < 0.5
    assert min(metrics["predictive p-values"].values()) > P_VALUE
    assert "beta" in az.from_netcdf(tmp_path / "epidemic.nc").posterior


@pytest.mark.slow
def test_predator_prey_in_fast_mode(tmp_path):
    metrics = run("predator_prey", tmp_path)
    assert metrics["weighted draws"] == predator_prey.NUM_WEIGHTED
    assert metrics["ess"] > 1
    assert set(metrics["summary"]) == set(predator_prey.NAMES)
    assert "log_weight" in az.from_netcdf(tmp_path / "predator_prey.nc").sample_stats


@pytest.mark.slow
def test_exchangeable_in_fast_mode(tmp_path):
    metrics = run("exchangeable", tmp_path)["by size"]
    assert set(metrics) == {str(size) for size in exchangeable.SIZES}
    for found in metrics.values():
        # The prior alone would have ratios of 3 to 13, and be up to 7 posterior sds off.
        assert abs(found["errors of means, in posterior sds"]["mean"]) < 1.5
        assert 0.5 < found["ratios of sds"]["mean"] < 2.5
    assert (tmp_path / "posteriors.png").exists()


@pytest.mark.slow
def test_black_box_in_fast_mode(tmp_path):
    metrics = run("black_box", tmp_path)
    assert metrics["simulations"] == 3000
    assert metrics["same without pool"]
    assert metrics["impossible draws"] < 0.4
    for name, value in black_box.TRUTH.items():
        error = metrics["posterior means"][name] - value
        assert abs(error) < 5 * metrics["posterior sds"][name]
    assert len([*tmp_path.glob("simulations-*/*.safetensors")]) == 10


@pytest.mark.slow
def test_slcp_in_fast_mode(tmp_path):
    metrics = run("slcp", tmp_path)
    assert metrics["effective number of exact draws"] > 5000
    assert metrics["NeuralLikelihood"]["C2ST"] < 0.7
    assert metrics["NeuralLikelihood"]["C2ST"] < metrics["FlowMatching"]["C2ST"]
