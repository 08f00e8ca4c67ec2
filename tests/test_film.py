"""Residual networks that a condition modulates."""

import pytest
import torch
from torch import Tensor

from pyroflows.nn.film import FiLMNetwork


def network(dtype: torch.dtype = torch.float64) -> FiLMNetwork:
    torch.manual_seed(0)
    built = FiLMNetwork(2, 2, context_dim=3, width=16).to(dtype).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return built


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return five draws for each of four contexts, and a time for all of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 4, 2, generator=generator, dtype=dtype)
    return x, torch.tensor(0.3, dtype=dtype), torch.randn(4, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_without_gradients_are_the_same_and_inputs_stay(dtype: torch.dtype) -> None:
    """Without gradients, layers are computed in the memory of those before."""
    net, arguments = network(dtype), inputs(dtype)
    before = [argument.clone() for argument in arguments]
    expected = net(*arguments)
    assert expected.requires_grad
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(net(*arguments), expected.detach())
    for argument, old in zip(arguments, before, strict=True):
        assert torch.equal(argument, old)


def test_derivatives_are_carried_forward_without_gradients() -> None:
    net, (x, time, context) = network(), inputs()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: net(x, time, context), (x,), (direction,))[1]

    expected = along(direction).detach()
    with torch.no_grad():
        torch.testing.assert_close(along(direction), expected)
        several = torch.func.vmap(along)(torch.stack([direction, -direction]))
    torch.testing.assert_close(several, torch.stack([expected, -expected]))


def test_the_divergence_is_the_trace_of_the_jacobian() -> None:
    net, (x, time, context) = network(), inputs()
    one = torch.func.jacrev(lambda point, summary: net(point, time, summary))
    jacobians = torch.stack([torch.func.vmap(one)(row, context) for row in x])
    trace = jacobians.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert trace.abs().min() > 1e-3
    torch.testing.assert_close(net.divergence(x, time, context), trace)


def test_constants_move_with_the_network_and_are_not_saved() -> None:
    net = network().to("meta")
    assert {buffer.device.type for buffer in net.buffers()} == {"meta"}
    assert {"ones", "zeros"}.isdisjoint(net.state_dict())
