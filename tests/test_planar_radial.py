"""Planar and radial flows: their formulas, their limits, and the densities they make."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, Uniform

import pyroflows as pf
from pyroflows.transforms import Planar, Radial
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import jacobian, normal, perturb

DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")
NONLINEARITIES = ("tanh", "leaky_relu")


def with_parameters(flow: Any, *parts: Tensor) -> Any:
    """Return the flow in double precision with the given parameters."""
    with torch.no_grad():
        flow.double().parts.constant.copy_(torch.cat([part.reshape(-1) for part in parts]))
    return flow


def planar(u: Tensor, w: Tensor, b: float, nonlinearity: Any = "tanh") -> Planar:
    flow = Planar(len(u), nonlinearity=nonlinearity)
    return with_parameters(flow, u, w, torch.tensor([b]).double())


def radial(centre: Tensor, log_alpha: float, raw_beta: float) -> Radial:
    return with_parameters(Radial(len(centre)), centre, torch.tensor([log_alpha, raw_beta]))


# Planar


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_a_planar_flow_is_its_formula(nonlinearity: str) -> None:
    x, u, w = normal(50, 3, seed=1), normal(3, seed=2), normal(3, seed=3)
    s = (w @ u).item()
    u_hat = 1.98 / (0.98 + math.sqrt(1 + s**2) - s) * u
    t = x @ w + 0.3
    if nonlinearity == "tanh":
        h, slope = t.tanh(), t.cosh() ** -2
    else:
        h, slope = torch.where(t < 0, t / 100, t), torch.where(t < 0, 0.01, torch.ones_like(t))
    y, log_det = planar(u, w, 0.3, nonlinearity).forward_and_log_det(x)
    torch.testing.assert_close(y, x + u_hat * h.unsqueeze(-1))
    torch.testing.assert_close(log_det, (1 + slope * (w @ u_hat)).log())


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3])
def test_a_planar_flow_never_folds(size: float) -> None:
    """The gain ``w . u_hat`` rises with ``w . u`` from -0.99 without an upper limit."""
    w = size * torch.tensor([0.6, 0.8]).double()
    gains = [planar(s / size**2 * w, w, 0.0)._plane(None)[-1].item() for s in range(-1000, 1001, 8)]
    assert gains == sorted(set(gains))
    assert -0.99 < gains[0] < -0.98
    assert gains[-1] > 1900


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pull", [-100.0, 5.0])
def test_a_strong_planar_flow_inverts(nonlinearity: str, dtype: torch.dtype, pull: float) -> None:
    w = normal(4, seed=3)
    flow = planar(pull * w, w, 0.1, nonlinearity).to(dtype)
    x = 3 * normal(500, 4, seed=1).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
        y, log_det = getattr(flow, there)(x)
        x_back, log_det_back = getattr(flow, back)(y)
        assert (x_back - x).abs().max() <= tolerance, there
        assert (log_det + log_det_back).abs().max() <= 10 * tolerance, there


def test_a_piecewise_linear_planar_flow_has_the_log_det_of_its_jacobian() -> None:
    flow = perturb(pf.flow("planar", 5, num_layers=4, nonlinearity="leaky_relu").double(), 0.5)
    x = 3 * normal(50, 5, seed=1).requires_grad_()
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        expected = torch.linalg.slogdet(jacobian(y, x)).logabsdet
        torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)
        assert log_det.std() > 0.1


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_plane_without_a_normal_is_a_translation(nonlinearity: str, direction: str) -> None:
    flow, x = planar(normal(3, seed=2), torch.zeros(3), 0.7, nonlinearity), normal(5, 3, seed=1)
    y, log_det = getattr(flow, direction)(x)
    assert torch.equal(log_det, torch.zeros(5).double())
    torch.testing.assert_close(y - x, (y - x)[:1].expand(5, 3))
    (y.square().sum() + log_det.sum()).backward()
    assert flow.parts.constant.grad is not None
    assert torch.isfinite(flow.parts.constant.grad).all()
    assert flow.parts.constant.grad.all()


def test_a_planar_flow_of_infinite_parameters_does_not_invert() -> None:
    flow = planar(torch.full((3,), math.inf), torch.ones(3), 0.0)
    with pytest.raises(ConvergenceError, match="2 of 2 equations are not solved"):
        flow.inverse_and_log_det(torch.zeros(2, 3).double())


def test_an_unknown_nonlinearity_is_refused() -> None:
    message = "nonlinearity must be one of 'tanh', 'leaky_relu', got 'relu'"
    with pytest.raises(ValueError, match=message):
        pf.transforms.planar(3, nonlinearity="relu")
    with pytest.raises(ValueError, match=message):
        pf.flow("planar", 3, nonlinearity="relu")


# Radial


def test_a_radial_flow_is_its_formula() -> None:
    x, centre, alpha, beta = normal(50, 3, seed=1), normal(3, seed=2), 0.5, 1.1
    raw_beta = math.log(math.expm1(beta / alpha + 0.99))
    y, log_det = radial(centre, math.log(alpha), raw_beta).forward_and_log_det(x)
    r = (x - centre).square().sum(-1).sqrt()
    h = 1 / (alpha + r)
    torch.testing.assert_close(y, x + beta * h.unsqueeze(-1) * (x - centre), rtol=1e-6, atol=1e-6)
    expected = 2 * (1 + beta * h).log() + (1 + beta * h - beta * r * h**2).log()
    torch.testing.assert_close(log_det, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("raw_beta", [-100.0, 30.0])
@pytest.mark.parametrize("distance", [0.0, 1e-6, 1.0, 1e3])
def test_a_strong_radial_flow_inverts(dtype: torch.dtype, raw_beta: float, distance: float) -> None:
    centre = normal(4, seed=2)
    flow = radial(centre, 0.5, raw_beta).to(dtype)
    x = (centre + distance * normal(200, 4, seed=1)).to(dtype)
    tolerance = (1e-4 if dtype == torch.float32 else 1e-10) * max(distance, 1)
    for there, back in (DIRECTIONS, DIRECTIONS[::-1]):
        y, log_det = getattr(flow, there)(x)
        x_back, log_det_back = getattr(flow, back)(y)
        assert (x_back - x).abs().max() <= tolerance, there
        assert (log_det + log_det_back).abs().max() <= 10 * tolerance, there


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_centre_of_a_radial_flow_stays(direction: str) -> None:
    centre = normal(3, seed=2).requires_grad_()
    flow = radial(centre.detach(), 0.0, 0.5)
    y, log_det = getattr(flow, direction)(centre)
    torch.testing.assert_close(y, centre)
    (y.sum() + log_det).backward()
    assert centre.grad is not None
    assert torch.isfinite(centre.grad).all()
    assert flow.parts.constant.grad is not None
    assert torch.isfinite(flow.parts.constant.grad).all()


# Densities


# Cells that the edge of the uniform density cuts through count wholly or not at all.
@pytest.mark.parametrize(
    ("base", "reach", "tolerance"), [("uniform", 3, 3e-3), ("normal", 10, 1e-5)]
)
@pytest.mark.parametrize("name", ["planar", "radial"])
def test_a_density_integrates_to_one(name: str, base: str, reach: int, tolerance: float) -> None:
    zeros, ones = torch.zeros(2).double(), torch.ones(2).double()
    start = Uniform(-ones, ones, validate_args=False) if base == "uniform" else Normal(zeros, ones)
    flow = perturb(pf.flow(name, 2, num_layers=10).double(), 0.3)
    density = pf.Flow(Independent(start, 1, validate_args=False), flow)
    step = 2 * reach / 300
    ticks = torch.arange(-reach + step / 2, reach, step).double()
    with torch.no_grad():
        draws = density.sample((10_000,))
        integral = density.log_prob(torch.cartesian_prod(ticks, ticks)).exp().sum() * step**2
    assert draws.abs().max() < reach
    assert abs(integral - 1) < tolerance
    assert (draws.mean(0).abs() + (draws.std(0) - start.stddev).abs()).max() > 0.1
