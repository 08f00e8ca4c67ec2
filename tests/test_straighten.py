"""Posteriors of straight paths: the same draws in fewer steps, exact densities, storage."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import (
    FlowMatching,
    JointFlowMatching,
    Simulations,
    VelocityPosterior,
    simulate,
)
from pyroflows.sbi.densities.flow_matching_density import FlowMatchingDensity
from pyroflows.sbi.densities.midpoint import MidpointSolve
from pyroflows.sbi.densities.straight_density import StraightDensity
from pyroflows.sbi.model.observations import ObservationSpace
from pyroflows.sbi.posteriors.straightening import draw_lines
from tests.simulators import conjugate
from tests.test_sbi import exact, linear

VECTOR = ObservationSpace({"x": torch.Size([3])})
SMALL = {"width": 32, "num_blocks": 2}


def squared() -> None:
    """Draw from a model whose posterior has two modes, as the sign is not observed."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(theta.square(), 0.2))


@cache
def simulated(model: Callable) -> Simulations:
    return simulate(model, 4000, seed=0, progress=False)


@cache
def curved(model: Callable = linear) -> VelocityPosterior:
    """Train once, for all tests that only look."""
    return FlowMatching(model, **SMALL).fit(
        simulated(model), num_steps=400, augment=False, progress=False
    )


@cache
def straight(model: Callable = linear) -> VelocityPosterior:
    return curved(model).straighten(
        simulated(model), num_pairs=20_000, num_steps=400, learning_rate=3e-3, progress=False
    )


def straight_density(dim: int, num_steps: int) -> StraightDensity:
    """Return a density of random weights, in double precision."""
    torch.manual_seed(0)
    start = FlowMatchingDensity(dim, VECTOR, width=16, num_blocks=2)
    torch.nn.init.normal_(start.linear.slope)
    density = StraightDensity(start, VECTOR, num_steps)
    for parameter in density.field.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return density.eval().requires_grad_(False).double()


# Draws


def test_a_normal_posterior_stays_as_it_is() -> None:
    """The pairs that a linear model leaves are equal: a field of zero, and one step is exact.

    The regression on 4000 simulations errs by 1.6 %, means of 10 000 draws by 1 %: of the six
    numbers each, .2 and .1 are five errors and more.
    """
    x = torch.tensor([[0.5, -1.0], [2.0, 1.0], [-3.0, 0.0]])
    posterior = straight().with_solver(num_steps=1)
    density = posterior.density
    assert isinstance(density, StraightDensity)
    w, summary = torch.randn(3, 2), density.encode(x)[1]
    for time in (0.0, 0.5):
        assert density.velocity(torch.tensor(time), w, summary).square().mean().sqrt() < 0.2
    draws = posterior.sample(10_000, x=x, seed=0)["theta"]
    scale = exact(x).variance.sqrt()
    assert ((draws.mean(0) - exact(x).mean) / scale).abs().max() < 0.2
    assert (draws.std(0) / scale - 1).abs().max() < 0.1


def test_few_steps_go_farther_along_straight_paths() -> None:
    """Against the same noise carried in many steps, after four evaluations of either field."""
    x = torch.tensor([0.5, 1.0, 2.0])
    draws = [
        posterior.sample(1000, x=x, seed=0)["theta"]
        for posterior in (
            curved(squared).with_solver(num_steps=100),
            curved(squared).with_solver(num_steps=4),
            straight(squared).with_solver(num_steps=2),
        )
    ]
    bent, short = ((few - draws[0]).abs().median() for few in draws[1:])
    assert short < 0.5 * bent
    assert short < 0.05


def test_pairs_are_noise_and_its_ends() -> None:
    torch.manual_seed(0)
    density, target = curved().density, straight().density
    assert isinstance(density, FlowMatchingDensity)
    assert isinstance(target, StraightDensity)
    x = simulated(linear).observations["x"][:10]
    rows = draw_lines(density, target, x, 35)
    noise, end = rows.data.chunk(2, -1)
    assert noise.shape == (40, 2)
    assert torch.equal(rows.context, target.encode(x)[1].repeat(4, 1))
    expected = density.carry(noise, density.encode(x)[1].repeat(4, 1))
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)
    assert len(draw_lines(density, target, x, 3)) == 3


# Densities


def test_log_prob_is_that_of_the_map_from_noise() -> None:
    """Against the determinant of the Jacobian of the draws in their noise, by autograd."""
    density = straight_density(3, num_steps=20)
    x = torch.randn(3, dtype=torch.float64)
    noise = torch.randn(3, 3, dtype=torch.float64)
    z, log_det = density.push(noise, x)
    # Rows do not mix: the Jacobian of their sum is that of each.
    jacobian = torch.autograd.functional.jacobian(lambda n: density.push(n, x)[0].sum(0), noise)
    jacobian = jacobian.transpose(0, 1)
    assert log_det.abs().max() > 0.1
    torch.testing.assert_close(log_det, jacobian.det().abs().log(), rtol=1e-5, atol=1e-5)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - log_det
    torch.testing.assert_close(density.log_prob(z, x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(density.pull(z, x)[0], noise, rtol=1e-5, atol=1e-5)


def test_the_density_is_that_of_the_draws() -> None:
    """Normalised, and at its draws as large as the mean of its logarithm says.

    Draws of two steps and the density of many differ by .01 nats or so; the mean over 4000 draws
    errs by .02.
    """
    x = torch.tensor(1.0)
    posterior = straight(squared)
    grid = torch.linspace(-3.0, 3.0, 2001)
    density = posterior.log_prob({"theta": grid}, x=x).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=0.01)
    negative_entropy = torch.trapezoid(density * density.log().clamp(min=-100), grid).item()
    draws = posterior.sample(4000, x=x, seed=0)
    assert posterior.log_prob(draws, x=x).mean().item() == pytest.approx(negative_entropy, abs=0.1)


def test_gets_along_with_all_that_takes_a_solver() -> None:
    x = torch.tensor([0.5, -1.0])
    posterior = straight()
    assert posterior.solver_error(x=x).mean < 0.05
    path = posterior.trajectory(10, (0.5, 1.0), x=x, seed=0)["theta"]
    assert path.shape == (2, 10, 2)
    precise = posterior.with_solver(tolerance=1e-5).sample(10, x=x, seed=0)["theta"]
    torch.testing.assert_close(path[-1], precise, rtol=0, atol=0.1)
    assert posterior.correct(x=x, num_samples=500).khat < 0.7


# Observations with missing entries, and sets


@pytest.mark.parametrize(
    ("estimator", "x"),
    [
        (FlowMatching(linear, missing="random", **SMALL), torch.tensor([0.5, torch.nan])),
        (FlowMatching(conjugate, min_size=1, **SMALL), torch.tensor([0.5, 1.0])),
        (
            FlowMatching(conjugate, missing="random", **SMALL),
            torch.tensor([0.5, torch.nan, 1.0]),
        ),
    ],
    ids=["missing entries", "sets", "sets with missing entries"],
)
def test_any_observation_will_do(estimator: FlowMatching, x: Tensor, tmp_path: Path) -> None:
    """The first of the parameters is normal; its moments are wrong by .3 in one of 1000 seeds."""
    simulations = simulated(estimator.simulator)
    posterior = estimator.fit(simulations, num_steps=200, augment=False, progress=False)
    posterior = posterior.straighten(
        simulations, num_pairs=4000, num_steps=100, num_solver_steps=1, progress=False
    )
    (name,) = posterior.space.names
    draws = posterior.sample(2000, x=x, seed=0)[name].reshape(2000, -1)
    known = x[~x.isnan()]
    if estimator.simulator is conjugate:
        mean, variance = known.sum() / (1 + len(known)), 1 / (1 + len(known))
    else:
        mean, variance = known[0] / 2.25, 1 - 1 / 2.25
    assert abs(draws[:, 0].mean() - mean) < 0.3 * math.sqrt(variance)
    assert abs(draws[:, 0].std() / math.sqrt(variance) - 1) < 0.3
    posterior.save(tmp_path / "posterior.safetensors")
    again = estimator.load(tmp_path / "posterior.safetensors")
    assert torch.equal(again.sample(2000, x=x, seed=0)[name].reshape(2000, -1), draws)


# Devices, storage and random states


def test_everything_is_where_the_parameters_are() -> None:
    """The meta device refuses tensors of any other."""
    start = FlowMatchingDensity(2, VECTOR, width=16, num_blocks=1, num_steps=1).to("meta").eval()
    density = StraightDensity(start, VECTOR).eval()
    z, x = (torch.zeros(5, size, device="meta") for size in (2, 3))
    assert draw_lines(start, density, x, 10).data.is_meta
    assert density.sample(3, x).is_meta
    assert density.push(z, x)[1].is_meta
    assert density.field.score(torch.cat([z, z], -1), density.encode(x)[1]).is_meta


def test_survives_a_file(tmp_path: Path) -> None:
    posterior = curved().straighten(
        simulated(linear), num_pairs=500, num_steps=10, num_solver_steps=3, progress=False
    )
    posterior.save(tmp_path / "posterior.safetensors")
    again = FlowMatching(linear, **SMALL).load(tmp_path / "posterior.safetensors")
    assert isinstance(again.density, StraightDensity)
    assert again.density.solve == MidpointSolve(num_steps=3)
    x = torch.zeros(2)
    draws = [p.sample(10, x=x, seed=0) for p in (posterior, again)]
    assert torch.equal(draws[0]["theta"], draws[1]["theta"])
    assert torch.equal(*(p.log_prob(draws[0], x=x) for p in (posterior, again)))


def test_the_seed_determines_the_result_and_the_old_posterior_stays(tmp_path: Path) -> None:
    x = torch.zeros(2)
    before = curved().sample(10, x=x, seed=0)["theta"]
    state = torch.get_rng_state()
    again = partial(
        curved().straighten, simulated(linear), num_pairs=500, num_steps=60, progress=False
    )
    path = tmp_path / "checkpoint.safetensors"
    posteriors = [again(seed=1), again(seed=1, checkpoint=path), again(seed=2)]
    assert torch.equal(torch.get_rng_state(), state)
    draws = [
        p.sample(10, x=x, seed=0)["theta"] for p in (*posteriors, again(seed=1, checkpoint=path))
    ]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[3])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(curved().sample(10, x=x, seed=0)["theta"], before)


# The solver


def test_the_midpoint_method_is_of_second_order_and_costs_two_evaluations() -> None:
    calls = []

    def field(time: Tensor, w: Tensor) -> Tensor:
        calls.append(time.item())
        return 2 * time * w

    w = torch.ones(1, dtype=torch.float64)
    errors = [abs(MidpointSolve(n)(field, w, 0.0, 1.0).item() - math.e) for n in (20, 40)]
    assert 2**1.8 < errors[0] / errors[1] < 2**2.2
    assert len(calls) == 2 * (20 + 40)
    assert max(calls) < 1
    back = MidpointSolve(200)(field, MidpointSolve(200)(field, w, 0.0, 1.0), 1.0, 0.0)
    torch.testing.assert_close(back, w, rtol=1e-4, atol=1e-4)
    within = MidpointSolve(tolerance=1e-6)(field, w, 0.0, 1.0)
    assert within.item() == pytest.approx(math.e, abs=1e-4)


# Errors


def test_other_posteriors_are_refused() -> None:
    simulations = simulated(linear)
    estimator = JointFlowMatching(linear, **SMALL)
    posterior = estimator.fit(simulations, num_steps=5, augment=False, progress=False)
    with pytest.raises(TypeError, match="straighten takes posteriors of FlowMatching, got one of"):
        posterior.straighten(simulations)
    with pytest.raises(TypeError, match="got one of a StraightDensity"):
        straight().straighten(simulations)


def test_wrong_requests_are_refused() -> None:
    simulations = simulated(linear)
    with pytest.raises(ValueError, match="num_pairs must be at least 1, got 0"):
        curved().straighten(simulations, num_pairs=0)
    with pytest.raises(ValueError, match="num_solver_steps must be at least 1, got 0"):
        curved().straighten(simulations, num_solver_steps=0)
    with pytest.raises(ValueError, match=r"^num_steps must be at least 1, got 0"):
        curved().straighten(simulations, num_steps=0)
    with pytest.raises(TypeError, match="simulations must be Simulations, got dict"):
        curved().straighten({"x": torch.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'x' has shape \(2,\), got x of shape \(9, 3\)"):
        curved().straighten(Simulations({"theta": torch.zeros(9, 2)}, {"x": torch.zeros(9, 3)}))
