"""Estimators: right posteriors on conjugate models, batches, storage, errors."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, NeuralPosterior, Posterior, simulate
from tests.simulators import conjugate, two_moons

SMALL: dict[type, dict] = {
    FlowMatching: {"width": 32, "num_blocks": 2},
    NeuralPosterior: {"flow": "maf", "num_layers": 2, "hidden_dims": (16,)},
}
ESTIMATORS = tuple(SMALL)


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


@cache
def trained(estimator: Callable, model: Callable = linear) -> Posterior:
    """Train once, for all tests that only look."""
    return estimator(model, **SMALL[estimator]).fit(
        num_simulations=4000, num_steps=400, augment=False, progress=False
    )


@pytest.fixture(params=ESTIMATORS)
def estimator(request: pytest.FixtureRequest) -> Callable:
    return request.param


# Right answers


def test_the_posterior_of_a_linear_model_is_exact(estimator: Callable) -> None:
    """4000 pairs determine the regression to 1.6 %; draws add 1 %: 5 errors are .1."""
    x = torch.tensor([[0.5, -1.0], [2.0, 1.0], [-3.0, 0.0]])
    draws = trained(estimator).sample(10_000, x=x, seed=0)["theta"]
    posterior = exact(x)
    scale = posterior.variance.sqrt()
    assert ((draws.mean(0) - posterior.mean) / scale).abs().max() < 0.2
    assert (draws.std(0) / scale - 1).abs().max() < 0.1
    for i in range(3):
        correlation = torch.corrcoef(draws[:, i].T)[0, 1]
        expected = posterior.covariance_matrix[i, 0, 1] / (scale[i, 0] * scale[i, 1])
        assert abs(correlation - expected) < 0.1


def test_a_linear_model_is_solved_before_any_training() -> None:
    """One step with a tiny rate: regression and the field of a normal variable do it all."""
    posterior = FlowMatching(linear).fit(
        num_simulations=20_000, num_steps=1, learning_rate=1e-8, progress=False
    )
    x = torch.tensor([0.5, -1.0])
    theta = exact(x).sample((2000,))
    difference = exact(x).log_prob(theta) - posterior.log_prob({"theta": theta}, x=x)
    assert difference.abs().max() < 0.1


def test_the_density_is_that_of_the_draws(estimator: Callable) -> None:
    x = torch.tensor([0.5, -1.0])
    theta = exact(x).sample((500,))
    log_prob = trained(estimator).log_prob({"theta": theta}, x=x)
    assert log_prob.shape == (500,)
    # The mean difference is the divergence from the exact posterior.
    difference = exact(x).log_prob(theta) - log_prob
    assert difference.mean().abs() < 0.05
    assert difference.std() < 0.2


@pytest.mark.parametrize("model", [linear, two_moons])
def test_the_density_integrates_to_one(model: Callable, estimator: Callable) -> None:
    """On a square that holds the posterior, in the parameters' own space."""
    options = {"parameters": ["theta"]} if model is two_moons else {}
    posterior = estimator(model, **options, **SMALL[estimator]).fit(
        num_simulations=1000, num_steps=60, progress=False
    )
    reach = 1.0 if model is two_moons else 5.0
    axis = torch.linspace(-reach, reach, 102)[1:-1]
    theta = torch.cartesian_prod(axis, axis)
    density = posterior.log_prob({"theta": theta}, x=torch.tensor([0.1, 0.2])).exp()
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1.0, abs=0.03)


def test_a_set_gives_the_conjugate_posterior() -> None:
    """The posterior of a mean given n points is normal: mean n/(n+1) x, variance 1/(n+1)."""
    posterior = trained(FlowMatching, conjugate)
    x = torch.tensor([1.0, 0.2, 1.8])
    draws = posterior.sample(10_000, x=x, seed=0)["mean"]
    assert draws.mean().item() == pytest.approx(0.75, abs=0.1)
    assert draws.std().item() == pytest.approx(0.5, abs=0.05)
    again = posterior.sample(10_000, x=x.flip(0), seed=0)["mean"]
    torch.testing.assert_close(draws, again, rtol=0, atol=1e-4)


def test_nothing_leaves_the_prior(estimator: Callable) -> None:
    posterior = estimator(two_moons, parameters=["theta"], **SMALL[estimator]).fit(
        num_simulations=1000, num_steps=30, progress=False
    )
    with pytest.warns(UserWarning, match="outside of what was simulated"):
        theta = posterior.sample(2000, x=torch.tensor([5.0, -5.0]))["theta"]
    assert (theta.abs() < 1).all()


# Manners


def test_batches_of_observations(estimator: Callable) -> None:
    posterior = trained(estimator)
    for batch in ((), (3,), (2, 3)):
        x = torch.zeros(*batch, 2)
        theta = posterior.sample(7, x=x)["theta"]
        assert theta.shape == (7, *batch, 2)
        assert posterior.log_prob({"theta": theta}, x=x).shape == (7, *batch)


def test_the_seed_determines_training_and_draws(estimator: Callable) -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)  # of no consequence
        posterior = estimator(linear, **SMALL[estimator]).fit(
            num_simulations=600, num_steps=20, progress=False, seed=3
        )
        return posterior.sample(10, x=torch.zeros(2), seed=5)["theta"]

    assert torch.equal(run(0), run(1))


def test_simulations_can_be_given(estimator: Callable) -> None:
    simulations = simulate(linear, 600, progress=False, seed=3)
    one, other = (
        estimator(linear, **SMALL[estimator]).fit(**how, num_steps=10, progress=False, seed=3)
        for how in ({"simulations": simulations}, {"num_simulations": 600})
    )
    draws = [posterior.sample(10, x=torch.zeros(2), seed=5)["theta"] for posterior in (one, other)]
    assert torch.equal(*draws)


def test_survives_a_file(estimator: Callable, tmp_path: Path) -> None:
    posterior = trained(estimator)
    posterior.save(tmp_path / "posterior.safetensors")
    like = estimator(linear, **SMALL[estimator])
    other = like.load(tmp_path / "posterior.safetensors")
    draws = [p.sample(10, x=torch.zeros(2), seed=5)["theta"] for p in (posterior, other)]
    assert torch.equal(*draws)


def test_a_file_of_another_model_is_refused(estimator: Callable, tmp_path: Path) -> None:
    trained(estimator).save(tmp_path / "posterior.safetensors")
    other = estimator(two_moons, **SMALL[estimator])
    with pytest.raises(ValueError, match="belongs to another estimator, of parameters"):
        other.load(tmp_path / "posterior.safetensors")
    with pytest.raises(ValueError, match="belongs to another estimator, of options"):
        estimator(linear).load(tmp_path / "posterior.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        other.load(tmp_path / "junk")


def test_exports_to_arviz(estimator: Callable) -> None:
    data = trained(estimator).to_arviz(x=torch.tensor([0.5, -1.0]), num_samples=20)
    assert data.posterior["theta"].shape == (1, 20, 2)
    assert np.allclose(data.observed_data["x"], [0.5, -1.0])
    assert data.attrs["method"] == estimator.__name__


# Errors


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), r"'x' has shape \(2,\), got x of shape \(3,\)"),
        (torch.tensor([0.0, torch.nan]), "'x' must be finite"),
        ({"y": torch.zeros(2)}, r"x must hold the observed site 'x', got \['y'\]"),
    ],
)
def test_wrong_observations_are_refused(
    x: Tensor | dict[str, Tensor], message: str, estimator: Callable
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(estimator).sample(10, x=x)


def test_wrong_requests_are_refused(estimator: Callable) -> None:
    like = estimator(linear)
    simulations = simulate(linear, 20, progress=False)
    for how in ({}, {"simulations": simulations, "num_simulations": 10}):
        with pytest.raises(ValueError, match="either simulations or num_simulations"):
            like.fit(**how)
    with pytest.raises(ValueError, match="num_simulations must be at least 1"):
        like.fit(num_simulations=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        trained(estimator).sample(0, x=torch.zeros(2))
    with pytest.raises(TypeError, match="simulator must be a Pyro model, got str"):
        estimator("two_moons")
    with pytest.raises(ValueError, match=r"observed \['y'\] are not sites"):
        estimator(linear, "y")
