"""Block autoregression: its formula, its masks, and what it maps onto."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.nn import BlockLinear
from pyroflows.transforms import BlockAutoregressive
from pyroflows.transforms.solve import ConvergenceError
from tests.batteries import jacobian, normal, perturb

FACTORS = [(1,), (8,), (3, 5), (4, 4, 4)]
DTYPES = [torch.float32, torch.float64]


def build(
    input_dim: int = 4,
    context_dim: int = 0,
    factors: tuple[int, ...] = (3, 5),
    order: list[int] | None = None,
    noise: float = 0.5,
) -> BlockAutoregressive:
    torch.manual_seed(0)
    flow = BlockAutoregressive(input_dim, context_dim, factors, order, hidden_dims=(8,))
    return perturb(flow.double(), noise)


def by_formula(flow: BlockAutoregressive, x: Tensor) -> Tensor:
    """Apply the definition to one vector, entry by entry and block by block."""
    D, layers = len(x), [*flow.hidden, flow.output]
    sizes = [layer.out_size for layer in layers]
    *biases, log_scale = flow.biases().split([D * size for size in (*sizes, 1)])
    units = [x[entry].reshape(1) for entry in flow.order]
    for layer, bias, size in zip(layers, biases, sizes):
        if layer is not layers[0]:
            units = [torch.tanh(u) for u in units]
        rows = [row.split(layer.in_size, dim=1) for row in layer.weight.split(size)]
        units = [
            sum(rows[d][e] @ units[e] for e in range(d))
            + rows[d][d].exp() @ units[d]
            + bias.split(size)[d]
            for d in range(D)
        ]
    y = torch.empty_like(x)
    for rank, entry in enumerate(flow.order):
        y[entry] = log_scale[rank].exp() * x[entry] + units[rank].squeeze()
    return y


@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_is_its_formula(factors: tuple[int, ...]) -> None:
    flow, x = build(factors=factors, order=[2, 0, 3, 1]), normal(5, 4, seed=1)
    expected = torch.stack([by_formula(flow, vector) for vector in x])
    torch.testing.assert_close(flow(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
@pytest.mark.parametrize("turned", [False, True], ids=["forward", "inverse"])
def test_each_entry_depends_on_those_before_it(order: list[int] | None, turned: bool) -> None:
    flow = build(order=order)
    flow = flow.inv if turned else flow
    x = normal(20, 4, seed=1).requires_grad_()
    depends = jacobian(flow(x), x).abs().amax(0) > 0
    order = order or [0, 1, 2, 3]
    assert torch.equal(depends[order][:, order], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize("factors", FACTORS, ids=str)
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_every_entry_increases_and_the_log_det_is_exact(
    factors: tuple[int, ...], direction: str
) -> None:
    flow, x = build(5, factors=factors), normal(50, 5, seed=1).mul(3).requires_grad_()
    y, log_det = getattr(flow, direction)(x)
    full = jacobian(y, x)
    assert (full.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(full).logabsdet, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_maps_onto_all_vectors(size: float) -> None:
    """A network of bounded units alone would reach a box only."""
    flow, y = build(noise=1.0), size * normal(50, 4, seed=1)
    x, log_det = flow.inverse_and_log_det(y)
    again, forward = flow.forward_and_log_det(x)
    torch.testing.assert_close(again, y, rtol=1e-12, atol=1e-8)
    torch.testing.assert_close(log_det, -forward, rtol=0, atol=1e-9)


def test_is_linear_where_all_units_are_saturated() -> None:
    flow = build()
    log_scale = flow.biases()[-4:]
    _, log_det = flow.forward_and_log_det(1e4 * torch.ones(4).double())
    torch.testing.assert_close(log_det, log_scale.sum(), rtol=0, atol=1e-12)


def test_steep_weights_invert_too() -> None:
    """Steps as steep as e^10 are where Newton's method without a bracket runs away."""
    flow = build(2)
    with torch.no_grad():
        flow.hidden[0].weight.add_(10 * torch.eye(2).repeat_interleave(3, 0))
        flow.output.weight.add_(3.0)
    x = normal(200, 2, seed=1)
    y = flow(x)
    again = flow(flow.inv(y.clone()))
    torch.testing.assert_close(again, y, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_inverse_are_the_inverse_jacobian(dtype: torch.dtype) -> None:
    """One entry, where the derivative of the inverse with respect to all is known by hand."""
    flow = build(1, noise=0.3).to(dtype)
    x = normal(20, 1, seed=1).to(dtype).requires_grad_()
    y = flow(x)
    slope = torch.autograd.grad(y.sum(), x)[0]
    (by_bias,) = torch.autograd.grad(flow(x.detach()).sum(), flow.biases.constant)
    image = y.detach().requires_grad_()
    back, _ = flow.inverse_and_log_det(image)
    gradient, inverse_by_bias = torch.autograd.grad(
        (back * slope).sum(), (image, flow.biases.constant)
    )
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(gradient, torch.ones_like(y), rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse_by_bias, -by_bias, rtol=tolerance, atol=20 * tolerance)


def test_every_entry_depends_on_the_context() -> None:
    flow, context = build(4, 3), normal(20, 3, seed=2).requires_grad_()
    y, log_det = flow.forward_and_log_det(torch.zeros(20, 4).double(), context)
    assert (jacobian(y, context).abs().amax(0) > 0).all()
    assert torch.autograd.grad(log_det.sum(), context)[0].any()


def test_positive_blocks_are_exponentials_and_the_others_lie_below() -> None:
    layer = BlockLinear(groups=3, in_size=2, out_size=4)
    own, earlier = layer.blocks()
    assert own.shape == (3, 4, 2)
    for group in range(3):
        rows, columns = slice(4 * group, 4 * group + 4), slice(2 * group, 2 * group + 2)
        torch.testing.assert_close(own[group], layer.weight[rows, columns].exp())
        assert not earlier[rows, columns.start :].any()
        assert torch.equal(earlier[rows, : columns.start], layer.weight[rows, : columns.start])
        later = layer.seen_by_later(earlier, group)
        assert torch.equal(later, layer.weight[rows.stop :, columns])


def test_learns_two_modes() -> None:
    """The KL divergence of a mixture of two normals from the flow, by quadrature, in nats."""
    torch.manual_seed(0)
    flow = BlockAutoregressive(1, hidden_factors=(8,))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    x = torch.linspace(-6, 6, 401).unsqueeze(-1)
    modes = torch.logaddexp(*(dist.Normal(m, 0.5).log_prob(x.squeeze(-1)) for m in (-2.0, 2.0)))
    truth = modes - math.log(2)
    weight = truth.exp() * 12 / 400
    for _ in range(300):
        z, log_det = flow.forward_and_log_det(x)
        divergence = (
            weight * (truth - dist.Normal(0.0, 1.0).log_prob(z.squeeze(-1)) - log_det)
        ).sum()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
    assert divergence < 0.02


@pytest.mark.parametrize("hidden_factors", [(), (8, 0), (-1,)], ids=str)
def test_hidden_layers_of_no_size_are_refused(hidden_factors: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"hidden_factors must hold at least one .*got \("):
        BlockAutoregressive(4, hidden_factors=hidden_factors)


def test_an_order_that_is_no_permutation_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"order must be a permutation of 0 \.\. 2, got \[0, 0, 1\]"
    ):
        BlockAutoregressive(3, order=[0, 0, 1])


def test_weights_that_are_not_finite_are_no_silent_answer() -> None:
    flow = build()
    with torch.no_grad():
        flow.hidden[0].weight[0, 0] = math.inf
    with pytest.raises(ConvergenceError, match="equations are not solved"):
        flow.inverse_and_log_det(normal(5, 4, seed=1))
