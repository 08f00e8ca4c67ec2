"""Simulations at given parameters: right sites set, aligned, honest about failures."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import SimulationError, Simulations, simulate_at
from tests.simulators import (
    black_box,
    conjugate,
    reads_entries_wrongly,
    sometimes_invalid,
    sometimes_raises,
)


def nested() -> None:
    """Draw parameters outside and inside of a plate, and observations in two."""
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3, dim=-2):
        group = pyro.sample("group", dist.Normal(mean.sum(-1), 1.0))
        with pyro.plate("points", 4, dim=-1):
            pyro.sample("x", dist.Normal(group, 1e-3))


@pytest.mark.parametrize("batch_size", [7, 25, 1000])
def test_rows_belong_together(batch_size: int) -> None:
    """The plate has the sizes of its chunk, whatever dimensions are inside."""
    group = torch.randn(25, 3, 1)
    parameters = {"mean": torch.randn(25, 2), "group": group}
    simulations = simulate_at(nested, parameters, batch_size=batch_size, progress=False)
    assert torch.equal(simulations.parameters["group"], group)
    assert torch.equal(simulations.parameters["mean"], parameters["mean"])
    x = simulations.observations["x"]
    torch.testing.assert_close(x, group.expand(25, 3, 4), rtol=0, atol=6e-3)


@pytest.mark.parametrize(
    ("model", "name", "shape"),
    [(conjugate, "mean", ()), (black_box, "theta", (2,)), (reads_entries_wrongly, "theta", (3,))],
)
def test_observations_follow_their_parameters(
    model: Callable, name: str, shape: tuple[int, ...]
) -> None:
    """All have noise of unit variance or less around the sum or the first entry: six errors."""
    theta = torch.zeros(200, *shape)
    theta[:, 0 if shape else ...] = torch.linspace(-50, 50, 200)
    simulations = simulate_at(model, {name: theta}, batch_size=64, progress=False)
    assert torch.equal(simulations.parameters[name], theta)
    x = simulations.observations["x"].reshape(200, -1)[:, 0]
    assert (x - torch.linspace(-50, 50, 200)).abs().max() < 6


def test_other_sites_are_drawn() -> None:
    """Groups given nothing but the mean have variance 1: 5 errors of 3000 draws are .13."""
    simulations = simulate_at(nested, {"mean": torch.ones(1000, 2)}, progress=False)
    group = simulations.observations["x"].mean(-1)
    assert set(simulations.parameters) == {"mean"}
    assert group.mean().item() == pytest.approx(2.0, abs=5 / 3000**0.5)
    assert group.var().item() == pytest.approx(1.0, abs=5 * (2 / 3000) ** 0.5)


def test_the_executor_makes_no_difference_and_the_seed_does() -> None:
    theta = {"theta": torch.zeros(50, 2)}

    def x(seed: int = 0, **how: object) -> Tensor:
        simulations = simulate_at(black_box, theta, seed=seed, batch_size=20, progress=False, **how)
        return simulations.observations["x"]

    with ThreadPoolExecutor(3) as executor:
        assert torch.equal(x(), x(executor=executor))
    assert not torch.equal(x(), x(seed=1))


def test_invalid_rows_are_left_out_with_their_parameters() -> None:
    theta = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0])
    with pytest.warns(UserWarning, match="2 of 5 simulations hold numbers that are not finite"):
        simulations = simulate_at(sometimes_invalid, {"theta": theta}, progress=False)
    assert simulations.num_invalid == 2
    assert torch.equal(simulations.parameters["theta"], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(simulations.observations["x"], simulations.parameters["theta"].log())


def test_a_simulator_that_raises_tells_where_and_keeps_the_rest() -> None:
    theta = {"theta": torch.tensor([0.0, 1.0, 3.0, 0.5])}
    with pytest.raises(
        SimulationError, match=r"theta is too large; parameters: theta = 3\.0"
    ) as info:
        simulate_at(sometimes_raises, theta, progress=False)
    assert isinstance(info.value.simulations, Simulations)
    assert torch.equal(info.value.simulations.parameters["theta"], torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mean": torch.zeros(5, 3)}, r"\['mean'\] must have shape \(N, 2\), got \(5, 3\)"),
        ({"mean": torch.zeros(2)}, r"\['mean'\] must have shape \(N, 2\), got \(2,\)"),
        ({"mean": torch.zeros(0, 2)}, "as many rows at all sites, 1 or more, got {'mean': 0}"),
        (
            {"mean": torch.zeros(5, 2), "group": torch.zeros(4, 3, 1)},
            "as many rows at all sites, 1 or more, got {'mean': 5, 'group': 4}",
        ),
        ({"mean": torch.full((5, 2), torch.nan)}, r"\['mean'\] must be finite"),
        ({"theta": torch.zeros(5)}, r"parameters \['theta'\] are not sites"),
        ({"x": torch.zeros(5, 3, 4)}, r"parameters must not be observed, got \['x'\]"),
        ({}, "no latent sites"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_at(nested, parameters, progress=False)
