"""Corrected posteriors: exact evidence, better answers, honest verdicts."""

from functools import cache

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.sbi import CorrectedPosterior, FlowMatching, NeuralPosterior, Posterior
from tests.simulators import black_box, conjugate, two_moons

X = torch.tensor([1.0, 0.2, 1.8])  # the posterior of `conjugate` is Normal(.75, .5)


def log_evidence() -> float:
    covariance = torch.eye(3) + torch.ones(3, 3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(X).item()


@cache
def trained() -> Posterior:
    return FlowMatching(conjugate, width=32, num_blocks=2).fit(
        num_simulations=4000, num_steps=300, augment=False, progress=False
    )


@cache
def rough() -> Posterior:
    """Return a posterior that is off by half of its width."""
    posterior = NeuralPosterior(conjugate, flow="maf", num_layers=1, hidden_dims=(8,)).fit(
        num_simulations=300, num_steps=10, progress=False
    )
    posterior.density.linear.loc.sub_(0.25)
    return posterior


def test_the_evidence_is_that_of_the_model() -> None:
    """Within 5 standard errors: alarm in one of a million seeds."""
    for posterior in (trained(), rough()):
        corrected = posterior.correct(x=X, num_samples=4000)
        assert corrected.log_evidence_standard_error < 0.05
        error = corrected.log_evidence - log_evidence()
        assert abs(error) < 5 * corrected.log_evidence_standard_error


def test_correction_makes_draws_right() -> None:
    """Mean and deviation of 10 000 resampled draws, to 5 standard errors of an ESS above 2000."""
    plain = rough().sample(10_000, x=X, seed=0)["mean"]
    corrected = rough().correct(x=X, num_samples=10_000)
    assert corrected.ess > 2000
    draws = corrected.sample(10_000, seed=0)["mean"]
    assert draws.shape == (10_000,)
    assert draws.mean().item() == pytest.approx(0.75, abs=0.06)
    assert draws.std().item() == pytest.approx(0.5, abs=0.06)
    assert (plain.mean() - 0.75).abs() + (plain.std() - 0.5).abs() > 0.1


def test_a_good_posterior_is_said_to_be_good() -> None:
    corrected = trained().correct(x=X)
    assert corrected.khat < 0.5
    assert corrected.ess > 3000
    assert "use its draws as they are" in corrected.verdict
    assert "CorrectedPosterior(D=1, log_evidence=" in repr(corrected)


def test_a_bad_posterior_is_said_to_be_bad() -> None:
    """One of a tenth of the width."""
    posterior = FlowMatching(conjugate, width=32, num_blocks=2).fit(
        num_simulations=500, num_steps=1, progress=False
    )
    posterior.density.linear.scale_tril.mul_(0.1)
    with pytest.warns(UserWarning, match=r"misses part of the true one \(k-hat .* >= 0.7\)"):
        corrected = posterior.correct(x=X)
    assert corrected.khat > 0.7


def test_summary_and_arviz_hold_the_verdict() -> None:
    corrected = trained().correct(x=X, num_samples=500)
    table = corrected.summary()
    assert table.loc["mean", "weighted_mean"] == pytest.approx(0.75, abs=0.15)
    assert table.attrs["verdict"] == corrected.verdict
    data = corrected.to_arviz()
    assert data["posterior"]["mean"].shape == (1, 500)
    assert {*data["sample_stats"]} == {"lp", "log_q", "log_weight", "log_weight_psis"}
    assert np.allclose(data["observed_data"]["x"], X)
    assert data.attrs["pareto_k"] == pytest.approx(corrected.khat)
    weights = corrected.to_arviz(resample=True)["sample_stats"]["log_weight_psis"]
    assert np.allclose(weights, -np.log(500))


# The densities of points of the observation


def normal_log_prob(value: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return -0.5 * (value - mean) ** 2 - 0.5 * np.log(2 * np.pi)


def test_points_and_parameters_have_the_densities_of_the_model() -> None:
    corrected = rough().correct(x=X, num_samples=300)
    for resample in (False, True):
        data = corrected.to_arviz(resample=resample)
        mean = data["posterior"]["mean"].values
        likelihood, prior = data["log_likelihood"]["x"], data["log_prior"]["mean"]
        assert likelihood.dims == ("chain", "draw", "points")
        assert prior.dims == ("chain", "draw")
        expected = normal_log_prob(X.numpy(), mean[..., np.newaxis])
        np.testing.assert_allclose(likelihood, expected, atol=1e-5)
        np.testing.assert_allclose(prior, normal_log_prob(mean, 0.0), atol=1e-5)
        # The mean is unconstrained as it is.
        total = likelihood.values.sum(-1) + prior.values
        np.testing.assert_allclose(total, data["sample_stats"]["lp"], atol=1e-4)


def test_points_are_left_out_exactly() -> None:
    """Without one of three points the posterior is normal, and so is the prediction.

    Five Monte Carlo errors of each: alarm in one of half a million seeds.
    """
    result = rough().correct(x=X, num_samples=20_000).loo()
    exact = dist.Normal((X.sum() - X) / 3, (1 + 1 / 3) ** 0.5).log_prob(X).double()
    assert result.dims == ("points",)
    assert result.mcse < 0.1
    assert ((result.elpd_i - exact).abs() < 5 * result.mcse_i).all()


def bounded() -> None:
    """Draw a point next to a parameter that can be far away, and one of two numbers."""
    theta = pyro.sample("theta", dist.Uniform(-10.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("near", 2):
        pyro.sample("x", dist.Uniform(theta - 1, theta + 1))
    pyro.sample("y", dist.Normal(torch.stack([scale, scale], -1), 1.0).to_event(1))


def at(model: object, observed: dict, **parameters: torch.Tensor) -> CorrectedPosterior:
    """Return a correction of draws that are given, of equal weight."""
    joint = FlowMatching(model, tuple(observed))._joint()
    z = joint.space.unconstrain(parameters)
    zeros = torch.zeros(len(z))
    return CorrectedPosterior(joint.space, z, zeros, zeros, observed, {}, joint)


def test_densities_of_several_sites_where_most_of_the_prior_has_none() -> None:
    """The start of a guide, in the middle of the prior, would have density zero."""
    x, y = torch.tensor([7.5, 7.9]), torch.tensor([0.5, 1.5])
    theta, scale = torch.linspace(7.2, 8.2, 50), torch.linspace(0.5, 2.0, 50)
    corrected = at(bounded, {"x": x, "y": y}, theta=theta, scale=scale)
    data = corrected.to_arviz()
    np.testing.assert_allclose(data["log_likelihood"]["x"], np.full((1, 50, 2), -np.log(2.0)))
    expected = dist.Normal(scale.unsqueeze(-1), 1.0).log_prob(y).sum(-1)
    np.testing.assert_allclose(data["log_likelihood"]["y"][0], expected, atol=1e-5)
    np.testing.assert_allclose(data["log_prior"]["theta"], -np.log(20.0), rtol=1e-6)
    expected = dist.LogNormal(0.0, 1.0).log_prob(scale)
    np.testing.assert_allclose(data["log_prior"]["scale"][0], expected, atol=1e-5)
    assert corrected.loo("x").elpd == pytest.approx(-2 * np.log(2.0))
    with pytest.raises(ValueError, match=r"site must be one of .*\['x', 'y'\], got None"):
        corrected.loo()
    with pytest.raises(ValueError, match=r"'y' is one observation: .* belong in a pyro.plate"):
        corrected.loo("y")


def one_at_a_time() -> None:
    """Draw from a model that takes one parameter."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("points", 2):
        pyro.sample("x", dist.Normal(float(theta), 1.0))


def test_densities_of_a_model_that_takes_one_parameter() -> None:
    theta, x = torch.linspace(-1.0, 1.0, 50), torch.tensor([0.5, -0.2])
    data = at(one_at_a_time, {"x": x}, theta=theta).to_arviz()
    expected = normal_log_prob(x.numpy(), theta.numpy()[:, np.newaxis])
    np.testing.assert_allclose(data["log_likelihood"]["x"][0], expected, atol=1e-5)


def test_without_the_simulator_there_are_no_densities() -> None:
    known = rough().correct(x=X, num_samples=50)
    parts = (known.space, known.draws, known.log_p, known.log_q, known.observed, {})
    nameless = CorrectedPosterior(*parts)
    assert "log_likelihood" not in nameless.to_arviz().groups()
    with pytest.raises(ValueError, match="simulator of this posterior is not known"):
        nameless.loo()


def test_densities_leave_the_random_state_alone() -> None:
    corrected = rough().correct(x=X, num_samples=50)
    before = torch.get_rng_state()
    corrected.to_arviz()
    corrected.loo()
    assert torch.equal(torch.get_rng_state(), before)


# Files, errors


def test_draws_are_reproducible() -> None:
    one, other = (trained().correct(x=X, num_samples=50, seed=3) for _ in range(2))
    assert torch.equal(one.draws, other.draws)
    assert torch.equal(one.sample(9, seed=1)["mean"], other.sample(9, seed=1)["mean"])


def test_a_posterior_from_a_file_can_be_corrected(tmp_path) -> None:
    trained().save(tmp_path / "posterior.safetensors")
    estimator = FlowMatching(conjugate, width=32, num_blocks=2)
    again = estimator.load(tmp_path / "posterior.safetensors")
    assert again.correct(x=X, num_samples=200).log_evidence == pytest.approx(
        trained().correct(x=X, num_samples=200).log_evidence
    )


def test_what_has_no_density_is_refused() -> None:
    for model, options, message in (
        (black_box, {}, "'x' is pyro.deterministic"),
        (two_moons, {"parameters": ["theta"]}, "'x' is pyro.deterministic"),
    ):
        posterior = FlowMatching(model, **options).fit(
            num_simulations=100, num_steps=1, progress=False
        )
        with pytest.raises(ValueError, match=message):
            posterior.correct(x=torch.zeros(posterior.observations.shapes["x"]))
    with pytest.raises(ValueError, match=r"x must be one observation, got a batch \(2,\)"):
        trained().correct(x=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        trained().correct(x=X, num_samples=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        trained().correct(x=X, num_samples=50).sample(0)
    nameless = Posterior(trained().space, trained().observations, trained().density, {})
    with pytest.raises(ValueError, match="simulator of this posterior is not known"):
        nameless.correct(x=X)
