"""Learned likelihoods: right densities, posteriors and evidences; storage; errors."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

import pyroflows as pf
from pyroflows.sbi import LikelihoodModel, NeuralLikelihood, Simulations, simulate
from pyroflows.sbi.densities.likelihood_transform import LikelihoodTransform, ParameterFeatures
from pyroflows.sbi.model.space import ParameterSpace
from tests.simulators import conjugate, two_moons

SMALL = {"num_flows": 1, "num_layers": 1, "hidden_dims": (16,)}
POINTS = torch.tensor([1.0, 0.2, 1.8, 1.4, 0.6])  # five points, trained on three


def linear() -> None:
    """Draw a vector around a linear function of bounded and unbounded parameters."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Uniform(-1.0, 1.0))
    mean = torch.stack([loc + slope, loc - 2 * slope], -1)
    pyro.sample("x", dist.Normal(mean, 0.5).to_event(1))


def heavy_tailed() -> None:
    """Draw points so far out that they are compressed, from a positive parameter."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("points", 2):
        pyro.sample("x", dist.StudentT(1.5, 0.0, scale))


def shared_noise() -> None:
    """Draw points in a plate that are exchangeable, but not independent given the mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("points", 3):
        own = pyro.sample("own", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean + offset + own, 0.1))


@cache
def trained() -> LikelihoodModel:
    """Train once, for all tests that only look."""
    return NeuralLikelihood(conjugate, **SMALL).fit(
        num_simulations=4000, num_steps=500, progress=False
    )


# Right answers


def test_the_density_is_that_of_the_simulator() -> None:
    x = torch.linspace(-2, 2, 50)
    z = torch.tensor([[0.7], [-1.0]])
    for mean, log_prob in zip(z, trained().flow.score(x.view(50, 1, 1), z).T, strict=True):
        assert (log_prob - dist.Normal(mean, 1.0).log_prob(x)).abs().max() < 0.2


def test_posterior_and_evidence_of_a_conjugate_model() -> None:
    """The posterior is N(5/6, 1/6); the training errs by a few hundredths of a nat."""
    result = trained().posterior(4000, x=POINTS, seed=0)
    assert result.draws["mean"].shape == (4000,)
    assert result.draws["mean"].mean().item() == pytest.approx(5 / 6, abs=0.08)
    assert result.draws["mean"].std().item() == pytest.approx(6**-0.5, abs=0.04)
    evidence = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + 1).log_prob(POINTS)
    assert result.log_evidence == pytest.approx(evidence.item(), abs=0.15)
    assert 0 < result.log_evidence_error < 0.1


def test_a_linear_model_is_solved_before_any_training() -> None:
    """One step with a tiny rate: the regression does it all, up to its errors of 1 %."""
    model = NeuralLikelihood(linear).fit(
        num_simulations=20_000, num_steps=1, learning_rate=1e-8, progress=False
    )
    values = simulate(linear, 500, progress=False, seed=1)
    z, x = model.space.unconstrain(values.parameters), values.observations["x"]
    loc, slope = values.parameters["loc"], values.parameters["slope"]
    mean = torch.stack([loc + slope, loc - 2 * slope], -1)
    exact = dist.Normal(mean, 0.5).to_event(1).log_prob(x)
    assert (model.flow.score(x, z) - exact).abs().mean() < 0.05


def test_the_log_determinant_is_that_of_the_jacobian() -> None:
    """In units that compress, and that do not."""
    space = ParameterSpace.of_model(heavy_tailed, ("x",))
    transform = LikelihoodTransform(space, 2, num_layers=2).double()
    z = torch.randn(200, 1, dtype=torch.float64)
    x = torch.randn(200, 1, 2, dtype=torch.float64)
    x[0, 0, 0] = 1000.0
    transform.prepare(x, z)
    assert transform.units.compressed.tolist() == [1.0, 0.0]
    for row in range(3):
        y, log_det = transform.inverse_and_log_det(x[row, 0], z[row])
        jacobian = torch.autograd.functional.jacobian(
            lambda value, row=row: transform.inverse_and_log_det(value, z[row])[0], x[row, 0]
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det)
        back, log_det_back = transform.forward_and_log_det(y, z[row])
        torch.testing.assert_close(back, x[row, 0])
        torch.testing.assert_close(log_det_back, -log_det)


def test_the_density_of_heavy_tails_integrates_to_one() -> None:
    model = NeuralLikelihood(heavy_tailed, **SMALL).fit(
        num_simulations=500, num_steps=50, progress=False
    )
    assert model.flow.flows[0].transform.units.compressed.item() == 1.0
    edges = torch.linspace(-12.0, 12.0, 4001).double().sinh()
    middle = 0.5 * (edges[1:] + edges[:-1])
    log_prob = model.flow.score(middle.float().unsqueeze(-1), torch.zeros(1))
    assert (log_prob.exp() * edges.diff()).sum().item() == pytest.approx(1.0, abs=0.01)


def test_features_hold_bounded_parameters_in_both_spaces() -> None:
    space = ParameterSpace.of_model(linear, ("x",))
    z = torch.randn(1000, 2)
    features = ParameterFeatures(space)
    features.fit(z)
    both = features(z)
    assert both.shape == (1000, 3)
    torch.testing.assert_close(both.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    slope = space.constrain(z)["slope"]
    torch.testing.assert_close(both[:, 2], (slope - slope.mean()) / slope.std(unbiased=False))


def test_points_that_share_noise_are_one_vector() -> None:
    likelihood = NeuralLikelihood(shared_noise, parameters=["mean"])
    assert not likelihood.observations.is_set
    assert likelihood.observations.size == 3
    assert NeuralLikelihood(conjugate).observations.is_set


def test_guides_can_be_fitted_to_the_model() -> None:
    """Resampled by importance, draws are those of the posterior."""
    model = trained()
    guide = pf.AutoRealNVP(model, num_layers=1, hidden_dims=(8,))
    result = pf.fit(model, guide, (POINTS,), num_steps=150, progress=False)
    mean = result.sample(2000, resample=True)["mean"]
    assert mean.mean().item() == pytest.approx(5 / 6, abs=0.1)
    assert mean.std().item() == pytest.approx(6**-0.5, abs=0.06)


def test_gradient_based_samplers_work_on_the_model() -> None:
    """100 dependent draws have a mean to within a third of a deviation."""
    pyro.set_rng_seed(0)
    sampler = MCMC(NUTS(trained()), num_samples=100, warmup_steps=50, disable_progbar=True)
    sampler.run(POINTS)
    mean = sampler.get_samples()["mean"]
    assert mean.mean().item() == pytest.approx(5 / 6, abs=0.15)
    assert mean.std().item() == pytest.approx(6**-0.5, rel=0.35)


# Manners


@pytest.mark.parametrize("model", [conjugate, linear, shared_noise])
def test_sites_have_the_shapes_of_the_simulator(model: object) -> None:
    likelihood = NeuralLikelihood(model, parameters=["mean"] if model is shared_noise else None)
    learned = likelihood.fit(num_simulations=100, num_steps=2, progress=False)
    own = pyro.poutine.trace(model).get_trace().nodes["x"]["value"]
    assert pyro.poutine.trace(learned).get_trace().nodes["x"]["value"].shape == own.shape
    trace = pyro.poutine.trace(learned).get_trace(own)
    assert trace.nodes["x"]["is_observed"]
    values = {name: trace.nodes[name]["value"] for name in learned.space.names}
    z = learned.space.unconstrain(values)
    expected = learned.log_likelihood(z.unsqueeze(0), own)
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob_sum"].view(1), expected)


def test_the_seed_determines_training_and_draws() -> None:
    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)  # of no consequence
        model = NeuralLikelihood(linear, **SMALL).fit(
            num_simulations=300, num_steps=5, progress=False, seed=3
        )
        return model.sample(50, x=torch.zeros(2), seed=5)["loc"]

    one = run(0)
    assert one.shape == (50,)
    assert torch.equal(one, run(1))


def test_sampling_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    trained().sample(10, x=POINTS, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_stay_in_the_prior() -> None:
    model = NeuralLikelihood(two_moons, parameters=["theta"], **SMALL).fit(
        num_simulations=500, num_steps=20, progress=False
    )
    theta = model.sample(500, x=torch.tensor([1.0, -1.0]))["theta"]
    assert theta.shape == (500, 2)
    assert (theta.abs() < 1).all()


def test_survives_a_file(tmp_path: Path) -> None:
    trained().save(tmp_path / "model.safetensors")
    other = NeuralLikelihood(conjugate, **SMALL).load(tmp_path / "model.safetensors")
    draws = [m.sample(50, x=POINTS, seed=5)["mean"] for m in (trained(), other)]
    assert torch.equal(*draws)
    assert other.fit is None
    assert other.about == trained().about
    assert not any(parameter.requires_grad for parameter in other.flow.parameters())


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    trained().save(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of parameters"):
        NeuralLikelihood(linear, **SMALL).load(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of num_flows 1, got 2"):
        NeuralLikelihood(conjugate, **{**SMALL, "num_flows": 2}).load(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of options"):
        NeuralLikelihood(conjugate, num_flows=1).load(path)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        NeuralLikelihood(conjugate).load(tmp_path / "junk")


def test_exports_to_arviz() -> None:
    result = trained().posterior(20, x={"x": POINTS}, seed=0)
    data = result.to_arviz()
    assert data.posterior["mean"].shape == (1, 20)
    assert np.allclose(data.observed_data["x"], POINTS)
    assert data.attrs["method"] == "NeuralLikelihood"
    assert data.attrs["log_evidence"] == result.log_evidence


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    simulations = simulate(linear, 200, progress=False)

    def run(**settings: object) -> LikelihoodModel:
        return NeuralLikelihood(linear).fit(simulations, num_steps=4, progress=False, **settings)

    first, again = (run(checkpoint=tmp_path / "checkpoint") for _ in range(2))
    assert torch.equal(first.fit.losses, again.fit.losses)
    assert torch.equal(first.fit.losses, run().fit.losses)


# Errors


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5), "x must be one observation of site 'x'"),
        (torch.tensor([0.0, math.nan, 1.0]), "'x' must be finite"),
        (torch.tensor(1.0), r"'x' has shape \(3,\), got x of shape \(\)"),
        ({"y": torch.zeros(3)}, r"x must hold the observed site 'x', got \['y'\]"),
    ],
)
def test_wrong_observations_are_refused(x: Tensor | dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained().sample(10, x=x)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(TypeError, match="simulator must be a Pyro model, got str"):
        NeuralLikelihood("two_moons")
    with pytest.raises(ValueError, match="observed must be the name of one site"):
        NeuralLikelihood(conjugate, ("x", "y"))
    with pytest.raises(ValueError, match="num_flows must be at least 1, got 0"):
        NeuralLikelihood(conjugate, num_flows=0)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        trained().sample(0, x=POINTS)
    with pytest.raises(ValueError, match="either simulations or num_simulations"):
        NeuralLikelihood(conjugate).fit()


def test_an_entry_that_never_varies_is_refused() -> None:
    constant = Simulations({"mean": torch.randn(100)}, {"x": torch.ones(100, 3)})
    with pytest.raises(ValueError, match="data must vary in every column"):
        NeuralLikelihood(conjugate).fit(constant, num_steps=2, progress=False)
