"""Everything runs on a CUDA device as on the CPU."""

from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from pyroflows.sbi import (
    FlowMatching,
    JointFlowMatching,
    NeuralLikelihood,
    NeuralPosterior,
    simulate,
    simulate_at,
)
from tests.batteries import REGISTERED, Case
from tests.simulators import black_box, conjugate, gaussian_linear_uniform
from tests.test_sbi import SMALL, exact, linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_flows_agree_with_the_cpu(case: Case) -> None:
    flow, x = case.bound(), case.inputs(20)
    expected, expected_log_det = flow.forward_and_log_det(x)
    flow.cuda()
    y, log_det = flow.forward_and_log_det(x.cuda())
    again, inverse_log_det = flow.inverse_and_log_det(y)
    tolerance = case.within(1e-8)
    torch.testing.assert_close(y.cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det.cpu(), expected_log_det, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again.cpu(), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=tolerance, atol=tolerance)


def test_fit_runs_where_the_data_are_and_results_move() -> None:
    data = torch.tensor([1.0, 2.0, 3.0], device="cuda")

    def model(data):
        mean = pyro.sample("mean", dist.Normal(torch.zeros_like(data[0]), 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=data)

    result = pf.fit(
        model, pf.AutoSpline(model, num_layers=2), (data,), num_steps=200, progress=False
    )
    assert result.draws.is_cuda
    # The posterior is Normal(1.993, 0.576); 10 000 draws give the mean to 0.006.
    assert result.sample(10_000)["mean"].mean().item() == pytest.approx(1.993, abs=0.03)
    assert result.to_arviz().posterior["mean"].shape == (1, 10_000)
    assert result.to("cpu").sample(10)["mean"].device.type == "cpu"


# Simulation-based inference: models are simulated on the CPU, estimators train on the device

ESTIMATORS = [
    (FlowMatching, SMALL[FlowMatching]),
    (FlowMatching, {**SMALL[FlowMatching], "mixed_precision": True}),
    (FlowMatching, {**SMALL[FlowMatching], "coupling": "optimal_transport"}),
    (NeuralPosterior, SMALL[NeuralPosterior]),
    (JointFlowMatching, SMALL[FlowMatching]),
]
X = torch.tensor([0.5, -1.0])


@pytest.mark.parametrize(("kind", "options"), ESTIMATORS)
def test_posteriors_train_on_the_device_and_move(kind: type, options: dict, tmp_path: Path) -> None:
    posterior = kind(linear, device="cuda", **options).fit(
        num_simulations=4000, num_steps=400, progress=False
    )
    draws = posterior.sample(10_000, x=X, seed=0)["theta"]
    log_prob = posterior.log_prob({"theta": draws[:100]}, x=X.cuda())
    assert draws.is_cuda
    assert log_prob.is_cuda
    scale = exact(X).variance.sqrt()
    # The tolerances of the CPU.
    assert ((draws.mean(0).cpu() - exact(X).mean) / scale).abs().max() < 0.2
    assert (draws.std(0).cpu() / scale - 1).abs().max() < 0.1
    posterior.save(tmp_path / "posterior.safetensors")
    for device in ("cpu", "cuda"):
        other = kind(linear, device=device, **options).load(tmp_path / "posterior.safetensors")
        again = other.log_prob({"theta": draws[:100].to(device)}, x=X)
        assert again.device.type == device
        torch.testing.assert_close(again.cpu(), log_prob.cpu(), rtol=1e-2, atol=1e-2)
    assert posterior.to("cpu").sample(10, x=X)["theta"].device.type == "cpu"


@pytest.mark.parametrize("kind", [FlowMatching, NeuralPosterior])
def test_bounded_parameters_and_corrections_on_the_device(kind: type) -> None:
    posterior = kind(gaussian_linear_uniform, device="cuda", **SMALL[kind]).fit(
        num_simulations=2000, num_steps=100, progress=False
    )
    x = torch.zeros(10)
    draws = posterior.sample(100, x=x)
    assert (draws["theta"].abs() < 1).all()
    assert posterior.log_prob(draws, x=x).isfinite().all()
    assert posterior.map(x=x)["theta"].is_cuda
    assert posterior.correct(x=x, num_samples=500).draws.is_cuda
    assert posterior.to_arviz(x=x, num_samples=20).posterior["theta"].shape == (1, 20, 10)


def test_likelihoods_train_on_the_device_and_move(tmp_path: Path) -> None:
    """The posterior of a mean given three points is normal: mean 3/4 of theirs, variance 1/4."""
    model = NeuralLikelihood(conjugate, device="cuda").fit(
        num_simulations=4000, num_steps=800, progress=False
    )
    x, z = torch.tensor([1.0, 0.2, 1.8]), torch.linspace(-1.0, 2.0, 20).unsqueeze(-1)
    posterior = model.posterior(2000, x=x.cuda(), seed=0)
    assert posterior.draws["mean"].mean().item() == pytest.approx(0.75, abs=0.1)
    assert posterior.draws["mean"].std().item() == pytest.approx(0.5, abs=0.05)
    model.save(tmp_path / "likelihood.safetensors")
    other = NeuralLikelihood(conjugate).load(tmp_path / "likelihood.safetensors")
    assert next(other.flow.parameters()).device.type == "cpu"
    torch.testing.assert_close(
        other.log_likelihood(z, x), model.log_likelihood(z, x), rtol=1e-3, atol=1e-2
    )


def test_parameters_on_the_device_go_to_a_simulator_on_the_cpu() -> None:
    theta = torch.randn(20, 2)
    on_cpu, on_device = (
        simulate_at(black_box, {"theta": values}, progress=False)
        for values in (theta, theta.cuda())
    )
    assert torch.equal(on_cpu.observations["x"], on_device.observations["x"])


def test_simulating_leaves_the_random_state_of_the_device_alone() -> None:
    state = torch.cuda.get_rng_state()
    simulate(conjugate, 10, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), state)
