"""Functions outside of Pyro as simulators: one draw or many at a time, on any executor."""

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import BlackBox, FlowMatching, SimulationError, simulate, simulate_at

PRIOR = dist.Uniform(-1.0, 1.0).expand([2])


def noisy_sum(theta: np.ndarray) -> np.ndarray:
    """Return three noisy sums of one vector."""
    assert theta.shape == (2,)
    return np.random.normal(theta.sum(), 0.1, size=3)  # noqa: NPY002


def noisy_sums(theta: np.ndarray) -> np.ndarray:
    """Return three noisy sums of each vector."""
    return np.random.normal(theta.sum(-1, keepdims=True), 0.1, size=(len(theta), 3))  # noqa: NPY002


def noisy_sums_of_tensors(theta: Tensor) -> Tensor:
    """Return the same in torch."""
    return torch.normal(theta.sum(-1, keepdim=True).expand(-1, 3), 0.1)


def named(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return two observations of two parameters."""
    return {"mean": values["loc"] + values["shift"].sum(), "count": int(values["loc"] > 0)}


KINDS = {
    "one": BlackBox(PRIOR, noisy_sum),
    "many": BlackBox(PRIOR, noisy_sums, vectorized=True),
    "tensors": BlackBox(PRIOR, noisy_sums_of_tensors, vectorized=True, tensors=True),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> BlackBox:
    return KINDS[request.param]


def test_draws_follow_prior_and_function(model: BlackBox) -> None:
    """Noise of .1 within six errors; moments of 600 uniform draws within five."""
    simulations = simulate(model, 600, batch_size=250, progress=False)
    theta, x = simulations.parameters["theta"], simulations.observations["x"]
    assert theta.shape == (600, 2)
    assert x.shape == (600, 3)
    assert x.dtype == torch.float32
    noise = x - theta.sum(-1, keepdim=True)
    assert noise.abs().max() < 0.6
    assert noise.std().item() == pytest.approx(0.1, abs=5 * 0.1 / 3600**0.5)
    assert theta.mean().abs() < 5 * (1 / 3 / 1200) ** 0.5


def test_observations_at_given_parameters(model: BlackBox) -> None:
    theta = torch.linspace(-1, 1, 20).reshape(10, 2)
    simulations = simulate_at(model, {"theta": theta}, batch_size=4, progress=False)
    noise = simulations.observations["x"] - theta.sum(-1, keepdim=True)
    assert noise.abs().max() < 0.6


def test_the_executor_makes_no_difference(model: BlackBox) -> None:
    alone = simulate(model, 50, batch_size=20, progress=False)
    with ThreadPoolExecutor(2) as executor:
        threads = simulate(model, 50, batch_size=20, executor=executor, progress=False)
    assert torch.equal(alone.observations["x"], threads.observations["x"])


def test_processes_make_no_difference() -> None:
    model = KINDS["one"]
    alone = simulate(model, 50, batch_size=20, progress=False)
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        processes = simulate(model, 50, batch_size=20, executor=executor, progress=False)
    assert torch.equal(alone.observations["x"], processes.observations["x"])


@pytest.mark.parametrize(("vectorized", "most"), [(False, 203), (True, 3)])
def test_the_function_is_not_called_more_than_needed(vectorized: bool, most: int) -> None:
    """Two calls look at the sites, 200 or one do the work."""
    calls = 0

    def function(theta: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return theta

    simulate(BlackBox(PRIOR, function, vectorized=vectorized), 200, progress=False)
    assert calls <= most


def test_several_parameters_and_observations() -> None:
    priors = {"loc": dist.Normal(0.0, 1.0), "shift": dist.Normal(torch.zeros(2), 1.0)}
    simulations = simulate(BlackBox(priors, named), 20, ["mean", "count"], progress=False)
    loc, shift = simulations.parameters["loc"], simulations.parameters["shift"]
    assert torch.equal(simulations.observations["count"], (loc > 0).long())
    torch.testing.assert_close(simulations.observations["mean"], loc + shift.sum(-1))


@pytest.mark.parametrize(
    "prior",
    [
        torch.distributions.Uniform(-torch.ones(2), torch.ones(2)),
        torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        dist.Normal(0.0, 1.0).expand([2]).to_event(1),
    ],
    ids=lambda prior: type(prior).__module__,
)
def test_priors_of_torch_and_pyro(prior: Any) -> None:
    estimator = FlowMatching(BlackBox(prior, noisy_sum))
    assert estimator.space.shapes == {"theta": (2,)}
    simulations = simulate(BlackBox(prior, noisy_sum), 20, progress=False)
    assert estimator.space.unconstrain(simulations.parameters).shape == (20, 2)


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_function_may_write_into_its_argument(vectorized: bool, tensors: bool) -> None:
    def function(theta: Any) -> Any:
        theta *= 10
        return theta

    simulator = BlackBox(PRIOR, function, vectorized=vectorized, tensors=tensors)
    simulations = simulate(simulator, 50, progress=False)
    theta, x = simulations.parameters["theta"], simulations.observations["x"]
    assert theta.abs().max() <= 1
    torch.testing.assert_close(x, 10 * theta)


def test_names_of_sites() -> None:
    model = BlackBox(PRIOR, noisy_sum, name="rates", observed="counts")
    simulations = simulate(model, 5, "counts", progress=False)
    assert set(simulations.parameters) == {"rates"}


def test_a_function_that_raises_tells_at_which_draw() -> None:
    def function(theta: np.ndarray) -> np.ndarray:
        if theta[0] > 0.9:
            raise ValueError("too large")
        return theta

    with pytest.raises(SimulationError, match="too large") as info:
        simulate(BlackBox(PRIOR, function), 500, progress=False)
    assert info.value.parameters["theta"].shape == (2,)
    assert info.value.parameters["theta"][0] > 0.9


# Errors


@pytest.mark.parametrize(
    ("prior", "function", "message"),
    [
        (1.0, noisy_sum, "prior of 'theta' must be a distribution of Pyro or torch, got float"),
        (
            {"a": "Normal"},
            noisy_sum,
            "prior of 'a' must be a distribution of Pyro or torch, got str",
        ),
        (PRIOR, "noisy_sum", "function must be callable, got str"),
    ],
)
def test_what_is_no_prior_or_no_function_is_refused(
    prior: Any, function: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        BlackBox(prior, function)


@pytest.mark.parametrize("function", [lambda theta: theta.sum(), lambda theta: theta[:1].T])
def test_a_function_of_many_draws_must_return_as_many(function: Callable) -> None:
    with pytest.raises(SimulationError, match=r"function must return 1 rows for as many draws"):
        simulate(BlackBox(PRIOR, function, vectorized=True), 10, progress=False)


def test_discrete_priors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'theta' is discrete \(Poisson\)"):
        FlowMatching(BlackBox(dist.Poisson(3.0), np.sqrt))
