"""Monotone networks and polynomials: their formulas, tails, inverses, and what they learn."""

import math
from typing import Any

import pytest
import torch
from numpy.polynomial import Polynomial

import pyroflows as pf
from pyroflows.transforms import DeepSigmoidal, Elementwise, ScalarBijection, SumOfSquares
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import normal

MONOTONE = (DeepSigmoidal(), DeepSigmoidal(1), SumOfSquares(), SumOfSquares(1, 1), SumOfSquares(10))


@pytest.fixture(params=MONOTONE, ids=repr)
def bijection(request: pytest.FixtureRequest) -> ScalarBijection:
    return request.param


def raw(bijection: ScalarBijection, size: int, scale: float = 1.0) -> torch.Tensor:
    return scale * normal(bijection.num_parameters, size, seed=2)


# Formulas


def test_a_deep_sigmoidal_map_is_its_formula() -> None:
    x = normal(50, seed=1).requires_grad_()
    slopes, biases, weights = raw(DeepSigmoidal(5), 50).unflatten(0, (3, 5))
    a = (3 * (slopes / 3).tanh()).exp()
    pivots = torch.tensor([-3, -1.5, 0, 1.5, 3]).double().unsqueeze(-1)
    mixture = weights.softmax(0) * torch.sigmoid(a * (x + pivots) - pivots + biases)
    expected = 0.01 * x + 0.99 * mixture.sum(0).logit()
    y, log_slope = DeepSigmoidal(5).forward(x, raw(DeepSigmoidal(5), 50))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_slope.exp(), torch.autograd.grad(expected.sum(), x)[0])


def test_a_sum_of_squares_is_its_formula() -> None:
    x, parameters = 6 * normal(50, seed=1), raw(SumOfSquares(3, 2, bound=4.0), 50, 0.5)
    y, log_slope = SumOfSquares(3, 2, bound=4.0).forward(x, parameters)
    assert (x.abs() > 4).any()
    for i in range(50):
        shift, coefficients = parameters[0, i], parameters[1:, i].reshape(4, 2).clone()
        coefficients[0] += torch.tensor([1 / 3, 2 / 3]).double().sqrt()
        squares = [
            Polynomial(coefficients[:, k].numpy() / 4.0 ** torch.arange(4).numpy()) ** 2
            for k in range(2)
        ]
        slope = 0.01 + 0.99 * sum(squares[1:], squares[0])
        inside = x[i].clamp(-4, 4).item()
        expected = shift + slope.integ()(inside) + (x[i] - inside) * slope(inside)
        torch.testing.assert_close(y[i], expected)
        assert log_slope[i].exp().item() == pytest.approx(slope(inside))


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_log_derivative_is_that_of_the_map(bijection: ScalarBijection, scale: float) -> None:
    x, parameters = 5 * normal(500, seed=1).requires_grad_(), raw(bijection, 500, scale)
    y, log_slope = bijection.forward(x, parameters)
    (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, expected.log(), rtol=0, atol=1e-8)


def test_slopes_are_bounded_from_below(bijection: Any) -> None:
    x, parameters = 5 * normal(1000, seed=1), raw(bijection, 1000, 30.0)
    _, log_slope = bijection.forward(x, parameters)
    assert log_slope.min() >= math.log(bijection.min_slope) - 1e-12
    if isinstance(bijection, DeepSigmoidal):
        assert log_slope.max() < bijection.log_slope_bound + math.log(2)


# Tails


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_deep_sigmoidal_map_is_linear_far_in_the_tails(dtype: torch.dtype) -> None:
    """The smallest slope wins: to the left the largest summand, to the right the smallest rest."""
    slopes, biases, weights = raw(DeepSigmoidal(4), 1).unflatten(0, (3, 4))
    parameters = torch.cat([slopes, biases, weights])
    a = (3 * (slopes / 3).tanh()).exp()
    j = a.argmin().item()
    b = biases[j] + (a[j] - 1) * (-3 + 2 * j)
    w = weights.log_softmax(0)[j]
    for x, sign in ((-1e4, 1), (1e4, -1)):
        expected = 0.01 * x + 0.99 * (a[j] * x + b + sign * w)
        point = torch.tensor([x], dtype=dtype)
        y, log_slope = DeepSigmoidal(4).forward(point, parameters.to(dtype))
        torch.testing.assert_close(y, expected.to(dtype))
        torch.testing.assert_close(log_slope, (0.01 + 0.99 * a[j]).log().to(dtype))
        back, _ = DeepSigmoidal(4).inverse(y, parameters.to(dtype))
        torch.testing.assert_close(back, point)


# Inverses


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [(torch.float32, 1.0, 1e-4), (torch.float64, 1.0, 1e-10), (torch.float64, 10.0, 1e-10)],
    ids=str,
)
def test_inverts_at_large_parameters(
    bijection: ScalarBijection, dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    x, parameters = 3 * normal(5000, seed=1).to(dtype), raw(bijection, 5000, scale).to(dtype)
    with torch.inference_mode():
        y, log_slope = bijection.forward(x, parameters)
        x_back, log_slope_back = bijection.inverse(y, parameters)
    assert (x_back - x).abs().max() <= tolerance
    assert (log_slope + log_slope_back).abs().max() <= 10 * tolerance


def test_a_map_that_is_not_finite_does_not_invert(bijection: ScalarBijection) -> None:
    parameters = torch.full((bijection.num_parameters, 2), math.nan)
    with pytest.raises(ConvergenceError, match="2 of 2 equations are not solved"):
        bijection.inverse(torch.zeros(2), parameters)


# Learning


def bimodal(size: int) -> torch.Tensor:
    return 2.5 * torch.randint(0, 2, (size, 1)).mul(2).sub(1) + torch.randn(size, 1) / 2


@pytest.mark.parametrize("bijection", [DeepSigmoidal(), SumOfSquares()], ids=repr)
def test_equal_units_part_and_learn_two_modes(bijection: ScalarBijection) -> None:
    """From zero parameters. Units that remained equal would make an affine map, 0.94 nats off."""
    flow = Elementwise(bijection, 1)
    base = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
    density = pf.Flow(torch.distributions.Independent(base, 1), flow.inv)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-density.log_prob(two_modes(256)).mean()).backward()
        optimizer.step()
    entropy = math.log(2) + math.log(math.sqrt(2 * math.pi * math.e) / 2)
    with torch.no_grad():
        divergence = -density.log_prob(two_modes(20_000)).mean() - entropy
    assert divergence < 0.2


def two_modes(size: int) -> torch.Tensor:
    return 2.5 * torch.randint(0, 2, (size, 1)).mul(2).sub(1) + torch.randn(size, 1) / 2


# Errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepSigmoidal(0), "hidden_units must be at least 1, got 0"),
        (lambda: DeepSigmoidal(log_slope_bound=0.0), "log_slope_bound must be positive, got 0.0"),
        (lambda: DeepSigmoidal(min_slope=1.0), r"min_slope must lie in \(0, 1\), got 1.0"),
        (lambda: SumOfSquares(degree=0), r"degree must lie in 1 \.\. 10, got 0"),
        (lambda: SumOfSquares(degree=11), r"degree must lie in 1 \.\. 10, got 11"),
        (lambda: SumOfSquares(num_squares=0), "num_squares must be at least 1, got 0"),
        (lambda: SumOfSquares(bound=0.0), "bound must be positive, got 0.0"),
        (lambda: SumOfSquares(min_slope=0.0), r"min_slope must lie in \(0, 1\), got 0.0"),
        (lambda: pf.flow("neural_autoregressive", 4, hidden_units=0), "hidden_units must be"),
        (lambda: pf.flow("sum_of_squares", 4, degree=0), "degree must lie in"),
        (
            lambda: pf.transforms.neural_autoregressive(4, activation="tanh"),
            "activation must be 'sigmoid', got 'tanh'",
        ),
    ],
)
def test_impossible_options_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_options_reach_the_bijections() -> None:
    assert "hidden_units=5" in repr(pf.flow("neural_autoregressive", 4, hidden_units=5))
    assert "hidden_units=5" in repr(pf.transforms.neural_autoregressive(4, width=5))
    assert "degree=2, num_squares=6, bound=1.5" in repr(
        pf.flow("sum_of_squares", 4, degree=2, num_squares=6, bound=1.5)
    )
