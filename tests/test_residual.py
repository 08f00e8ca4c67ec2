"""Residual flows: contractions, their inverses, and the ways to their log-determinants."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

import pyroflows as pf
from pyroflows.nn import LipschitzMLP
from pyroflows.nn.lipschitz import Linearization, spectral_bound
from pyroflows.transforms import (
    ExactLogDet,
    PowerSeriesLogDet,
    Residual,
    RussianRouletteLogDet,
)
from pyroflows.transforms.residual import AutoLogDet, LogDet
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import CASES, Case, jacobian, normal, perturb

DRAWS = [1000, pytest.param(10_000, marks=pytest.mark.slow)]
CRITICAL_Z = 3.891  # false alarms: 1 in 10 000


def block(input_dim: int = 4, context_dim: int = 0, noise: float = 0.5, **options) -> Residual:
    flow = Residual(input_dim, context_dim, **{"hidden_dims": (16, 16), **options})
    return perturb(flow.double(), noise)


def strong(input_dim: int) -> Residual:
    """Build a block of rotations, whose derivative has a norm close to 0.9 almost everywhere."""
    flow = Residual(input_dim, hidden_dims=(input_dim,)).double()
    with torch.no_grad():
        for seed, layer in enumerate(flow.network.layers):
            layer.weight.copy_(torch.linalg.qr(normal(input_dim, input_dim, seed=seed)).Q)
        flow.network.layers[0].bias.fill_(1.5)  # where swish is steep
    return flow


def derivative(flow: Residual, *batch: int) -> Linearization:
    x = normal(*batch, *flow.event_shape, seed=1)
    return flow.network.bind().linearize(x)[1].detach()


def exact(derivative: Linearization) -> Tensor:
    matrix = derivative.jacobian()
    return torch.linalg.slogdet(torch.eye(matrix.shape[-1]).double() + matrix).logabsdet


# The bound of the largest singular value

MATRICES = {
    "square": normal(64, 64, seed=1),
    "tall": normal(64, 3, seed=2),
    "wide": normal(3, 64, seed=3),
    "equal singular values": torch.linalg.qr(normal(32, 32, seed=4)).Q,
    "rank one": torch.outer(normal(9, seed=5), normal(7, seed=6)),
    "a row": normal(1, 8, seed=7),
    "a number": torch.tensor([[-2.0]]).double(),
    "large": 1e8 * normal(20, 20, seed=8),
    "small": 1e-8 * normal(20, 20, seed=9),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_spectral_bound_is_above_and_tight(matrix: Tensor, dtype: torch.dtype) -> None:
    largest = torch.linalg.matrix_norm(matrix, 2).item()
    bound = spectral_bound(matrix.to(dtype)).item()
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert bound >= largest * (1 - rounding)
    assert bound <= largest * min(matrix.shape) ** (1 / 130) * (1 + rounding)


def test_the_spectral_bound_of_zeros_is_zero() -> None:
    matrix = torch.zeros(3, 2, requires_grad=True)
    bound = spectral_bound(matrix)
    (gradient,) = torch.autograd.grad(bound, matrix)
    assert bound < 1e-15
    assert torch.equal(gradient, torch.zeros(3, 2))


def test_the_spectral_bound_has_the_gradient_of_the_schatten_norm() -> None:
    matrix = normal(5, 3, seed=1).requires_grad_()
    schatten = torch.linalg.svdvals(matrix).pow(130).sum().pow(1 / 130)
    torch.testing.assert_close(spectral_bound(matrix), schatten)
    gradients = [torch.autograd.grad(f, matrix)[0] for f in (spectral_bound(matrix), schatten)]
    torch.testing.assert_close(*gradients)


# The network


def lip_swish(x: Tensor, sharpness: Tensor) -> Tensor:
    return x * torch.sigmoid(sharpness * x) / 1.1


def test_the_network_is_its_formula() -> None:
    network = LipschitzMLP(3, 2, (5, 4), context_dim=2, coefficient=0.729).double()
    perturb(network, 0.7)
    x, context = normal(7, 3, seed=1), normal(7, 2, seed=2)
    expected = x
    sharpness = network.raw_sharpness.exp().add(1).log()
    for i, layer in enumerate(network.layers):
        norm = torch.linalg.svdvals(layer.weight).pow(130).sum().pow(1 / 130)
        assert norm > 0.9  # each layer is one that is scaled down
        expected = expected @ (layer.weight * 0.9 / norm).T + layer.bias
        expected = expected + context @ network.context.weight.T if i == 0 else expected
        expected = lip_swish(expected, sharpness[i]) if i < 2 else expected
    torch.testing.assert_close(network(x, context), expected)


def test_a_network_within_its_constant_is_left_alone() -> None:
    network = LipschitzMLP(3, 3, (8,), coefficient=0.9).double()
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.mul_(0.01)
    x = normal(7, 3, seed=1)
    first, last = network.layers
    hidden = lip_swish(first(x), torch.nn.functional.softplus(network.raw_sharpness))
    torch.testing.assert_close(network(x), last(hidden))


def product_of_norms(network: LipschitzMLP) -> float:
    """Return the Lipschitz constant that the layers guarantee: swish has slopes below 1.1."""
    weights = network.bind().weights
    norms = [torch.linalg.matrix_norm(weight, 2).item() for weight in weights]
    return math.prod(norms) * 1.1 ** (len(weights) - 1)


@pytest.mark.parametrize("noise", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("hidden_dims", [(8,), (64, 64), (5, 90, 7)])
def test_the_constant_holds_at_any_weights(hidden_dims: tuple[int, ...], noise: float) -> None:
    network = perturb(LipschitzMLP(4, 4, hidden_dims, coefficient=0.9), noise)
    assert product_of_norms(network) <= 0.9 * (1 + 1e-5)
    x = (3 * normal(200, 4, seed=1)).float()
    slopes = torch.linalg.matrix_norm(network.bind().linearize(x)[1].jacobian(), 2)
    assert slopes.max() < 0.9


def test_the_constant_holds_while_training_pulls_at_it() -> None:
    flow, x = Residual(2, hidden_dims=(16, 16)), normal(100, 2, seed=1).float()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        y, _ = flow.forward_and_log_det(x)
        (y - 5 * x).square().mean().backward()
        optimizer.step()
        assert product_of_norms(flow.network) <= 0.9 * (1 + 1e-5)
    slopes = torch.linalg.matrix_norm(flow.network.bind().linearize(x)[1].jacobian(), 2)
    assert slopes.max() > 0.5  # the bound is within reach


@pytest.mark.parametrize("hidden_dims", [(8,), (8, 9), (8, 9, 7)])
def test_the_derivative_is_that_of_the_network(hidden_dims: tuple[int, ...]) -> None:
    network = perturb(LipschitzMLP(3, 5, hidden_dims).double(), 0.5)
    x = normal(7, 3, seed=1).requires_grad_()
    value, derivative = network.bind().linearize(x)
    torch.testing.assert_close(value, network(x))
    expected = jacobian(value, x)
    torch.testing.assert_close(derivative.jacobian(), expected)
    columns, rows = normal(7, 2, 3, seed=2), normal(7, 2, 5, seed=3)
    torch.testing.assert_close(derivative.jvp(columns), columns @ expected.mT)
    torch.testing.assert_close(derivative.vjp(rows), rows @ expected)


# The inverse


@pytest.mark.parametrize("coefficient", [0.5, 0.97, 0.999])
@pytest.mark.parametrize("noise", [0.5, 5.0])
def test_inverts_however_strong_the_contraction(coefficient: float, noise: float) -> None:
    flow, x = block(5, noise=noise, coefficient=coefficient), 3 * normal(200, 5, seed=1)
    y, _ = flow.forward_and_log_det(x)
    back, _ = flow.inverse_and_log_det(y)
    assert (back - x).abs().max() <= 1e-8


def folding(input_dim: int, coefficient: float, **options) -> Residual:
    """Build a block whose slope at zero is close to ``1 - coefficient`` along one direction."""
    flow = Residual(input_dim, hidden_dims=(1,), coefficient=coefficient, **options).double()
    first, last = flow.network.layers
    with torch.no_grad():
        first.weight.copy_(torch.ones(1, input_dim))
        last.weight.copy_(-torch.ones(input_dim, 1))
        first.bias.fill_(2.4)  # where swish is steepest
        flow.network.raw_sharpness.fill_(math.log(math.expm1(1.0)))
    return flow


def test_newtons_method_makes_up_for_slow_sweeps() -> None:
    """Sweeps alone gain a factor 0.99 each: 3000 of them would be needed."""
    flow, x = folding(3, 0.99, max_iterations=60), 1e-3 * normal(20, 3, seed=1)
    y, _ = flow.forward_and_log_det(x)
    back, _ = flow.inverse_and_log_det(y)
    assert (back - x).abs().max() <= 1e-8


def test_many_entries_are_inverted_by_sweeps() -> None:
    flow, x = folding(65, 0.9), 1e-3 * normal(20, 65, seed=1)
    y, _ = flow.forward_and_log_det(x)
    back, _ = flow.inverse_and_log_det(y)
    assert (back - x).abs().max() <= 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inverts_to_rounding_where_hidden_values_are_large(dtype: torch.dtype) -> None:
    """Rounding of the hidden values is more than a few units in the last place of the inputs."""
    flow = perturb(pf.flow("residual", 16, num_layers=3, hidden_dims=(32, 32)).to(dtype), 1.0)
    with torch.no_grad():
        for block in flow:
            for layer in block.network.layers:
                layer.bias.add_(30 * normal(*layer.bias.shape, seed=3).to(dtype))
    x = normal(300, 16, seed=1).to(dtype)
    y, _ = flow.forward_and_log_det(x)
    back, _ = flow.inverse_and_log_det(y)
    assert (back - x).abs().max() <= 1000 * torch.finfo(dtype).eps


def test_an_inverse_that_does_not_converge_raises() -> None:
    flow = folding(65, 0.99, max_iterations=50)
    y = torch.cat([torch.full((1, 65), float("inf")).double(), 1e-3 * normal(2, 65, seed=1)])
    message = "2 of 3 vectors are not inverted after 50 iterations: raise max_iterations, lower"
    with pytest.raises(ConvergenceError, match=message):
        flow.inv(y)


@pytest.mark.parametrize("input_dim", [4, 65])
def test_what_is_not_finite_spoils_nothing_else(input_dim: int) -> None:
    flow, y = block(input_dim), normal(3, input_dim, seed=1)
    expected, _ = flow.inverse_and_log_det(y)
    y[0, 1], y[2, 0] = float("nan"), float("inf")
    x, _ = flow.inverse_and_log_det(y)
    assert x[[0, 2]].isnan().all()
    torch.testing.assert_close(x[1], expected[1])


@pytest.mark.parametrize("input_dim", [3, 65])
def test_the_inverse_has_the_gradient_of_the_implicit_function(input_dim: int) -> None:
    """Once with the help of linear systems, once by sweeps alone."""
    flow = folding(input_dim, 0.9)
    y, direction = normal(3, input_dim, seed=1), 1e-6 * normal(3, input_dim, seed=2)
    x, _ = flow.inverse_and_log_det(y.requires_grad_())
    parameters = [y, *flow.parameters()]
    gradients = torch.autograd.grad((x * direction).sum(), parameters)
    leaf = x.detach().requires_grad_()
    image, _ = flow.forward_and_log_det(leaf)
    matrix = jacobian(image, leaf)
    solution = torch.linalg.solve(matrix.mT, direction.unsqueeze(-1)).squeeze(-1)
    expected = torch.autograd.grad((-image * solution).sum(), list(flow.parameters()))
    for gradient, answer in zip(gradients, (solution, *expected), strict=True):
        torch.testing.assert_close(gradient, answer, rtol=1e-8, atol=1e-18)


def test_a_gradient_that_does_not_converge_raises() -> None:
    """At a fixed point the inverse takes no iterations, but its gradient does."""
    flow = folding(65, 0.95, max_iterations=50)
    y = torch.zeros(2, 65).double().requires_grad_()
    with torch.no_grad():
        flow.network.layers[-1].bias.sub_(flow(y[0]))
    x, _ = flow.inverse_and_log_det(y)
    with pytest.raises(ConvergenceError, match=r"2 of 2 vectors .* after 50 iterations"):
        x.sum().backward()


# Log-determinants

EXACT = [case for case in CASES if case.name.startswith("residual")]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_few_entries_have_an_exact_log_det(case: Case, dtype: torch.dtype, noise: float) -> None:
    flow, x = case.bound(dtype, noise), case.inputs(10, dtype=dtype).requires_grad_()
    for direction in ("forward_and_log_det", "inverse_and_log_det"):
        y, log_det = getattr(flow, direction)(x)
        error = log_det - torch.linalg.slogdet(jacobian(y, x)).logabsdet
        assert error.abs().max() <= case.log_det[dtype], direction


def test_many_entries_have_an_exact_log_det_once_trained() -> None:
    flow = perturb(pf.flow("residual", 40, num_layers=2, hidden_dims=(16, 16)).double(), 0.5)
    x = normal(3, 40, seed=1).requires_grad_()
    for direction in ("forward_and_log_det", "inverse_and_log_det"):
        y, log_det = getattr(flow.eval(), direction)(x)
        expected = torch.linalg.slogdet(jacobian(y, x)).logabsdet
        torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-6)


def test_the_power_series_keeps_its_error_bound() -> None:
    matrices = derivative(strong(4), 50)
    c = torch.linalg.matrix_norm(matrices.jacobian(), 2)
    assert c.median() > 0.7
    errors = []
    for n in (1, 2, 5, 20, 100):
        error = (PowerSeriesLogDet(n)(matrices, True) - exact(matrices)).abs()
        assert (error <= 4 * c ** (n + 1) / ((n + 1) * (1 - c)) + 1e-12).all()
        errors.append(error.max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < 1e-2 < errors[0]


def test_the_probes_of_a_power_series_are_frozen() -> None:
    matrices = derivative(strong(4), 5)
    one, same = (PowerSeriesLogDet(10, num_probes=2)(matrices, mode) for mode in (True, False))
    assert torch.equal(one, same)
    assert (one - PowerSeriesLogDet(10)(matrices, True)).abs().min() > 1e-6


def test_many_probes_find_the_trace() -> None:
    matrices = derivative(strong(4), 5)
    expected = PowerSeriesLogDet(10)(matrices, True)
    answers = [PowerSeriesLogDet(10, k)(matrices, True) for k in (100, 20_000)]
    few, many = ((answer - expected).abs().max() for answer in answers)
    assert many < few / 3
    assert many < 0.05


@pytest.mark.parametrize("probes", ["rademacher", "gaussian"])
@pytest.mark.parametrize("draws", DRAWS)
def test_russian_roulette_is_unbiased(probes: str, draws: int) -> None:
    """The value and the gradient along a random direction, one z-test each."""
    derivatives = derivative(strong(3), 1)
    variables = [tensor.requires_grad_() for tensor in (*derivatives.weights, *derivatives.slopes)]
    directions = [normal(*v.shape, seed=seed) for seed, v in enumerate(variables)]

    def value_and_slope(log_det: Tensor) -> tuple[float, float]:
        gradients = torch.autograd.grad(log_det.sum(), variables)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
        return log_det.item(), float(slope)

    estimator = RussianRouletteLogDet(0.2, num_exact_terms=1, probes=probes)
    estimates = [value_and_slope(estimator(derivatives, True)) for _ in range(draws)]
    truth = torch.tensor(value_and_slope(exact(derivatives)))
    error = torch.tensor(estimates) - truth
    z = error.mean(0) / (error.std(0) / draws**0.5)
    assert (z.abs() < CRITICAL_Z).all(), z


def test_russian_roulette_records_one_product_however_long() -> None:
    def recorded(num_exact_terms: int) -> int:
        flow = block(log_det=RussianRouletteLogDet(0.5, num_exact_terms))
        _, log_det = flow.forward_and_log_det(normal(5, 4, seed=1))
        seen, waiting = set(), [log_det.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting.extend(parent for parent, _ in node.next_functions)
        return len(seen)

    assert recorded(1) == recorded(50)


STRATEGIES: dict[str, Callable[[LogDet], bool]] = {
    "exact": lambda log_det: log_det == ExactLogDet(),
    "power_series": lambda log_det: log_det == PowerSeriesLogDet(),
    "russian_roulette": lambda log_det: isinstance(log_det, RussianRouletteLogDet),
    "auto": lambda log_det: isinstance(log_det, AutoLogDet),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_has_a_name(name: str) -> None:
    assert STRATEGIES[name](Residual(3, log_det=name).log_det)
    flow = pf.flow("residual", 3, num_layers=2, log_det=name)
    assert all(STRATEGIES[name](part.log_det) for part in flow)


def test_a_strategy_can_have_options() -> None:
    strategy = PowerSeriesLogDet(num_terms=3)
    flow, x = block(log_det=strategy), normal(5, 4, seed=1)
    _, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(log_det, strategy(derivative(flow, 5), True))


@pytest.mark.parametrize("coefficient", [0.5, 0.9, 0.99])
def test_named_roulette_goes_on_long_enough_for_a_finite_variance(coefficient: float) -> None:
    roulette = Residual(3, coefficient=coefficient, log_det="russian_roulette").log_det
    assert 1 - roulette.stop_probability > coefficient**2


@pytest.mark.parametrize("log_det", ["auto", "russian_roulette"])
def test_the_inverse_estimates_too(log_det: str) -> None:
    flow, y = block(17, log_det=log_det), normal(5, 17, seed=1)
    _, one = flow.inverse_and_log_det(y)
    _, other = flow.inverse_and_log_det(y)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("input_dim", "training", "gradients", "is_exact"),
    [
        (17, True, True, False),
        (17, False, True, True),
        (17, True, False, True),
        (16, True, True, True),
    ],
)
def test_auto_estimates_only_while_many_entries_are_trained(
    input_dim: int, training: bool, gradients: bool, is_exact: bool
) -> None:
    flow, x = block(input_dim).train(training), normal(5, input_dim, seed=1)
    truth = exact(derivative(flow, 5))
    with torch.set_grad_enabled(gradients):
        one, other = (flow.forward_and_log_det(x)[1] for _ in range(2))
    assert torch.allclose(one, truth) == torch.equal(one, other) == is_exact


def test_auto_is_exact_for_frozen_parameters() -> None:
    flow, x = block(17).requires_grad_(False), normal(5, 17, seed=1).requires_grad_()
    _, log_det = flow.forward_and_log_det(x)
    torch.testing.assert_close(log_det, exact(derivative(flow, 5)))


def test_auto_is_exact_in_a_traced_program() -> None:
    flow, x = block(17).requires_grad_(False), normal(5, 17, seed=1)
    traced = torch.jit.trace(
        lambda x: flow.forward_and_log_det(x), normal(5, 17, seed=2), check_trace=False
    )
    torch.testing.assert_close(traced(x)[1], exact(derivative(flow, 5)))


def test_a_traced_program_refuses_russian_roulette() -> None:
    flow, x = block(log_det="russian_roulette").requires_grad_(False), normal(5, 4, seed=1)
    with pytest.raises(RuntimeError, match="trace with log_det='exact' or 'auto'"):
        torch.jit.trace(lambda x: flow.forward_and_log_det(x), x, check_trace=False)


# Guides and densities


def model() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(20), torch.linspace(0.5, 1.5, 20)).to_event(1))


def test_an_estimating_guide_trains_and_is_deterministic_in_evaluation() -> None:
    guide = pf.AutoResidual(model, num_layers=2, hidden_dims=(16,))
    svi = SVI(
        model, guide, Adam({"lr": 0.01}), Trace_ELBO(num_particles=16, vectorize_particles=True)
    )
    losses = [svi.step() for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])
    z = torch.randn(7, 20)
    for mode in (True, False):
        posterior = guide.train(mode).get_posterior()
        one, other = (posterior.log_prob(z.clone()) for _ in range(2))
        assert torch.equal(one, other) != mode


# Errors


@pytest.mark.parametrize("coefficient", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_what_is_no_contraction_is_refused(coefficient: float) -> None:
    message = f"coefficient must be between 0 and 1 for the flow to invert, got {coefficient}"
    for build in (Residual, pf.flows.residual, pf.transforms.residual):
        with pytest.raises(ValueError, match=message):
            build(3, coefficient=coefficient)


def test_an_unknown_log_det_is_refused_with_those_there_are() -> None:
    message = "one of auto, exact, power_series, russian_roulette, got 'hutchinson'"
    with pytest.raises(ValueError, match=message):
        Residual(3, log_det="hutchinson")


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        Residual(3, max_iterations=0)
    with pytest.raises(ValueError, match="num_terms must be at least 1, got 0"):
        PowerSeriesLogDet(0)
    with pytest.raises(ValueError, match="num_probes must be at least 1, got 0"):
        PowerSeriesLogDet(num_probes=0)
    with pytest.raises(ValueError, match="num_exact_terms must be at least 1, got 0"):
        RussianRouletteLogDet(0.5, num_exact_terms=0)
    for probability in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {probability}"):
            RussianRouletteLogDet(probability)
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian', got 'uniform'"):
        RussianRouletteLogDet(0.5, probes="uniform")
    with pytest.raises(ValueError, match="coefficient must be positive, got 0"):
        LipschitzMLP(3, 3, coefficient=0)
