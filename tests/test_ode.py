"""Flows of velocity fields: third order, within tolerances, both ways, with integrals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyroflows.sbi.densities.ode import Solve
from pyroflows.transforms.solve import ConvergenceError


def spiral(time: Tensor, w: Tensor) -> Tensor:
    """Turn by two radians in a unit of time, and grow with its square."""
    first, second = w.unbind(-1)
    return 2 * time * w + 2 * torch.stack([-second, first], -1)


def exact(w: Tensor) -> Tensor:
    turn = torch.tensor(
        [[math.cos(2), -math.sin(2)], [math.sin(2), math.cos(2)]], dtype=torch.float64
    )
    return math.e * w @ turn.T


def error(solve: Solve) -> float:
    w = torch.randn(20, 2, dtype=torch.float64)
    return (solve(spiral, w, 0.0, 1.0) - exact(w)).abs().max().item()


def test_a_number_of_steps_is_of_third_order() -> None:
    torch.manual_seed(0)
    coarse = error(Solve(num_steps=80))
    torch.manual_seed(0)
    fine = error(Solve(num_steps=160))
    assert 2**2.8 < coarse / fine < 2**3.5


def test_steps_get_shorter_towards_the_end_and_meet_at_any_time() -> None:
    times = []

    def still(time: Tensor, w: Tensor) -> Tensor:
        times.append(time.item())
        return 0 * w

    Solve(num_steps=4)(still, torch.zeros(1, dtype=torch.float64), 0.0, 1.0)
    assert len(times) == 4
    lengths = [after - time for time, after in itertools.pairwise([*times, 1.0])]
    assert sum(lengths) == pytest.approx(1)
    assert all(after < before for before, after in itertools.pairwise(lengths))
    w = torch.randn(3, 2, dtype=torch.float64)
    solve = Solve(num_steps=200)
    halfway = solve(spiral, w, 0.0, 0.6)
    torch.testing.assert_close(solve(spiral, halfway, 0.6, 1.0), exact(w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_errors_follow_the_tolerance(tolerance: float) -> None:
    assert error(Solve(tolerance=tolerance)) < 20 * tolerance


@pytest.mark.parametrize("solve", [Solve(num_steps=400), Solve(tolerance=1e-7)])
def test_goes_back_the_way_it_came(solve: Solve) -> None:
    w = torch.randn(3, 4, 2, dtype=torch.float64)
    there = solve(spiral, w, 0.0, 1.0)
    torch.testing.assert_close(solve(spiral, there, 1.0, 0.0), w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solve", [Solve(num_steps=100), Solve(tolerance=1e-6)])
def test_integrates_along_the_path(solve: Solve) -> None:
    """Along a path with |w_t| = e^(t^2) |w_0|: of t -> 4 t |w_t|^2 and t -> 1."""
    w = torch.randn(5, 2, dtype=torch.float64)

    def rates(time: Tensor, w: Tensor) -> Tensor:
        square = w.square().sum(-1)
        return torch.stack([4 * time * square, torch.ones_like(square)], -1)

    end, totals = solve.integrate(spiral, rates, w, 0.0, 1.0)
    torch.testing.assert_close(end, exact(w), rtol=1e-4, atol=1e-4)
    expected = (math.e**2 - 1) * w.square().sum(-1)
    torch.testing.assert_close(totals[:, 0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals[:, 1], torch.ones_like(expected))
    _, back = solve.integrate(spiral, rates, end, 1.0, 0.0)
    torch.testing.assert_close(back, -totals, rtol=1e-4, atol=1e-4)


def test_an_integral_takes_as_many_rates_as_it_has_nodes() -> None:
    rates, velocities = [], []

    def rate(time: Tensor, w: Tensor) -> Tensor:
        rates.append(time.item())
        return w[..., :1]

    def velocity(time: Tensor, w: Tensor) -> Tensor:
        velocities.append(time.item())
        return spiral(time, w)

    Solve(num_steps=12).integrate(velocity, rate, torch.ones(1, 2), 0.0, 1.0)
    assert len(rates) == 16
    assert rates == sorted(rates)
    assert len(velocities) == 25  # one in each of 24 steps, and where the last arrives


def test_the_points_of_an_integral_are_of_third_order() -> None:
    """Of a quadrature that is exact for the rate but for the points: halved steps, error / 8."""
    w = torch.randn(5, 2, dtype=torch.float64)
    errors = []
    for num_steps in (16, 32):
        worst = 0.0

        def rate(time: Tensor, point: Tensor) -> Tensor:
            nonlocal worst
            true = Solve(tolerance=1e-9)(spiral, w, 0.0, time.item())
            worst = max(worst, (point - true).abs().max().item())
            return point[..., :1]

        Solve(num_steps).integrate(spiral, rate, w, 0.0, 1.0)
        errors.append(worst)
    assert errors[1] < errors[0] / 6


def test_is_differentiable() -> None:
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    end = Solve(num_steps=300)(spiral, w, 0.0, 1.0)
    (slope,) = torch.autograd.grad(end.sum(), w)
    expected = math.e * (math.cos(2) + torch.tensor([1.0, -1.0]) * math.sin(2))
    torch.testing.assert_close(slope, expected.double(), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_solved_is_an_error() -> None:
    def explodes(time: Tensor, w: Tensor) -> Tensor:
        return w.square()

    with pytest.raises(ConvergenceError, match="failed at t"):
        Solve(tolerance=1e-5)(explodes, torch.full((1, 1), 2.0), 0.0, 1.0)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        Solve(num_steps=0)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        Solve(tolerance=0.0)
