"""The case studies with latent paths and units: their exact answers, and their runs."""

import json
import math
import subprocess
import sys

import arviz as az
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import halfnorm, norm, poisson

from case_studies import amortized, boltzmann, brownian
from tests.reference import needs_reference
from tests.reference.exact import brownian_motion


def run(name, out):
    command = [sys.executable, "-m", f"case_studies.{name}", "--fast", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for picture in out.glob("*.png"):
        assert picture.stat().st_size > 5000
    return json.loads((out / "metrics.json").read_text())


# Brownian motion


def test_the_exact_path_is_that_of_normal_distributions_of_all_readings():
    """The same sum over the same nodes, by the covariance of path and readings at each node."""
    y = brownian.simulate_path()[1].double()
    exact = brownian.exact_posterior(y, num_nodes=25)
    times = torch.arange(1, 31).double()
    covariance = torch.minimum(times, times.unsqueeze(-1))
    seen = torch.tensor(brownian.SEEN)
    log_mass, moments = [], []
    for log_scales in torch.cartesian_prod(*exact.axes):
        innovation, observation = log_scales.exp()
        path = innovation**2 * covariance
        noise = observation**2 * torch.eye(20).double()
        readings = dist.MultivariateNormal(torch.zeros(20).double(), path[seen][:, seen] + noise)
        prior = dist.Normal(0.0, 2.0).log_prob(log_scales).sum()
        log_mass.append(prior + readings.log_prob(y))
        gain = torch.linalg.solve(readings.covariance_matrix, path[seen]).T
        mean = gain @ y
        variance = (path - gain @ path[seen]).diagonal()
        moments.append(torch.stack([mean, variance + mean.square()]))
    log_mass, moments = torch.stack(log_mass), torch.stack(moments)
    cell = math.log((exact.axes[0][1] - exact.axes[0][0]).item()) * 2
    assert exact.log_evidence == pytest.approx(log_mass.logsumexp(0).item() + cell, abs=1e-9)
    first, second = torch.einsum("n,nmt->mt", log_mass.softmax(0), moments)
    torch.testing.assert_close(exact.mean[2:], first)
    torch.testing.assert_close(exact.sd[2:], (second - first.square()).sqrt())


def test_a_finer_grid_of_scales_changes_nothing():
    y = brownian.simulate_path()[1]
    coarse, fine = (brownian.exact_posterior(y, nodes) for nodes in (200, 300))
    assert coarse.log_evidence == pytest.approx(fine.log_evidence, abs=1e-5)
    torch.testing.assert_close(coarse.mean, fine.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(coarse.sd, fine.sd, rtol=0, atol=1e-5)


@needs_reference
def test_the_exact_path_agrees_with_a_known_one():
    target = brownian_motion()
    y, observed = target.args
    assert observed.nonzero().squeeze(-1).tolist() == brownian.SEEN
    exact = brownian.exact_posterior(y[observed])
    assert exact.log_evidence == pytest.approx(target.log_evidence, abs=1e-4)
    for i, moment in enumerate(target.moments.values()):
        assert exact.mean[i].item() == pytest.approx(moment.mean, abs=1e-3)
        assert exact.sd[i].item() == pytest.approx(moment.standard_deviation, abs=1e-3)


@pytest.mark.slow
def test_brownian_in_fast_mode(tmp_path):
    metrics = run("brownian", tmp_path)
    assert set(metrics) == set(brownian.GUIDES)
    for values in metrics.values():
        assert values["gap"] > -5 * values["standard error"]
    # Normal distributions do not come closer than 1.8 nats.
    assert metrics["spline"]["gap"] < 1 < metrics["full-rank normal"]["gap"]
    assert metrics["spline"]["worst mean of path"] < 0.5
    assert {path.name for path in tmp_path.glob("*.png")} == {"paths.png", "scales.png"}
    data = az.from_netcdf(tmp_path / "brownian.nc")
    assert data.posterior["x"].dims == ("chain", "draw", "time")


# The Boltzmann machine


@pytest.fixture(scope="module")
def exact():
    return boltzmann.Exact(boltzmann.build_machine())


def test_the_sum_over_states_is_the_integral_over_hidden_units(exact):
    cell = (2 * boltzmann.BOUND / boltzmann.CELLS) ** 2
    log_density = exact.log_density(exact.points)
    integral = log_density.logsumexp(0).item() + math.log(cell / (2 * math.pi))
    assert exact.log_z == pytest.approx(integral, abs=1e-5)
    spins = exact.machine.inputs(exact.points).tanh()
    torch.testing.assert_close(exact.density @ spins, exact.magnetization, rtol=0, atol=1e-5)


def test_modes_are_where_the_density_is_level_and_highest(exact):
    assert len(exact.modes) == 4
    assert exact.shares.sum().item() == pytest.approx(1)
    assert exact.shares.min() > 0.1
    modes = exact.modes.clone().requires_grad_()
    (slope,) = torch.autograd.grad(exact.log_density(modes).sum(), modes)
    assert slope.abs().max() < 0.01  # modes are rounded to three decimals
    angles = torch.linspace(0, 2 * math.pi, 50).double()
    around = exact.modes.unsqueeze(1) + 0.1 * torch.stack([angles.cos(), angles.sin()], -1)
    assert (exact.log_density(around) < exact.log_density(exact.modes).unsqueeze(1)).all()


def test_gibbs_sampling_leaves_the_exact_distribution_as_it_is(exact):
    """Draws of the exact mixture, one sweep later, have the same shares and magnetization.

    Of 20 000 independent draws; five standard errors of a share are at most .018, those of a
    magnetization .036.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        index = torch.multinomial(exact.density, 20_000, replacement=True)
        found = exact.compare(exact.machine.sweep(exact.points[index]))
    np.testing.assert_allclose(found["shares"], exact.shares.numpy(), atol=0.018)
    assert found["worst magnetization"] < 0.036


def test_weak_couplings_are_a_standard_normal_and_free_spins():
    fields = torch.tensor([0.3, -0.2, 0.0])
    exact = boltzmann.Exact(boltzmann.Machine(torch.full((3, 2), 1e-4), fields))
    assert exact.log_z == pytest.approx((2 * fields.cosh()).log().sum().item(), abs=1e-5)
    torch.testing.assert_close(exact.magnetization.float(), fields.tanh(), rtol=0, atol=1e-5)
    assert len(exact.modes) == 1


@pytest.mark.slow
def test_boltzmann_in_fast_mode(tmp_path):
    metrics = run("boltzmann", tmp_path)
    assert np.isclose(sum(metrics["exact"]["shares"]), 1)
    as_usual, cooled = (metrics[name] for name in boltzmann.FITS)
    shares, kept = np.array(metrics["exact"]["shares"]), np.array(as_usual["shares"]) > 0.01
    assert not kept.all()
    assert as_usual["gap"] > -math.log(shares[kept].sum()) - 0.1
    np.testing.assert_allclose(cooled["weighted"]["shares"], shares, atol=0.05)
    assert cooled["gap"] < as_usual["gap"]
    assert len(metrics["Gibbs chains"]["shares"]) == boltzmann.NUM_CHAINS
    assert "hidden" in az.from_netcdf(tmp_path / "boltzmann.nc").posterior


# Amortized inference


def joint(z, count, loc, scale):
    return poisson.pmf(count, math.exp(z)) * norm.pdf(z, loc, scale)


def test_the_evidence_of_the_counts_is_that_of_adaptive_quadrature():
    """By the rule of Bayes at the likeliest pair: prior times likelihood over posterior."""
    counts = amortized.simulate(500, seed=0)
    exact = amortized.exact_posterior(counts)
    best = exact.weights.argmax()
    loc, scale = exact.loc[best].item(), exact.scale[best].item()
    steps = [values.unique().diff()[0] for values in (exact.loc, exact.scale)]
    log_posterior = (exact.weights[best] / (steps[0] * steps[1])).log().item()
    log_likelihood = sum(
        number * math.log(quad(joint, -8, 6, args=(count, loc, scale), points=[1])[0])
        for count, number in zip(*map(torch.Tensor.tolist, counts.unique(return_counts=True)))
    )
    log_prior = norm.logpdf(loc, 0, 3) + halfnorm.logpdf(scale, 0, 2)
    expected = log_prior + log_likelihood - log_posterior
    assert exact.log_evidence == pytest.approx(expected, abs=1e-5)
    # 500 counts of unit information or so know both to a few percent.
    assert abs(exact.moments("loc")[0] - amortized.LOC) < 5 * exact.moments("loc")[1] < 0.5
    assert abs(exact.moments("scale")[0] - amortized.SCALE) < 5 * exact.moments("scale")[1] < 0.5


def test_the_rate_of_a_new_count_is_that_of_adaptive_quadrature():
    z = torch.linspace(-8, 9, 681).double()
    pair = (torch.tensor([1.1]).double(), torch.tensor([0.7]).double())
    exact = amortized.Exact(0.0, *pair, torch.ones(1).double(), z)
    mass = exact.local(3)
    total = quad(joint, -8, 6, args=(3, 1.1, 0.7))[0]
    mean = quad(lambda z: z * joint(z, 3, 1.1, 0.7), -8, 6)[0] / total
    assert mass.sum().item() == pytest.approx(1)
    assert (mass @ z).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.slow
def test_amortized_in_fast_mode(tmp_path):
    metrics = run("amortized", tmp_path)
    assert set(metrics["posterior"]) == {
        "loc",
        "scale",
        *(f"z | {count}" for count in amortized.NEW_COUNTS),
    }
    assert metrics["gap for each datum"] < 0.01
    for name, row in metrics["posterior"].items():
        assert abs(row["error of mean, in sd"]) < (3 if name in ("loc", "scale") else 0.5)
        assert 0.4 < row["ratio of sd"] < 1.6
    assert {path.name for path in tmp_path.glob("*.png")} == {"elbo.png", "new_counts.png"}
    data = az.from_netcdf(tmp_path / "amortized.nc")
    assert data.posterior["z"].dims == ("chain", "draw", "place")
