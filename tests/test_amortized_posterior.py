"""Amortized posteriors: solvers with a stated error, exact densities, modes, tables, exports."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, VelocityPosterior
from pyroflows.sbi.densities.flow_matching_density import FlowMatchingDensity
from pyroflows.sbi.model.observations import ObservationSpace
from pyroflows.transforms.continuous.trace import by_tangents
from tests.simulators import two_moons


def linear() -> None:
    """Draw from a model whose posterior is normal with known moments."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    mixed = torch.stack([theta[..., 0] + theta[..., 1], theta[..., 0]], -1)
    pyro.sample("x", dist.Normal(mixed, 0.5).to_event(1))


def exact(x: Tensor) -> dist.MultivariateNormal:
    """Return the posterior of `linear`."""
    A = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    covariance = torch.linalg.inv(torch.eye(2) + A.T @ A / 0.25)
    return dist.MultivariateNormal(x @ A @ covariance / 0.25, covariance)


def rate() -> None:
    """Draw a positive parameter, whose posterior is a gamma distribution."""
    theta = pyro.sample("theta", dist.Gamma(3.0, 1.0))
    pyro.sample("x", dist.Poisson(theta))


@cache
def solved() -> VelocityPosterior:
    """Return the posterior of `linear` as the regression alone knows it, exact up to that."""
    return FlowMatching(linear).fit(
        num_simulations=20_000, num_steps=1, learning_rate=1e-8, progress=False
    )


@cache
def trained() -> VelocityPosterior:
    """Return a posterior whose velocity is not linear."""
    return FlowMatching(two_moons, parameters=["theta"], width=32, num_blocks=2).fit(
        num_simulations=2000, num_steps=300, augment=False, progress=False
    )


def random_density(dim: int, double: bool = True, **solver: int) -> FlowMatchingDensity:
    """Return a density of random weights."""
    torch.manual_seed(1)
    density = FlowMatchingDensity(
        dim, ObservationSpace({"x": torch.Size([3])}), width=32, num_blocks=2, **solver
    )
    for parameter in density.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(density.network.output.weight, std=1.0)
    density = density.eval().requires_grad_(False)
    return density.double() if double else density


# Densities


@pytest.mark.parametrize("batch", [(), (4,), (5, 4)])
def test_divergence_is_the_trace_of_the_jacobian(batch: tuple[int, ...]) -> None:
    density = random_density(3)
    w = torch.randn(*batch, 3, dtype=torch.float64)
    # Three entries for the network and three for the marginals.
    for summary in (torch.randn(6).double(), torch.randn(*batch, 6).double()):
        for time in (torch.tensor(0.3).double(), torch.rand(batch).double()):
            expected = by_tangents(lambda t, w, s=summary: density.velocity(t, w, s))(time, w)[1]
            torch.testing.assert_close(density.divergence(time, w, summary), expected)


def test_log_prob_is_that_of_the_map_from_noise() -> None:
    """Against the determinant of the Jacobian of the draws in their noise."""
    density = random_density(3, num_steps=200)
    x = torch.randn(3, dtype=torch.float64)
    noise = torch.randn(3, 3, dtype=torch.float64)
    z, log_det = density.push(noise, x)
    # Rows do not mix: the Jacobian of their sum is that of each.
    jacobian = torch.autograd.functional.jacobian(lambda n: density.push(n, x)[0].sum(0), noise)
    jacobian = jacobian.transpose(0, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - jacobian.det().abs().log()
    torch.testing.assert_close(density.log_prob(z, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_det, jacobian.det().abs().log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(density.pull(z, x)[0], noise, rtol=1e-5, atol=1e-5)


def test_random_signs_estimate_the_trace_within_their_error() -> None:
    """Of 100 estimates, 4 standard errors with 63 degrees of freedom: alarm in 2 % of seeds."""
    density = random_density(12)
    x, z = torch.randn(3, dtype=torch.float64), torch.randn(100, 12, dtype=torch.float64)
    probed = density.with_solver(num_probes=64)
    estimate, error = probed.log_prob_and_error(z, x)
    scores = (estimate - density.log_prob(z, x)) / error
    assert scores.abs().max() < 4
    assert 0.8 < scores.std() < 1.25
    assert torch.equal(estimate, probed.log_prob(z, x))


def test_many_parameters_are_probed_by_default() -> None:
    assert random_density(65).num_probes > 0
    assert random_density(65).with_solver(num_probes=0).num_probes == 0
    density = random_density(3)
    x, z = torch.randn(3).double(), torch.randn(5, 3).double()
    assert density.num_probes == 0
    assert not density.log_prob_and_error(z, x)[1].any()


@pytest.mark.parametrize("num_points", [0, 1, 5000])
def test_parts_make_no_difference(num_points: int) -> None:
    density = random_density(2)
    z = torch.randn(num_points, 2, dtype=torch.float64)
    x = torch.randn(num_points, 3, dtype=torch.float64)
    log_prob = density.log_prob(z, x)
    assert log_prob.shape == (num_points,)
    if num_points:
        torch.testing.assert_close(log_prob[-1], density.log_prob(z[-1], x[-1]))


@pytest.mark.parametrize("num_points", [1, 30, 3000])
def test_each_observation_has_paths_and_densities_of_its_own(num_points: int) -> None:
    density = random_density(2)
    x = torch.randn(7, 3, dtype=torch.float64)
    noise = torch.randn(num_points, 7, 2, dtype=torch.float64)
    summary = density.encode(x)[1]
    ends = density.carry(noise, summary)
    alone = [density.carry(noise[:, i], summary[i]) for i in range(7)]
    torch.testing.assert_close(ends, torch.stack(alone, 1))
    log_prob = density.log_prob(noise, x)
    torch.testing.assert_close(log_prob[:, 3], density.log_prob(noise[:, 3], x[3]))
    several = density.log_prob(noise[0, 0], x)  # of one point, for each observation
    torch.testing.assert_close(several[3], density.log_prob(noise[0, 0], x[3]))


# Solvers


def test_the_error_of_the_solver_is_stated_truly() -> None:
    """Against many steps; half the steps have up to 8 times the error."""
    x = torch.tensor([0.1, -0.2])
    posterior = trained()
    error = posterior.solver_error(x=x)
    coarse = posterior.with_solver(num_steps=6).solver_error(x=x)
    assert 0 < error.mean <= error.largest < 0.05
    assert error.mean < coarse.mean / 2
    few, many = (
        posterior.with_solver(num_steps=n).sample(1000, x=x, seed=0)["theta"] for n in (6, 800)
    )
    true = ((few - many).abs() / many.std(0)).mean().item()
    assert coarse.mean == pytest.approx(true, rel=0.5)


def test_a_tolerance_makes_draws_exact() -> None:
    x = torch.tensor([[0.1, -0.2], [0.5, 0.5]])
    posterior = trained()
    many = posterior.with_solver(num_steps=400).sample(500, x=x, seed=0)["theta"]
    adaptive = posterior.with_solver(tolerance=1e-6)
    torch.testing.assert_close(adaptive.sample(500, x=x, seed=0)["theta"], many, rtol=0, atol=2e-4)
    log_prob = posterior.with_solver(num_steps=256).log_prob({"theta": many[:50]}, x=x)
    exact = adaptive.log_prob({"theta": many[:50]}, x=x)
    assert (log_prob - exact).abs().mean() < 0.01


def test_a_trajectory_leads_from_noise_to_the_draws() -> None:
    x = torch.tensor([[0.1, -0.2], [0.5, 0.5]])
    posterior = trained().with_solver(tolerance=1e-5)
    path = posterior.trajectory(300, (0.0, 0.5, 1.0), x=x, seed=0)["theta"]
    assert path.shape == (3, 300, 2, 2)
    draws = posterior.sample(300, x=x, seed=0)["theta"]
    torch.testing.assert_close(path[-1], draws, rtol=0, atol=1e-3)
    assert (path[0] - draws).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("num_samples", "times", "message"),
    [
        (0, (0.0, 1.0), "num_samples must be at least 1, got 0"),
        (5, (), "times must ascend between 0 and 1"),
        (5, (0.5, 0.5), "times must ascend between 0 and 1"),
        (5, (0.5, 1.5), "times must ascend between 0 and 1"),
    ],
)
def test_impossible_trajectories_are_refused(
    num_samples: int, times: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained().trajectory(num_samples, times, x=torch.zeros(2))


def test_impossible_solvers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"options of the solver are .*, got \['steps'\]"):
        solved().with_solver(steps=3)
    with pytest.raises(ValueError, match="num_probes must be 0 or at least 2, got 1"):
        solved().with_solver(num_probes=1)


# Modes


def test_the_mode_of_a_normal_posterior_is_its_mean() -> None:
    x = torch.tensor([[0.5, -1.0], [2.0, 1.0], [-3.0, 0.0]])
    mode = solved().map(x=x)["theta"]
    mean = solved().sample(20_000, x=x, seed=0)["theta"].mean(0)
    # 20 000 draws determine the mean to .007 standard deviations.
    assert ((mode - mean).abs() / exact(x).variance.sqrt()).max() < 0.03
    single = solved().map(x=x[1])["theta"]
    torch.testing.assert_close(single, mode[1], rtol=0, atol=5e-3)


def test_the_mode_is_that_in_the_parameters_own_space() -> None:
    """No point near it is higher, whatever the coordinates of the network."""
    posterior = FlowMatching(rate, width=32, num_blocks=2).fit(
        num_simulations=4000, num_steps=1000, augment=False, progress=False
    )
    x = torch.tensor(4.0)
    mode = posterior.map(x=x)["theta"]
    grid = torch.linspace(0.5, 12.0, 800)
    heights = posterior.log_prob({"theta": grid}, x=x)
    assert mode.item() == pytest.approx(grid[heights.argmax()].item(), abs=0.03)
    assert mode.item() == pytest.approx(3.0, abs=0.35)  # of Gamma(7, 2)


# Tables and exports


def test_summary_tabulates_each_observation() -> None:
    x = torch.tensor([[0.5, -1.0], [2.0, 1.0]])
    table = solved().summary(x=x)
    assert list(table.columns) == ["mean", "sd", "q05", "median", "q95"]
    assert table.index.names[0] == "observation"
    assert table.loc[(1, "theta[0]"), "mean"] == pytest.approx(exact(x[1]).mean[0].item(), abs=0.1)
    assert list(solved().summary(x=x[0]).index) == ["theta[0]", "theta[1]"]


def test_a_batch_is_a_dimension_in_arviz() -> None:
    x = torch.tensor([[0.5, -1.0], [2.0, 1.0], [0.0, 0.0]])
    data = solved().to_arviz(x=x, num_samples=20, seed=0)
    assert data["posterior"]["theta"].dims == ("chain", "draw", "observation", "theta_dim_0")
    assert data["posterior"]["theta"].shape == (1, 20, 3, 2)
    assert data["sample_stats"]["lp"].dims == ("chain", "draw", "observation")
    assert data["observed_data"]["x"].dims == ("observation", "x_dim_0")
    theta = torch.as_tensor(data["posterior"]["theta"].to_numpy()[0])
    lp = solved().log_prob({"theta": theta}, x=x)
    assert np.allclose(data["sample_stats"]["lp"][0], lp, atol=1e-4)
    single = solved().to_arviz(x=x[0], num_samples=20)
    assert single["sample_stats"]["lp"].dims == ("chain", "draw")
