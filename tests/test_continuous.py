"""Continuous flows: known solutions, traces, solvers, adjoint gradients, penalties, failures."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.nn import VelocityField
from pyroflows.transforms import ContinuousFlow, cnf, conditional_cnf
from pyroflows.transforms.continuous.solver import ADAPTIVE, FIXED_STEP
from pyroflows.transforms.continuous.trace import by_tangents
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import jacobian, normal, perturb

DIRECTIONS = ("forward_and_log_det", "inverse_and_log_det")
MATRIX = 0.5 * normal(3, 3, seed=1)
Z = 3.89  # exceeded by a standard normal number once in 10 000 draws


class Linear(nn.Module):
    """Move points by a constant matrix, and count the calls."""

    def __init__(self, matrix: Tensor = MATRIX) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())
        self.calls = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.matrix.T


class Wrapped(nn.Module):
    """Hide that a field is a velocity network."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, x: Tensor, *context: Tensor) -> Tensor:
        return self.field(t, x, *context)


class Function(nn.Module):
    """Move points by a function of time and place."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def small(context_dim: int = 0, **options: Any) -> ContinuousFlow:
    """Build a flow of four entries, away from its start."""
    torch.manual_seed(0)
    return perturb(conditional_cnf(4, context_dim, (8, 8), **options).double(), 0.5)


# Known solutions


def of_linear_field(**options: Any) -> ContinuousFlow:
    return ContinuousFlow(Linear(), 3, **options)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        ("dopri5", 1e-8),
        ("dopri8", 1e-8),
        ("bosh3", 1e-5),
        ("adaptive_heun", 1e-4),
        ("fehlberg2", 1e-3),
        ("rk4", 1e-7),
        ("heun3", 1e-5),
        ("midpoint", 1e-3),
        ("explicit_adams", 1e-4),
        ("implicit_adams", 1e-4),
        ("euler", 2e-1),
    ],
)
def test_a_linear_field_gives_the_matrix_exponential(solver: str, tolerance: float) -> None:
    loose = (
        {"rtol": 1e-6, "atol": 1e-6} if solver in ("bosh3", "adaptive_heun", "fehlberg2") else {}
    )
    steps = {"num_steps": 50} if solver in FIXED_STEP else {}
    flow, x = of_linear_field(solver=solver, **loose, **steps), normal(20, 3, seed=2)
    for direction, sign in zip(DIRECTIONS, (1, -1)):
        y, log_det = getattr(flow, direction)(x)
        expected = x @ torch.linalg.matrix_exp(sign * MATRIX).T
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
        trace = sign * MATRIX.trace().expand(20)
        torch.testing.assert_close(log_det, trace, rtol=0, atol=1e-9)


def test_every_solver_is_tested_and_known_to_torchdiffeq() -> None:
    for solver in (*ADAPTIVE, *FIXED_STEP):
        y, _ = of_linear_field(solver=solver, rtol=1e-3).forward_and_log_det(normal(2, 3, seed=2))
        assert y.isfinite().all()


def test_the_steps_of_euler_are_the_compound_interest() -> None:
    flow = ContinuousFlow(Function(lambda t, x: x), 2, solver="euler", num_steps=7)
    y, log_det = flow.forward_and_log_det(torch.ones(2).double())
    torch.testing.assert_close(y, torch.full((2,), (1 + 1 / 7) ** 7).double())
    assert log_det.item() == pytest.approx(2.0)
    assert flow.num_evaluations == 7


def test_time_runs_from_zero_to_one_and_back() -> None:
    flow = ContinuousFlow(Function(lambda t, x: t**2 * x), 2)
    for direction, sign in zip(DIRECTIONS, (1, -1)):
        y, log_det = getattr(flow, direction)(torch.ones(5, 2).double())
        torch.testing.assert_close(y, torch.full((5, 2), math.exp(sign / 3)).double())
        torch.testing.assert_close(log_det, torch.full((5,), sign * 2 / 3).double())


def test_the_inverse_is_the_flow_of_the_reversed_field() -> None:
    flow, x = small(), normal(20, 4, seed=2)
    field = flow.field
    reversed_flow = ContinuousFlow(Function(lambda t, x: -field(1 - t, x)), 4)
    answers = reversed_flow.forward_and_log_det(x), flow.inverse_and_log_det(x)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-8)


@pytest.mark.parametrize("context_batch", [(), (6,), (2, 6), (2, 1)])
def test_a_field_of_ones_own_takes_the_context(context_batch: tuple[int, ...]) -> None:
    flow = ContinuousFlow(Function(lambda t, x, c: c - x), 2, context_dim=2)
    x, c = normal(2, 6, 2, seed=1), normal(*context_batch, 2, seed=2)
    y, log_det = flow.condition(c).forward_and_log_det(x)
    torch.testing.assert_close(y, c + (x - c) * math.exp(-1), rtol=0, atol=1e-8)
    torch.testing.assert_close(log_det, torch.full((2, 6), -2.0).double())


# Traces


@pytest.mark.parametrize("hidden_dims", [(7,), (7, 9)], ids=str)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus, nn.SiLU])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_divergence_is_the_trace_of_the_jacobian(
    hidden_dims: tuple[int, ...], activation: type[nn.Module], context_dim: int
) -> None:
    field = VelocityField(4, hidden_dims, context_dim, activation).double()
    perturb(field, 1.0)
    context = (normal(10, 2, seed=3),) if context_dim else ()
    t, x = torch.tensor(0.3).double(), normal(10, 4, seed=1).requires_grad_()
    closed_form = field.with_divergence(*context)
    assert closed_form is not None
    v, divergence = closed_form(t, x)
    torch.testing.assert_close(v, field(t, x, *context))
    expected = jacobian(v, x).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-12)
    by_probes = by_tangents(lambda t, x: field(t, x, *context))(t, x)
    torch.testing.assert_close(by_probes, (v, divergence), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("hidden_dims", "activation"), [((6, 6, 6), nn.Tanh), ((6, 6), nn.ELU), ((6,), nn.GELU)]
)
def test_other_networks_have_an_exact_log_det_too(
    hidden_dims: tuple[int, ...], activation: type[nn.Module]
) -> None:
    flow = perturb(cnf(3, hidden_dims, activation=activation).double(), 0.3)
    assert flow.field.with_divergence() is None
    x = normal(5, 3, seed=1).requires_grad_()
    y, log_det = flow.forward_and_log_det(x)
    expected = torch.linalg.slogdet(jacobian(y, x)).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-6)


def test_closed_form_and_tangents_have_the_same_gradients() -> None:
    flow = small(context_dim=2)
    other = ContinuousFlow(Wrapped(flow.field), 4, 2)
    gradients = []
    for f in (flow, other):
        x, c = normal(6, 4, seed=1).requires_grad_(), normal(6, 2, seed=2).requires_grad_()
        y, log_det = f.inverse_and_log_det(x, c)
        loss = y.square().sum() + log_det.square().sum()
        gradients.append(torch.autograd.grad(loss, (x, c, *flow.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_hutchinson_log_det_is_unbiased(noise: str, direction: str) -> None:
    """A z-test on 10 000 draws; a right estimate fails it once in 10 000 seeds."""
    exact, x = small(), normal(4, seed=1)
    flow = small(trace="hutchinson", noise=noise)
    with torch.no_grad():
        y, estimates = getattr(flow, direction)(x.expand(10_000, 4))
        expected_y, expected = getattr(exact, direction)(x)
    torch.testing.assert_close(y, expected_y.expand_as(y), rtol=0, atol=1e-8)
    error = estimates.mean() - expected
    assert estimates.std() > 0.01
    assert abs(error) < Z * estimates.std() / 100


def test_the_probe_is_frozen_along_a_path() -> None:
    """A new probe at each evaluation would make the rates jagged and the steps tiny."""
    flow, x = small(trace="hutchinson"), normal(20, 4, seed=1)
    exact = small()
    for direction in DIRECTIONS:
        getattr(flow, direction)(x), getattr(exact, direction)(x)
        assert flow.num_evaluations <= 2 * exact.num_evaluations


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hutchinson_trace_needs_no_gradients(mode: Any) -> None:
    with mode():
        _, log_det = small(trace="hutchinson").forward_and_log_det(normal(5, 4, seed=1))
    assert log_det.isfinite().all()
    assert not log_det.requires_grad


# Solvers


def test_evaluations_are_counted_in_each_direction() -> None:
    field = Linear()
    flow = ContinuousFlow(field, 3, trace="hutchinson")
    for direction in DIRECTIONS:
        for scale, at_least in ((1.0, 7), (10.0, 50)):
            field.matrix.data = scale * MATRIX
            field.calls = 0
            getattr(flow, direction)(normal(5, 3, seed=1))
            assert flow.num_evaluations == field.calls >= at_least


def test_a_crowd_of_easy_vectors_does_not_loosen_the_tolerance_of_a_hard_one() -> None:
    flow = ContinuousFlow(Function(lambda t, x: (3 * x).sin()), 2)
    hard = torch.tensor([2.0, -2.5]).double()
    y, log_det = flow.forward_and_log_det(hard)
    alone = flow.num_evaluations
    crowd = torch.cat([torch.zeros(1000, 2).double(), hard.unsqueeze(0)])
    among_others, log_dets = flow.forward_and_log_det(crowd)
    assert flow.num_evaluations >= alone
    torch.testing.assert_close(among_others[-1], y, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_dets[-1], log_det, rtol=0, atol=1e-8)


def test_tighter_tolerances_give_smaller_errors() -> None:
    x = normal(20, 4, seed=1)
    truth, _ = small(solver="dopri8", rtol=1e-13, atol=1e-13).forward_and_log_det(x)
    errors = []
    for tolerance in (1e-3, 1e-6, 1e-9):
        y, _ = small(rtol=tolerance, atol=tolerance).forward_and_log_det(x)
        errors.append((y - truth).abs().max().item())
        assert errors[-1] < 100 * tolerance
    assert errors == sorted(errors, reverse=True)


def test_rounding_errors_in_float32_are_those_of_the_numbers_themselves() -> None:
    """Entries up to 12 have neighbours at a distance of 1e-6."""
    flow, x = cnf(16), 3 * torch.randn(500, 16)
    y, _ = flow.forward_and_log_det(x)
    back, _ = flow.inverse_and_log_det(y)
    assert (back - x).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_runs_in_half_precision(dtype: torch.dtype) -> None:
    flow, x = cnf(4).to(dtype), normal(20, 4, seed=1).to(dtype)
    for direction in DIRECTIONS:
        y, log_det = getattr(flow, direction)(x)
        assert y.dtype == log_det.dtype == dtype
        assert (y - x).abs().max() < 0.1


# Adjoint gradients


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("context_batch", [(6,), ()])
def test_adjoint_gradients_are_those_of_back_propagation(
    trace: str, solver: str, direction: str, context_batch: tuple[int, ...]
) -> None:
    gradients = []
    steps = {"num_steps": 60} if solver == "rk4" else {}
    for adjoint in (False, True):
        flow = small(context_dim=2, trace=trace, solver=solver, adjoint=adjoint, **steps)
        x = normal(6, 4, seed=1).requires_grad_()
        c = normal(*context_batch, 2, seed=2).requires_grad_()
        y, log_det = getattr(flow, direction)(x, c)
        loss = (y * normal(6, 4, seed=3)).sum() + (log_det * normal(6, seed=4)).sum()
        gradients.append(torch.autograd.grad(loss, (x, c, *flow.parameters())))
    assert all(gradient.any() for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_the_adjoint_keeps_no_graph_of_the_steps() -> None:
    """What back-propagation keeps grows with the number of steps."""

    def kept(**options: Any) -> int:
        sizes = []
        flow = small(**options, solver="rk4")
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            flow.forward_and_log_det(normal(50, 4, seed=1))
        return sum(sizes)

    assert kept(num_steps=40) > 5 * kept(num_steps=4)
    assert kept(num_steps=40, adjoint=True) == kept(num_steps=4, adjoint=True)


# Penalties


def test_penalties_of_a_uniform_expansion_are_known() -> None:
    r"""For :math:`v = a x`: :math:`\int |a x e^{at}|^2 dt`, and ``a^2 D`` whatever the signs."""
    a, x = 0.7, normal(5, 3, seed=1)
    for trace in ("exact", "hutchinson"):
        flow = ContinuousFlow(Linear(a * torch.eye(3).double()), 3, trace=trace)
        y, log_det, penalties = flow.forward_and_regularization(x)
        kinetic = a / 2 * (math.exp(2 * a) - 1) * x.square().sum(-1)
        torch.testing.assert_close(y, x * math.exp(a), rtol=0, atol=1e-8)
        torch.testing.assert_close(log_det, torch.full((5,), 3 * a).double())
        torch.testing.assert_close(penalties.kinetic, kinetic, rtol=1e-6, atol=0)
        torch.testing.assert_close(penalties.jacobian, torch.full((5,), 3 * a**2).double())
        back, log_det_back, penalties_back = flow.inverse_and_regularization(y)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-8)
        torch.testing.assert_close(log_det_back, -log_det)
        torch.testing.assert_close(penalties_back, penalties, rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_the_jacobian_penalty_is_unbiased(noise: str) -> None:
    """A z-test on 10 000 draws; a right estimate fails it once in 10 000 seeds."""
    flow = of_linear_field(noise=noise)
    _, _, penalties = flow.forward_and_regularization(normal(3, seed=1).expand(10_000, 3))
    error = penalties.jacobian.mean() - MATRIX.square().sum()
    assert abs(error) < Z * penalties.jacobian.std() / 100


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_solution_is_the_same_with_and_without_penalties(trace: str) -> None:
    flow, x, c = small(2, trace=trace), normal(5, 2, 4, seed=1), normal(2, 2, seed=2)
    methods = ("forward_and_regularization", "inverse_and_regularization")
    for direction, with_penalties in zip(DIRECTIONS, methods):
        torch.manual_seed(1)
        expected = getattr(flow, direction)(x, c)
        torch.manual_seed(1)
        *answer, penalties = getattr(flow, with_penalties)(x, c)
        torch.testing.assert_close(tuple(answer), expected, rtol=0, atol=1e-12)
        assert all(penalty.shape == (5, 2) for penalty in penalties)
        assert all((penalty > 0).all() for penalty in penalties)


def test_penalties_can_be_minimised() -> None:
    flow, x = small(), normal(20, 4, seed=1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.04)
    totals = []
    for _ in range(12):
        *_, penalties = flow.inverse_and_regularization(x)
        totals.append(sum(penalty.mean() for penalty in penalties))
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < totals[0] / 2
    assert flow.num_evaluations <= 150


def test_penalties_check_their_inputs() -> None:
    for method in ("forward_and_regularization", "inverse_and_regularization"):
        with pytest.raises(
            ValueError, match=r"trailing shape \(4,\), got an input of shape \(3,\)"
        ):
            getattr(small(), method)(torch.zeros(3))
        with pytest.raises(ValueError, match="needs a context of size 2, got none"):
            getattr(small(2), method)(torch.zeros(4))


# Failures


def test_a_solution_that_leaves_for_infinity_is_an_error() -> None:
    """From 2, the solution of x' = x^2 is infinite at t = 1/2."""
    flow = ContinuousFlow(Function(lambda t, x: x * x), 1)
    message = r"'dopri5' failed at t = 0\.49\d+ after \d+ evaluations.*[Rr]aise rtol and atol"
    with pytest.raises(ConvergenceError, match=message):
        flow.forward_and_log_det(torch.full((1,), 2.0).double())


@pytest.mark.parametrize("options", [{}, {"solver": "dopri8"}, {"solver": "rk4"}], ids=str)
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_numbers_that_are_not_finite_are_an_error(options: dict[str, str], trace: str) -> None:
    for bad in (math.nan, math.inf):
        flow, x = small(trace=trace, **options), normal(5, 4, seed=1)
        spoilt = x.clone()
        spoilt[2, 1] = bad
        for direction in DIRECTIONS:
            with pytest.raises(ConvergenceError, match="finite"):
                getattr(flow, direction)(spoilt)
        with torch.no_grad():
            flow.field.output.bias[1] = bad
        for direction in DIRECTIONS:
            with pytest.raises(ConvergenceError, match="finite"):
                getattr(flow, direction)(x)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_a_limit_of_evaluations_is_kept(solver: str) -> None:
    flow = small(solver=solver, max_evaluations=12)
    with pytest.raises(
        ConvergenceError, match=r"after 12 evaluations.*max_evaluations=12 are used up"
    ):
        flow.forward_and_log_det(normal(5, 4, seed=1))
    small(solver=solver, max_evaluations=1000).forward_and_log_det(normal(5, 4, seed=1))


def test_an_adjoint_solve_that_fails_is_an_error() -> None:
    flow = small(adjoint=True)
    y, _ = flow.forward_and_log_det(normal(5, 4, seed=1))
    flow.field.hidden[0].bias.data = torch.full((8,), math.nan).double()
    with pytest.raises(ConvergenceError, match="failed at t = "):
        y.sum().backward()


def test_tracing_is_refused() -> None:
    flow = small()
    for direction in DIRECTIONS:
        with pytest.raises(RuntimeError, match=r"cannot be traced.*Trace_ELBO"):
            torch.jit.trace(lambda x, d=direction: getattr(flow, d)(x), normal(5, 4, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "dopri6"}, "solver must be one of .*dopri5.*rk4, got 'dopri6'"),
        ({"solver": "scipy_solver"}, "got 'scipy_solver'"),
        ({"trace": "exakt"}, "trace must be 'exact' or 'hutchinson', got 'exakt'"),
        ({"noise": "uniform"}, "noise must be 'rademacher' or 'gaussian', got 'uniform'"),
        ({"rtol": 0.0}, "rtol must be positive, got 0.0"),
        ({"atol": -1.0}, "atol must be positive, got -1.0"),
        ({"solver": "rk4", "num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 5}, "'dopri5' chooses its steps.*got num_steps=5"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1, got 0"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.flow("cnf", 3, **options)


# Guides


def test_the_guide_learns_from_vectorised_particles() -> None:
    """The target is normalised: the loss is the divergence, whose optimum is zero."""
    factor = torch.tensor([[2.0, 0.0], [1.5, 0.5]])

    def model() -> None:
        pyro.sample("x", dist.MultivariateNormal(torch.tensor([1.0, -1.0]), scale_tril=factor))

    guide = pf.AutoCNF(model, hidden_dims=(16, 16))
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    losses = [svi.step() for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.3 < sum(losses[:5]) / 5 - 1
