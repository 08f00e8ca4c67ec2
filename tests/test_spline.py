"""The rational-quadratic spline as a scalar function."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyroflows.transforms import Spline
from tests.batteries import normal

SPLINES = [Spline(bins=2), Spline(), Spline(bins=16, bound=3.0), Spline(min_slope=0.5)]
SCALES = [0.0, 0.1, 1.0, 3.0]
COUNT = 500


@pytest.fixture(params=SPLINES, ids=str)
def spline(request: pytest.FixtureRequest) -> Spline:
    return request.param


@pytest.fixture(params=SCALES)
def scale(request: pytest.FixtureRequest) -> float:
    return request.param


def raw(spline: Spline, scale: float, count: int = COUNT) -> Tensor:
    """Draw raw parameters of ``count`` splines."""
    return scale * normal(spline.num_parameters, count, seed=1)


def spread(spline: Spline, count: int = COUNT, reach: float = 1.0) -> Tensor:
    """Spread numbers over the box, or a multiple of it, without hitting its ends."""
    half = reach * spline.bound
    return (torch.arange(count).double() + 0.5) / count * 2 * half - half


def knots(spline: Spline, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the knots ``(bins + 1, count)`` along x and y from the definition."""

    def along(raw: Tensor) -> Tensor:
        fractions = spline.min_bin_size + (1 - spline.bins * spline.min_bin_size) * raw.softmax(0)
        ends = torch.cat([torch.zeros_like(raw[:1]), fractions.cumsum(0)])
        return spline.bound * (2 * ends - 1)

    K = spline.bins
    return along(parameters[:K]), along(parameters[K : 2 * K])


def test_is_the_identity_at_zero_parameters(spline: Spline) -> None:
    x = spread(spline, reach=2.0)
    for direction in (spline.forward, spline.inverse):
        y, log_slope = direction(x, raw(spline, 0.0))
        torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_is_the_identity_outside_the_box(spline: Spline, scale: float) -> None:
    x = torch.tensor([-1e30, -1e3, -1.001, -1.0, 1.0, 1.001, 1e3, 1e30]).double() * spline.bound
    for direction in (spline.forward, spline.inverse):
        y, log_slope = direction(x, raw(spline, scale, len(x)))
        assert torch.equal(y, x)
        assert torch.equal(log_slope, torch.zeros_like(x))


@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_joins_its_tails_with_value_and_slope(spline: Spline, scale: float, side: float) -> None:
    gap = 1e-9
    x = torch.full((COUNT,), side * (spline.bound - gap)).double()
    for direction in (spline.forward, spline.inverse):
        y, log_slope = direction(x, raw(spline, scale))
        assert (y - side * spline.bound).abs().max() <= 2 * gap
        assert log_slope.abs().max() <= 1e-5


def test_increases(spline: Spline, scale: float) -> None:
    x = spread(spline, 2001, reach=1.1).unsqueeze(-1).expand(-1, 20)
    parameters = raw(spline, scale, 20).unsqueeze(1)
    for direction in (spline.forward, spline.inverse):
        y, log_slope = direction(x, parameters.expand(-1, 2001, -1))
        assert (y.diff(dim=0) > 0).all()
        assert torch.isfinite(log_slope).all()


def test_runs_through_its_knots(spline: Spline, scale: float) -> None:
    parameters = raw(spline, scale)
    for x, y in zip(*knots(spline, parameters), strict=True):
        forward, _ = spline.forward(x, parameters)
        inverse, _ = spline.inverse(y, parameters)
        torch.testing.assert_close(forward, y, rtol=0, atol=1e-10)
        torch.testing.assert_close(inverse, x, rtol=0, atol=1e-10)


def test_is_smooth_at_its_knots(spline: Spline, scale: float) -> None:
    """The slope jumps by no more than the curvature, up to 1e6 here, allows over the gap."""
    parameters, gap = raw(spline, scale), 1e-10
    for x in knots(spline, parameters)[0]:
        _, left = spline.forward(x - gap, parameters)
        _, right = spline.forward(x + gap, parameters)
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


def test_no_slope_at_a_knot_is_below_the_smallest(spline: Spline) -> None:
    parameters = raw(spline, 30.0)
    for x in knots(spline, parameters)[0][1:-1]:
        _, log_slope = spline.forward(x, parameters)
        assert log_slope.exp().min() >= spline.min_slope - 1e-9


def test_its_slope_is_its_derivative(spline: Spline, scale: float) -> None:
    parameters = raw(spline, scale)
    for direction in (spline.forward, spline.inverse):
        x = spread(spline, reach=1.2).requires_grad_()
        y, log_slope = direction(x, parameters)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(log_slope, slope.log(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_inverse_is_exact_to_rounding(spline: Spline, scale: float, dtype: torch.dtype) -> None:
    """An error of ``eps`` in y is one of ``eps / slope`` in x."""
    x, parameters = spread(spline, reach=1.2).to(dtype), raw(spline, scale).to(dtype)
    eps = 100 * torch.finfo(dtype).eps * spline.bound
    y, log_slope = spline.forward(x, parameters)
    back, log_slope_back = spline.inverse(y, parameters)
    assert ((back - x) * log_slope.exp().clamp(max=1.0)).abs().max() <= eps
    assert (log_slope + log_slope_back).abs().max() <= (1e-2 if dtype == torch.float32 else 1e-9)
    if scale <= 1.0:
        assert (back - x).abs().max() <= (1e-4 if dtype == torch.float32 else 1e-10)


def test_rounding_does_not_break_the_inverse_of_wild_splines(spline: Spline) -> None:
    """In float32 some discriminants at the knots are negative, none in exact arithmetic."""
    parameters = raw(spline, 10.0, 5_000)
    for y in knots(spline, parameters)[1][1:-1]:
        x, _ = spline.inverse(y.float(), parameters.float())
        exact, log_slope = spline.inverse(y.float().double(), parameters)
        error = (x - exact).abs() * log_slope.neg().exp().clamp(max=1.0)
        assert (error <= 5e-4 * spline.bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_its_gradients_are_finite_everywhere(spline: Spline, dtype: torch.dtype) -> None:
    parameters = raw(spline, 3.0, 1)
    along_x, along_y = (axis.flatten() for axis in knots(spline, parameters))
    far = torch.tensor([-1e30, -1e6, -spline.bound, 0.0, spline.bound, 1e6, 1e30])
    x = torch.cat([along_x, along_y, far.double()]).to(dtype).requires_grad_()
    leaf = parameters.to(dtype).expand(-1, len(x)).clone().requires_grad_()
    for direction in (spline.forward, spline.inverse):
        for answer in direction(x, leaf):
            gradients = torch.autograd.grad(answer.sum(), (x, leaf), retain_graph=True)
            assert all(torch.isfinite(gradient).all() for gradient in gradients)
            assert not gradients[1][:, [-7, -6, -2, -1]].any()


@pytest.mark.parametrize("size", [30.0, 300.0])
def test_extreme_parameters_stay_finite(spline: Spline, size: float) -> None:
    signs = raw(spline, 1.0).sign()
    for x, dtype in itertools.product([spread(spline)], [torch.float32, torch.float64]):
        leaf = (size * signs).to(dtype).requires_grad_()
        for direction in (spline.forward, spline.inverse):
            y, log_slope = direction(x.to(dtype), leaf)
            assert (y.abs() <= spline.bound).all()
            assert torch.isfinite(log_slope).all()
            assert torch.autograd.grad(y.sum() + log_slope.sum(), leaf)[0].isfinite().all()


def test_takes_numbers_of_any_shape(spline: Spline) -> None:
    parameters = raw(spline, 1.0, 24)
    x = spread(spline, 24)
    for direction in (spline.forward, spline.inverse):
        flat = direction(x, parameters)
        for shape in ((2, 3, 4), (24, 1)):
            shaped = direction(x.reshape(shape), parameters.reshape(-1, *shape))
            assert shaped[0].shape == shaped[1].shape == shape
            torch.testing.assert_close([t.flatten() for t in shaped], list(flat))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"bins": -3}, "bins must be at least 2, got -3"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"bound": -1.0}, "bound must be positive, got -1.0"),
        ({"bound": math.nan}, "bound must be positive, got nan"),
        ({"bins": 4, "min_bin_size": 0.25}, r"min_bin_size .*\(0, 1 / bins\), got 0.25 with 4"),
        ({"min_bin_size": 0.0}, r"min_bin_size must lie in \(0, 1 / bins\), got 0.0"),
        ({"min_slope": 1.0}, r"min_slope must lie in \(0, 1\), got 1.0"),
        ({"min_slope": 0.0}, r"min_slope must lie in \(0, 1\), got 0.0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spline(**options)
