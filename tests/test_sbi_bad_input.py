"""What users get wrong in simulation-based inference: each is told what came and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.sbi import FlowMatching, NeuralPosterior, SimulationError, Simulations, simulate
from tests.simulators import conjugate, sometimes_raises

SMALL = {"width": 16, "num_blocks": 1}


def linear() -> None:
    """Draw two parameters and two observations."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta, 1.0).to_event(1))


def bounded() -> None:
    """Draw a parameter from an interval."""
    theta = pyro.sample("theta", dist.Uniform(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta, 1.0))


# Models


def without_latent_sites() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def with_a_discrete_parameter() -> None:
    rate = pyro.sample("rate", dist.Poisson(3.0))
    pyro.sample("x", dist.Normal(rate, 1.0))


def with_a_bound_by_another_parameter() -> None:
    high = pyro.sample("high", dist.Uniform(1.0, 2.0))
    theta = pyro.sample("theta", dist.Uniform(0.0, high))
    pyro.sample("x", dist.Normal(theta, 1.0))


def with_a_prior_that_depends_on_data() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("theta", dist.Normal(x, 1.0))


def with_a_bound_by_data() -> None:
    x = pyro.sample("x", dist.Exponential(1.0))
    pyro.sample("theta", dist.Uniform(0.0, x))


def with_a_number_of_parameters_that_changes() -> None:
    for i in range(1 + int(torch.rand(()) < 0.5)):
        pyro.sample(f"theta_{i}", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (without_latent_sites, "no latent sites: there is nothing to infer"),
        (with_a_discrete_parameter, r"site 'rate' is discrete \(Poisson\): .*sum the site out"),
        (with_a_bound_by_another_parameter, "a bound that depends on other latent variables"),
        (with_a_prior_that_depends_on_data, r"prior of \['theta'\] depends on the observed sites"),
        (with_a_bound_by_data, "supports change from draw to draw"),
        (with_a_number_of_parameters_that_changes, "sites or their supports change from draw"),
    ],
)
def test_models_that_cannot_be_learned_from_are_refused(model: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(model)


def test_parameters_after_an_observation_are_fine_if_they_do_not_depend_on_it() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(theta, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(theta, 1.0))
        pyro.sample("y", dist.Normal(theta, scale))

    assert FlowMatching(model, ["x", "y"]).space.names == ("theta", "scale")


def test_priors_may_depend_on_other_parameters_and_on_noise() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        theta = pyro.sample("theta", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(theta, 1.0))

    assert FlowMatching(model).space.names == ("scale", "theta")
    assert FlowMatching(model, parameters=["theta"]).space.names == ("theta",)


@pytest.mark.parametrize("observed", [[], ()])
def test_something_must_be_observed(observed: Any) -> None:
    for what in (lambda: simulate(linear, 10, observed), lambda: FlowMatching(linear, observed)):
        with pytest.raises(ValueError, match="observed must name at least one site, got none"):
            what()


def test_a_model_that_raises_at_once_says_so() -> None:
    def model() -> None:
        raise ZeroDivisionError("no particles")

    for what in (lambda: simulate(model, 10), lambda: FlowMatching(model)):
        with pytest.raises(SimulationError, match="raised ZeroDivisionError: no particles"):
            what()


def test_a_model_that_raises_midway_keeps_what_there_is() -> None:
    with pytest.raises(SimulationError, match="theta is too large; parameters: theta") as info:
        FlowMatching(sometimes_raises).fit(num_simulations=500, seed=1, progress=False)
    finished = info.value.simulations
    assert finished is not None
    assert 0 < len(finished) < 500


def test_a_site_that_changes_its_shape_is_refused() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        number = int(torch.randint(1, 5, ()))
        pyro.sample("x", dist.Normal(theta.unsqueeze(-1).expand(number), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"site 'x' must have one shape in all draws, got"):
        simulate(model, 50, progress=False)


# Interruptions


def interrupted(after: int) -> Callable[[], None]:
    """Return a model that the user stops."""
    calls = 0

    def model() -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        black_box()

    return model


def black_box() -> None:
    """Draw from a model that does not work in plates."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.deterministic("x", torch.tensor(theta.item() + 0.1 * torch.randn(()).item()))


def test_an_interrupted_simulation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    how = {"batch_size": 10, "path": tmp_path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        simulate(interrupted(after=75), 100, **how)
    finished = len([*tmp_path.glob("chunk-*")])
    assert 3 <= finished < 8
    resumed = simulate(black_box, 100, **how)
    whole = simulate(black_box, 100, batch_size=10, progress=False)
    assert torch.equal(resumed.observations["x"], whole.observations["x"])
    assert torch.equal(resumed.parameters["theta"], whole.parameters["theta"])


def test_a_damaged_chunk_is_told(tmp_path: Path) -> None:
    simulate(linear, 20, batch_size=10, path=tmp_path, progress=False)
    (tmp_path / "chunk-000001.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"chunk-000001.safetensors' cannot be read"):
        simulate(linear, 20, batch_size=10, path=tmp_path, progress=False)


# Simulations


@pytest.mark.parametrize("estimator", [FlowMatching, NeuralPosterior])
def test_fewer_simulations_than_a_batch_are_learned_from(estimator: Callable) -> None:
    with pytest.warns(UserWarning, match="20 simulations are too few to validate"):
        posterior = estimator(linear).fit(num_simulations=20, num_steps=5, progress=False)
    assert posterior.sample(5, x=torch.zeros(2))["theta"].isfinite().all()


@pytest.mark.filterwarnings("ignore:2 simulations are too few")
@pytest.mark.parametrize("number", [1, 2])
def test_hardly_any_simulations_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 rows to train on, got {number}, of which 1"):
        FlowMatching(linear).fit(num_simulations=number, progress=False)


def test_nothing_valid_is_refused() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", theta + torch.inf)

    with pytest.raises(ValueError, match="all 50 simulations hold numbers that are not finite"):
        FlowMatching(model).fit(num_simulations=50, progress=False)


def test_a_constant_observation_is_no_obstacle() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        noisy = pyro.sample("noise", dist.Normal(theta, 0.5))
        pyro.deterministic("x", torch.stack([noisy, torch.full_like(noisy, 3.0)], -1), event_dim=1)

    posterior = FlowMatching(model, parameters=["theta"], **SMALL).fit(
        num_simulations=2000, num_steps=100, progress=False
    )
    theta = posterior.sample(2000, x=torch.tensor([1.0, 3.0]), seed=0)["theta"]
    assert theta.mean().item() == pytest.approx(0.8, abs=0.15)


def given(theta: torch.Tensor, x: torch.Tensor) -> Simulations:
    return Simulations({"theta": theta}, {"x": x})


@pytest.mark.parametrize(
    ("simulations", "message"),
    [
        (
            Simulations({"rate": torch.rand(50)}, {"x": torch.randn(50)}),
            r"must hold site 'theta', got \['rate'\]",
        ),
        (
            Simulations({"theta": torch.rand(50)}, {"y": torch.randn(50)}),
            r"must hold the observed site 'x', got \['y'\]",
        ),
        (
            given(torch.rand(50, 2), torch.randn(50)),
            r"site 'theta' must have shape \(N\), got \(50, 2\)",
        ),
        (given(torch.rand(50) + 1, torch.randn(50)), "lie outside the support of its prior"),
        (given(torch.rand(50), torch.full((50,), torch.nan)), "must be finite"),
        (
            given(torch.rand(50), torch.randn(50, 2)),
            r"site 'x' must have shape \(N\), got \(50, 2\)",
        ),
        (given(torch.full((50,), 0.5), torch.randn(50)), "'theta' is the same in all simulations"),
    ],
)
def test_simulations_of_another_model_are_refused(simulations: Simulations, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(bounded, **SMALL).fit(simulations, num_steps=5, progress=False)


def test_what_are_no_simulations_is_refused() -> None:
    draws: Any = {"theta": torch.rand(50)}
    with pytest.raises(TypeError, match="simulations must be Simulations, got dict"):
        FlowMatching(bounded).fit(draws)


# Numbers


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("num_simulations", 10.0, TypeError, "num_simulations must be an integer, got 10.0"),
        ("num_simulations", True, TypeError, "num_simulations must be an integer, got True"),
        ("batch_size", "10", TypeError, "batch_size must be an integer, got '10'"),
        ("batch_size", 0, ValueError, "batch_size must be at least 1, got 0"),
        ("seed", 0.5, TypeError, "seed must be an integer, got 0.5"),
        ("seed", -1, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_wrong_numbers_are_refused(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments = {"num_simulations": 10, name: value}
    with pytest.raises(error, match=message):
        simulate(linear, **arguments, progress=False)
    if name != "num_simulations":
        with pytest.raises(error, match=message):
            FlowMatching(linear, **SMALL).fit(**{"num_simulations": 200, name: value})


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "posterior.safetensors"
    FlowMatching(linear, **SMALL).fit(num_simulations=100, num_steps=2, progress=False).save(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of parameters"):
        FlowMatching(conjugate, **SMALL).load(path)
    with pytest.raises(ValueError, match="belongs to another estimator, of method"):
        NeuralPosterior(linear).load(path)
    simulate(linear, 10, progress=False).save(path)
    with pytest.raises(ValueError, match=r"must hold a pyroflows.Posterior/2, got format"):
        FlowMatching(linear, **SMALL).load(path)


def test_messages_stay_short_where_many_draws_were_made_at_once() -> None:
    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        if bool((theta > 4.0).any()):
            raise ValueError("theta is too large")
        pyro.sample("x", dist.Normal(theta, 1.0))

    with pytest.raises(SimulationError, match=r"theta = 100000 numbers of shape") as info:
        simulate(model, 200_000, batch_size=100_000, progress=False)
    assert info.value.parameters["theta"].max() > 4.0
