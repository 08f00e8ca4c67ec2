"""The fields of single parameters, from which flow matching starts."""

import math
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroflows.nn.entrywise import EntrywiseNetwork
from pyroflows.sbi import FlowMatching
from pyroflows.sbi.densities import marginals as marginals_module
from pyroflows.sbi.densities.marginals import SETTINGS, Marginals

DTYPES = [torch.float64, torch.float32]


def perturbed(dim: int, dtype: torch.dtype) -> EntrywiseNetwork:
    network = EntrywiseNetwork(dim).to(dtype)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("dim", [1, 3])
def test_divergence_is_the_trace_of_the_jacobian(
    dtype: torch.dtype, batch_shape: tuple[int, ...], dim: int
) -> None:
    torch.manual_seed(0)
    network = perturbed(dim, dtype)
    x, context = torch.randn(*batch_shape, dim, dtype=dtype), torch.randn(dim, dtype=dtype)
    time = torch.rand(batch_shape, dtype=dtype)
    divergence = network.divergence(x, time, context)
    assert divergence.shape == batch_shape
    for i, row in enumerate(x.reshape(-1, dim)):
        moment = time.reshape(-1)[i]
        jacobian = torch.func.jacrev(network)(row, moment, context)
        assert torch.equal(jacobian, jacobian.diagonal().diag())  # entries do not mix
        tolerance = 1e-4 if dtype == torch.float32 else 1e-10
        assert torch.isclose(
            divergence.reshape(-1)[i], jacobian.trace(), rtol=tolerance, atol=tolerance
        )


def test_time_and_context_broadcast_to_the_batch() -> None:
    torch.manual_seed(0)
    network = perturbed(3, torch.float64)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    time, context = torch.rand(5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = network(x, time.expand(4, 5), context.expand(4, 5, 3))
    torch.testing.assert_close(network(x, time, context), expected)


def test_gradients_reach_every_parameter() -> None:
    torch.manual_seed(0)
    network = perturbed(2, torch.float64)
    x, context = torch.randn(2, 7, 2, dtype=torch.float64)
    network(x, torch.rand(7, dtype=torch.float64), context).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_network_runs_where_its_weights_are() -> None:
    network = EntrywiseNetwork(3).to("meta")
    x = torch.empty(7, 3, device="meta")
    assert network(x, torch.empty(7, device="meta"), x).device.type == "meta"


def test_network_starts_at_zero_and_goes_back_to_it() -> None:
    x, time = torch.randn(7, 3), torch.rand(7)
    assert bool((EntrywiseNetwork(3)(x, time, x) == 0).all())
    network = perturbed(3, torch.float32)
    network.clear()
    assert bool((network(x, time, x) == 0).all())


def test_what_does_no_better_on_rows_held_out_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps far too large ruin the fields of a standard normal ``w``, which start exact."""
    monkeypatch.setattr(marginals_module, "SETTINGS", replace(SETTINGS, learning_rate=1.0))
    torch.manual_seed(0)
    marginals = Marginals(2)
    marginals.fit(torch.randn(500, 2), torch.randn(500, 2), num_steps=60)
    assert marginals.network.input.weight.abs().max() > 1  # it has been trained
    assert bool((marginals.network.output.weight == 0).all())
    assert bool((marginals.network.output.bias == 0).all())


def test_few_rows_are_not_learned_from() -> None:
    marginals = Marginals(2)
    marginals.fit(torch.rand(50, 2), torch.randn(50, 2), num_steps=100)
    assert bool((marginals.network.output.weight == 0).all())


SLOPE, NOISE = 1.3, 0.5
NOISE_OF_DATA = 0.3


def bounded_pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw what is left of uniform variables, as normal ones, after a regression on noisy data."""
    z = torch.randn(number, 2)
    x = 2 * dist.Normal(0.0, 1.0).cdf(z) - 1 + NOISE_OF_DATA * torch.randn(number, 2)
    return (z - SLOPE * x) / NOISE, SLOPE * x / NOISE


def exact_velocity(
    time: torch.Tensor, between: torch.Tensor, prediction: torch.Tensor
) -> torch.Tensor:
    """Return the mean of ``w - noise`` given a point between them, by quadrature over ``w``."""
    grid = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    w = grid / NOISE - prediction.unsqueeze(-1)
    noise = (between.unsqueeze(-1) - time.unsqueeze(-1) * w) / (1 - time.unsqueeze(-1))
    x = prediction.unsqueeze(-1) * NOISE / SLOPE
    seen = 2 * dist.Normal(0.0, 1.0).cdf(grid) - 1
    log_density = -0.5 * (grid.square() + ((x - seen) / NOISE_OF_DATA).square() + noise.square())
    return (log_density.softmax(-1) * (w - noise)).sum(-1)


def test_fields_of_bounded_parameters_are_learned() -> None:
    torch.manual_seed(0)
    w, prediction = bounded_pairs(20_000)
    start, marginals = Marginals(2), Marginals(2)
    marginals.fit(w, prediction, num_steps=600)
    w, prediction = (part.double()[:2000] for part in bounded_pairs(2000))
    time = 0.9 * torch.rand(2000, 1, dtype=torch.float64)
    between = torch.lerp(torch.randn_like(w), w, time)
    truth = exact_velocity(time, between, prediction)

    def error(fields: Marginals) -> float:
        velocity = fields.double().velocity(time[:, 0], between, prediction)
        return (velocity - truth).square().mean().item()

    assert error(marginals) < 0.25 * error(start)


def bounded() -> None:
    """Draw three parameters of a box, each seen with noise."""
    theta = pyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([3]).to_event(1))
    pyro.sample("x", dist.Normal(theta, NOISE_OF_DATA).to_event(1))


def test_saved_fields_are_read_back(tmp_path: Path) -> None:
    estimator = FlowMatching(bounded)
    posterior = estimator.fit(num_simulations=500, num_steps=20, augment=False, progress=False)
    marginals = posterior.density.marginals
    marginals.load_state_dict({k: v + 0.1 for k, v in marginals.state_dict().items()})
    posterior.save(tmp_path / "posterior")
    again = FlowMatching(bounded).load(tmp_path / "posterior")
    x = torch.zeros(3)
    for one, other in zip(
        posterior.sample(10, x=x, seed=1).values(),
        again.sample(10, x=x, seed=1).values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert math.isfinite(again.log_prob({"theta": torch.zeros(3)}, x=x).item())
