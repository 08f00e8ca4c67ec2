"""The Sylvester flow: its formula, its Jacobian far from the start, and its inverse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pyroflows as pf
from pyroflows.nn.orthogonal import FixedAxes, Reflections, Rotation
from pyroflows.transforms import FlowTransform, Sylvester, sylvester
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import jacobian, normal, perturb

AXES = {
    "householder": lambda D: None,
    "few reflections": lambda D: Reflections(D, 2, random=True),
    "orthogonal": lambda D: Rotation(D, random=True),
    "triangular": lambda D: FixedAxes(D),
    "triangular, backwards": lambda D: FixedAxes(D, backwards=True),
}
PARAMETRIZATIONS = ("householder", "orthogonal", "triangular")


@pytest.fixture(params=AXES)
def axes(request: pytest.FixtureRequest) -> str:
    return request.param


def build(axes: str, noise: float, num_units: int = 5, **options: Any) -> Sylvester:
    flow = Sylvester(5, num_units=num_units, axes=AXES[axes](5), **options).double()
    return perturb(flow, noise)


@pytest.mark.parametrize("num_units", [1, 3, 5])
def test_is_its_formula(axes: str, num_units: int) -> None:
    flow, x = build(axes, 1.0, num_units), normal(7, 5, seed=1)
    Q = flow.axes()[:, :num_units]
    outer, inner, bias = flow.triangles()
    torch.testing.assert_close(Q.T @ Q, torch.eye(num_units).double(), rtol=0, atol=1e-12)
    for triangle in (outer, inner):
        assert torch.equal(triangle, triangle.triu())
    y = torch.stack([row + Q @ outer @ torch.tanh(inner @ Q.T @ row + bias) for row in x])
    torch.testing.assert_close(flow(x), y)


def test_log_det_is_right_far_from_the_start(axes: str) -> None:
    flow, x = build(axes, 2.0), 3 * normal(100, 5, seed=1).requires_grad_()
    y, log_det = flow.forward_and_log_det(x)
    sign, expected = torch.linalg.slogdet(jacobian(y, x))
    assert (sign > 0).all()
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_units", [1, 3, 5])
def test_inverts_far_from_the_start(axes: str, num_units: int) -> None:
    flow, x = build(axes, 2.0, num_units), 3 * normal(100, 5, seed=1)
    with torch.no_grad():
        y, log_det = flow.forward_and_log_det(x)
        back, inverse_log_det = flow.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-6)


def test_inverts_where_a_unit_is_as_flat_as_it_may_be() -> None:
    """The slope at the origin is a hundredth: the inverse stays accurate to the rounding of it."""
    flow = Sylvester(1).double()
    with torch.no_grad():
        flow.units.constant.copy_(torch.tensor([-1e3, 0.0, 0.0]))
    x = torch.linspace(-1, 1, 201).double().unsqueeze(-1)
    y, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(y, x - 0.99 * x.tanh(), rtol=0, atol=1e-15)
    torch.testing.assert_close(log_det.min().exp(), torch.tensor(0.01).double())
    torch.testing.assert_close(flow.inv(y.clone()), x, rtol=0, atol=1e-12)


def test_every_unit_is_increasing_whatever_its_parameters() -> None:
    flow = Sylvester(5).double()
    for noise in (1.0, 10.0, 1000.0):
        for _ in range(20):
            nn.init.normal_(flow.units.constant, std=noise)
            with torch.no_grad():  # the scale of the inner diagonal cancels
                flow.units.constant.view(5, 7)[:, 5] = 0.0
                outer, inner, _ = flow.triangles()
            assert (outer.diagonal() * inner.diagonal() >= -0.99 - 1e-12).all()


def test_large_slopes_and_small_ones_are_reached() -> None:
    """Unlike with diagonals of bounded size, a unit may stretch by any factor."""
    flow = Sylvester(1).double()
    for raw, slope in ((20.0, 21.0), (-20.0, 0.01)):
        with torch.no_grad():
            flow.units.constant.copy_(torch.tensor([raw, 0.0, 0.0]))
        log_det = flow.log_abs_det_jacobian(torch.zeros(1).double(), torch.zeros(1).double())
        assert log_det.exp().item() == pytest.approx(slope, rel=0.05)


class Inverted(nn.Module):
    """Make the inverse of a flow a function of inputs and parameters."""

    def __init__(self, flow: FlowTransform) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(*inputs)


@pytest.mark.parametrize("context_dim", [0, 2])
def test_gradients_of_the_inverse_are_right_far_from_the_start(axes: str, context_dim: int) -> None:
    inverted = Inverted(build(axes, 1.0, context_dim=context_dim, hidden_dims=(4,)))
    inputs = [normal(3, 5, seed=1), *([normal(3, 2, seed=2)] if context_dim else [])]
    names, parameters = zip(*inverted.named_parameters())
    variables = [t.detach().clone().requires_grad_() for t in (*inputs, *parameters)]

    def function(*variables: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, variables[len(inputs) :]))
        return functional_call(inverted, given, variables[: len(inputs)])

    assert torch.autograd.gradcheck(function, variables, fast_mode=True)


# Bad input


def test_a_row_of_nan_is_nan_and_leaves_the_others_alone() -> None:
    flow, y = build("triangular", 0.5), normal(3, 5, seed=1)
    expected = flow.inv(y.clone())
    y[1, 2] = float("nan")
    x = flow.inv(y)
    assert x[1].isnan().any()
    torch.testing.assert_close(x[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", [float("inf"), float("nan")])
def test_an_inverse_without_a_solution_raises(noise: float) -> None:
    flow = build("householder", 0.5)
    with torch.no_grad():
        flow.units.constant[0] += noise
    with pytest.raises(ConvergenceError, match=r"\d+ of 15 equations of a Sylvester flow"):
        flow.inv(normal(3, 5, seed=1))


@pytest.mark.parametrize("num_units", [0, 6])
def test_an_impossible_number_of_units_is_refused(num_units: int) -> None:
    message = f"num_units must be between 1 and input_dim 5, got {num_units}"
    for make in (Sylvester, lambda D, num_units: pf.flow("sylvester", D, num_units=num_units)):
        with pytest.raises(ValueError, match=message):
            make(5, num_units=num_units)


def test_options_of_the_architecture_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one of householder, orthogonal, triangular, got 'qr'"):
        pf.flow("sylvester", 5, parametrization="qr")
    with pytest.raises(ValueError, match=r"num_units must be input_dim 5 for triangular.* got 3"):
        pf.flow("sylvester", 5, parametrization="triangular", num_units=3)


@pytest.mark.parametrize("count_transforms", [0, 6])
def test_an_impossible_number_of_reflections_is_refused(count_transforms: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and input_dim 5, got {count_transforms}"):
        sylvester(5, count_transforms=count_transforms)


# The architecture


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize(("input_dim", "num_units"), [(1, 1), (3, None), (20, None), (20, 2)])
def test_every_parametrization_keeps_the_promises(
    parametrization: str, input_dim: int, num_units: int | None
) -> None:
    if parametrization == "triangular":
        num_units = None
    options = {"parametrization": parametrization, "num_units": num_units, "num_layers": 2}
    flow = pf.flow("sylvester", input_dim, **options).double()
    x = 3 * normal(20, input_dim, seed=1).requires_grad_()
    assert (flow(x) - x).abs().max() < 0.1
    perturb(flow, 0.2)
    y, log_det = flow.forward_and_log_det(x)
    derivative = jacobian(y, x)
    assert (derivative.abs().amax(0) > 1e-8).all()
    expected = torch.linalg.slogdet(derivative).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-9)
    back, _ = flow.inverse_and_log_det(y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)


def test_units_are_as_many_as_entries_but_not_too_many() -> None:
    assert [pf.flow("sylvester", D)[0].num_units for D in (1, 5, 16, 40)] == [1, 5, 16, 16]
    assert pf.flow("sylvester", 40, parametrization="triangular")[0].num_units == 40
