"""Equations of increasing functions: solved to rounding, in few steps, or not at all."""

import pytest
import torch
from torch import Tensor

from pyroflows.transforms import ConvergenceError
from pyroflows.transforms.solve import solve_increasing, with_implicit_gradient


def cubic(x: Tensor) -> tuple[Tensor, Tensor]:
    return x**3 + 0.01 * x, 3 * x**2 + 0.01


def steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rise in steep steps between flat parts, where Newton's method runs away."""
    return x + 10 * torch.tanh(20 * x), 1 + 200 / torch.cosh(20 * x).square()


@pytest.mark.parametrize("function", [cubic, steps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solves_to_rounding_in_few_evaluations(function, dtype: torch.dtype) -> None:
    solution = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    target, slope = function(solution)
    evaluations = 0

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        return function(x)

    bracket = torch.full_like(solution, 7.0).to(dtype)
    x = solve_increasing(counted, target.to(dtype), -bracket, bracket)
    assert x.dtype == dtype
    # The target is known to rounding, the solution to that divided by the slope.
    eps = torch.finfo(dtype).eps
    resolution = 20 * eps * (1 + solution.abs() + (1 + target.abs()) / slope)
    assert ((x - solution).abs() <= resolution).all()
    assert evaluations <= 40


def test_a_target_that_is_not_a_number_has_no_solution_and_disturbs_no_other() -> None:
    target = torch.tensor([8.0, torch.nan, 1.0])
    x = solve_increasing(cubic, target, torch.full((3,), -9.0), torch.full((3,), 9.0))
    assert x.isnan().tolist() == [False, True, False]


def test_a_function_that_is_not_finite_raises() -> None:
    def nowhere(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * torch.nan, torch.ones_like(x)

    with pytest.raises(ConvergenceError, match="2 of 2 equations are not solved"):
        solve_increasing(nowhere, torch.zeros(2), -torch.ones(2), torch.ones(2))


def test_the_implicit_gradient_is_that_of_the_inverse_function() -> None:
    target = torch.tensor([2.0, -30.0], dtype=torch.float64, requires_grad=True)
    bracket = torch.full((2,), 9.0, dtype=torch.float64)
    x = solve_increasing(cubic, target.detach(), -bracket, bracket)
    value, slope = cubic(x)
    root = with_implicit_gradient(x, value, slope, target)
    (gradient,) = torch.autograd.grad(root.sum(), target)
    torch.testing.assert_close(gradient, 1 / slope)
