"""Flows of angles: periodic, smooth across the cut, normalised on the torus."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import pyroflows as pf
from pyroflows.transforms import (
    Affine,
    Autoregressive,
    Chain,
    CircularSpline,
    Compose,
    Coupling,
    Elementwise,
    FlowTransform,
    Spline,
)
from pyroflows.transforms.circular import wrap
from tests.batteries import normal, perturb

pi = math.pi
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SPLINES = [CircularSpline(), CircularSpline(bins=2), CircularSpline(bins=16, min_slope=0.5)]


@pytest.fixture(params=SPLINES, ids=str)
def spline(request: pytest.FixtureRequest) -> CircularSpline:
    return request.param


def raw(spline: CircularSpline, count: int, scale: float = 1.0) -> Tensor:
    return scale * normal(spline.num_parameters, count, seed=1)


def angles(*shape: int, seed: int = 2) -> Tensor:
    return wrap(3 * normal(*shape, seed=seed))


def build(input_dim: int, context_dim: int = 0, noise: float = 0.3) -> FlowTransform:
    torch.manual_seed(0)
    flow = pf.flow("circular_spline", input_dim, context_dim, num_layers=2, hidden_dims=(16,))
    return perturb(flow.double(), noise)


def density(flow: FlowTransform) -> pf.Flow:
    box = torch.full(flow.event_shape, pi, dtype=torch.float64)
    return pf.Flow(dist.Uniform(-box, box, validate_args=False).to_event(1), flow)


# Wrapping


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrapping_gives_the_equal_angle_between_the_ends(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-20, 20, 5001), pi * torch.arange(-9, 10)]).to(dtype)
    ends = torch.tensor([-pi, pi]).to(dtype)
    x = torch.cat(
        [x, *(torch.nextafter(e, e + s) for e in ends.view(2, 1).float() for s in (-1, 1))]
    )
    x = x.to(dtype)
    y = wrap(x)
    assert y.dtype == dtype
    assert (y >= -pi).all()
    assert (y < pi).all()
    error = torch.remainder((y.double() - x.double()) / (2 * pi) + 0.5, 1) - 0.5
    assert error.abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wrapping_leaves_angles_exactly_alone(dtype: torch.dtype) -> None:
    x = torch.linspace(-3.125, 3.125, 5001).to(dtype)
    assert torch.equal(wrap(x), x)


# The scalar bijection


def test_is_periodic(spline: CircularSpline) -> None:
    x, parameters = angles(200), raw(spline, 200)
    for direction in (spline.forward, spline.inverse):
        for turns in (-2, 1):
            again = direction(x + turns * 2 * pi, parameters)
            torch.testing.assert_close(again, direction(x, parameters), rtol=0, atol=1e-9)


def test_stays_between_the_ends(spline: CircularSpline) -> None:
    x = torch.cat([angles(996), torch.tensor([-pi, 0.0, pi, 100.0]).double()])
    for direction in (spline.forward, spline.inverse):
        y, _ = direction(x, raw(spline, 1000, scale=3.0))
        assert (y >= -pi).all()
        assert (y < pi).all()


def test_is_smooth_across_the_cut_of_inputs(spline: CircularSpline) -> None:
    """Value and slope on both sides of pi; both jump for a spline with free ends."""
    parameters, step = raw(spline, 100), 1e-7
    ends = torch.full((100,), pi, dtype=torch.float64)
    left, left_slope = spline.forward(ends - step, parameters)
    right, right_slope = spline.forward(-ends + step, parameters)
    assert wrap(right - left).abs().max() < 1e-4
    torch.testing.assert_close(left_slope, right_slope, rtol=0, atol=1e-3)
    assert left_slope.abs().max() > 0.5


def test_zero_parameters_mean_the_identity(spline: CircularSpline) -> None:
    x = angles(200)
    y, log_slope = spline.forward(x, raw(spline, 200, scale=0.0))
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def test_the_first_parameter_rotates_the_image(spline: CircularSpline) -> None:
    x, parameters = angles(200), raw(spline, 200)
    turned = parameters.clone()
    turned[0] += 2.5
    y, log_slope = spline.forward(x, parameters)
    y_turned, log_slope_turned = spline.forward(x, turned)
    assert wrap(y_turned - y - 2.5).abs().max() < 1e-12
    assert torch.equal(log_slope_turned, log_slope)


def test_is_a_spline_that_begins_and_ends_with_one_slope(spline: CircularSpline) -> None:
    """Between the cuts it is the spline of the line; outer slopes of 1 are common to both."""
    K, x = spline.bins, angles(200)
    parameters = raw(spline, 200)
    parameters[0] = 0.0
    parameters[2 * K + 1] = 0.0
    line = Spline(K, pi, spline.min_bin_size, spline.min_slope)
    expected = line.forward(x, torch.cat([parameters[1 : 2 * K + 1], parameters[2 * K + 2 :]]))
    torch.testing.assert_close(spline.forward(x, parameters), expected, rtol=0, atol=1e-12)


# Flows on the torus


@torch.no_grad()
@pytest.mark.parametrize("input_dim", [1, 2, 5])
def test_the_density_is_continuous_across_the_cut(input_dim: int) -> None:
    flow = density(build(input_dim))
    for entry in range(input_dim):
        left, right = angles(100, input_dim), angles(100, input_dim)
        left[:, entry], right[:, entry] = pi - 1e-8, -pi + 1e-8
        torch.testing.assert_close(flow.log_prob(left), flow.log_prob(right), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("input_dim", [1, 2])
def test_the_density_integrates_to_one(input_dim: int, context_dim: int) -> None:
    flow = build(input_dim, context_dim, noise=0.2)
    flow = flow.condition(torch.ones(2).double()) if context_dim else flow
    points = 20_000 if input_dim == 1 else 400
    axis = (torch.arange(points).double() + 0.5) / points * 2 * pi - pi
    grid = torch.cartesian_prod(*[axis] * input_dim).reshape(-1, input_dim)
    log_prob = density(flow).log_prob(grid)
    assert log_prob.std() > 0.1
    assert log_prob.exp().mean() * (2 * pi) ** input_dim == pytest.approx(1.0, abs=1e-3)


@torch.no_grad()
def test_samples_lie_on_the_torus() -> None:
    x = density(build(3)).sample((1000,))
    assert (x >= -pi).all()
    assert (x < pi).all()


@torch.no_grad()
def test_a_coupling_reads_angles_and_not_numbers() -> None:
    flow, x = build(4), angles(50, 4)
    for direction in (flow.forward_and_log_det, flow.inverse_and_log_det):
        again = direction(x + 2 * pi * torch.tensor([1, -1, 2, 0]).double())
        torch.testing.assert_close(again, direction(x), rtol=0, atol=1e-9)


@torch.no_grad()
def test_rotations_of_the_image_rotate_the_density() -> None:
    flow = Elementwise(CircularSpline(4), 2)
    perturb(flow.double(), 1.0)
    x, shift = angles(50, 2), torch.tensor([0.7, -2.0]).double()
    before = density(flow).log_prob(x)
    flow.parameter[:2] += shift  # the rotations are the first plane of parameters
    torch.testing.assert_close(density(flow).log_prob(wrap(x + shift)), before, rtol=0, atol=1e-10)


def test_learns_a_mixture_of_von_mises() -> None:
    """The KL divergence of a mixture with a mode on the cut, by quadrature, in nats."""
    torch.manual_seed(0)
    flow = pf.flow("circular_spline", 1, num_layers=2)
    box = torch.full((1,), pi)
    fitted = pf.Flow(dist.Uniform(-box, box, validate_args=False).to_event(1), flow)
    x = (torch.arange(200) + 0.5) / 200 * 2 * pi - pi
    modes = [dist.VonMises(loc, k).log_prob(x) for loc, k in ((3.1, 8.0), (0.5, 4.0))]
    truth = torch.logaddexp(*modes) - math.log(2)
    weight = truth.exp() * 2 * pi / 200
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)

    def divergence() -> Tensor:
        return (weight * (truth - fitted.log_prob(x.unsqueeze(-1)))).sum()

    start = divergence().item()
    for _ in range(150):
        optimizer.zero_grad()
        divergence().backward()
        optimizer.step()
    assert start > 0.5
    assert divergence() < 0.005


@pytest.mark.parametrize(
    "wrapping",
    [
        lambda f: f,
        lambda f: f.inv,
        lambda f: Compose([f, f.inv]),
        lambda f: Compose([f]).inv,
    ],
)
@pytest.mark.parametrize(
    "layer", [Elementwise(CircularSpline(), 3), Coupling(CircularSpline(), 3), build(3)]
)
def test_says_that_it_maps_angles(layer: FlowTransform, wrapping: Callable) -> None:
    flow = wrapping(layer)
    for space in (flow.domain, flow.codomain):
        assert space.event_dim == 1
        assert space.check(torch.tensor([-3.0, 3.0, 0.0]))
        assert not space.check(torch.tensor([-3.0, 3.2, 0.0]))


def test_other_flows_say_that_they_map_vectors() -> None:
    for flow in (Elementwise(Spline(), 3), Coupling(Affine(), 3), pf.flow("realnvp", 3)):
        assert isinstance(flow.domain, type(constraints.real_vector))
        assert flow.codomain.check(torch.tensor([-3.0, 300.0, 0.0]))


def test_a_chain_of_circular_splines_is_one_of_angles() -> None:
    chain = Chain(CircularSpline(4), CircularSpline(4))
    flow, x = perturb(Coupling(chain, 3).double(), 0.3), angles(50, 3)
    y, log_det = flow.forward_and_log_det(x)
    again, log_det_again = flow.forward_and_log_det(x + 2 * pi)
    torch.testing.assert_close(wrap(again), y, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_det_again, log_det, rtol=0, atol=1e-9)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"bins": 8, "min_bin_size": 0.2}, r"min_bin_size must lie in \(0, 1 / bins\), got 0.2"),
        ({"min_slope": 1.0}, r"min_slope must lie in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CircularSpline(**options)


def test_an_autoregressive_network_cannot_read_angles() -> None:
    with pytest.raises(ValueError, match=r"bijection .*CircularSpline.*use Coupling"):
        Autoregressive(CircularSpline(), 3)


def test_a_chain_of_angles_and_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all act on angles or all on ordinary numbers.*Affine"):
        Chain(CircularSpline(), Affine())


def test_a_guide_refuses_a_flow_of_angles() -> None:
    with pytest.raises(ValueError, match="'circular_spline' maps angles"):
        pf.AutoFlow(lambda: None, flow="circular_spline")
