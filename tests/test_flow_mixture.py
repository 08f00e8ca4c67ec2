"""Mixtures of flows."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.distributions import Flow, FlowMixture, StudentT
from pyroflows.transforms import DiagonalAffine, FlowTransform
from tests.batteries import normal, perturb

LOGITS = torch.tensor([0.0, 1.0, -0.5])


def realnvp(seed: int, input_dim: int = 2, context_dim: int = 0) -> FlowTransform:
    torch.manual_seed(seed)
    return perturb(pf.flow("realnvp", input_dim, context_dim, num_layers=2), 0.2)


def mixture(context_dim: int = 0) -> FlowMixture:
    flows = [Flow(StudentT(2), realnvp(seed, 2, context_dim)) for seed in range(3)]
    return FlowMixture(flows, LOGITS)


def shifted(center: float) -> Flow:
    return Flow(None, DiagonalAffine(torch.full((1,), center), torch.tensor([0.5])))


def test_density_is_the_weighted_sum() -> None:
    m, x = mixture(), 2 * normal(4, 5, 2, seed=1).float()
    weights = LOGITS.softmax(0)
    expected = sum(w * flow.log_prob(x).exp() for w, flow in zip(weights, m.flows))
    torch.testing.assert_close(m.log_prob(x), expected.log())
    assert m.batch_shape == ()
    assert m.event_shape == (2,)


def test_weights_are_equal_by_default() -> None:
    m = FlowMixture([shifted(-1.0), shifted(1.0)])
    assert torch.equal(m.logits, torch.zeros(2))
    assert isinstance(m.logits, torch.nn.Parameter)


def test_draws_come_from_the_flows_by_their_weights() -> None:
    """Fails by chance once in 100 000 runs with fresh seeds: a count within 4.4 deviations."""
    m = FlowMixture([shifted(-10.0), shifted(10.0)], torch.tensor([0.0, math.log(3.0)]))
    draws = m.sample((10_000,)).squeeze(-1)
    assert draws.abs().min() > 5.0
    count = (draws > 0).sum().item()
    assert abs(count - 7500) < 4.4 * math.sqrt(10_000 * 0.75 * 0.25)
    assert draws[draws > 0].std().item() == pytest.approx(0.5, abs=0.05)


def test_every_parameter_gets_a_gradient() -> None:
    m = mixture()
    m.log_prob(normal(50, 2, seed=1).float()).mean().backward()
    names = [name for name, _ in m.named_parameters()]
    assert "logits" in names
    assert len(names) == 1 + sum(len(list(flow.parameters())) for flow in m.flows)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize("batch", [(), (5,), (2, 1)], ids=str)
def test_a_context_gives_the_batch_shape(batch: tuple[int, ...]) -> None:
    m, context = mixture(context_dim=3), normal(*batch, 3, seed=1).float()
    conditioned = m.condition(context)
    assert conditioned.batch_shape == batch
    x = conditioned.sample((4,))
    assert x.shape == (4, *batch, 2)
    expected = torch.stack([flow.condition(context).log_prob(x) for flow in m.flows], -1)
    expected = (expected + LOGITS.log_softmax(0)).logsumexp(-1)
    torch.testing.assert_close(conditioned.log_prob(x), expected)
    assert {id(p) for p in conditioned.parameters()} == {id(p) for p in m.parameters()}
    with torch.no_grad():
        m.logits[0] += 5.0
    assert not torch.allclose(conditioned.log_prob(x), expected)


def test_expands_and_draws_independently() -> None:
    expanded = mixture().expand((2, 5))
    assert expanded.batch_shape == (2, 5)
    x = expanded.sample((3,))
    assert x.shape == (3, 2, 5, 2)
    assert len(x.reshape(-1, 2).unique(dim=0)) == 30
    torch.testing.assert_close(expanded.log_prob(x), mixture().log_prob(x))
    assert expanded.log_prob(torch.zeros(0, 2, 5, 2)).shape == (0, 2, 5)


def test_moves_copies_and_takes_states() -> None:
    m, x = mixture(), normal(7, 2, seed=1)
    before = m.log_prob(x.float())
    other = copy.deepcopy(m)
    perturb(other.module, 0.3)
    torch.testing.assert_close(m.log_prob(x.float()), before)
    other.load_state_dict(m.state_dict())
    torch.testing.assert_close(other.log_prob(x.float()), before)
    assert m.to(torch.float64) is m
    assert m.sample((2,)).dtype == torch.float64
    torch.testing.assert_close(m.log_prob(x).float(), before)


def test_is_a_site_of_a_pyro_model() -> None:
    m, data = mixture(), normal(5, 2, seed=1).float()

    def model(data: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 5):
            return pyro.sample("x", m, obs=data)

    assert model().shape == (5, 2)
    trace = pyro.poutine.trace(model).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), m.log_prob(data).sum())


def test_fit_finds_two_modes_and_their_weights() -> None:
    """Errors are within four standard errors of 2000 draws."""
    torch.manual_seed(0)
    is_right = torch.rand(2000) < 0.7
    data = torch.where(is_right, 4.0, -4.0) + 0.5 * torch.randn(2000)
    data = torch.stack([data, torch.randn(2000)], -1)
    # Nothing but the base tells the two flows apart.
    affine = DiagonalAffine(torch.zeros(2), torch.ones(2))
    centers = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    m = FlowMixture([Flow(dist.Normal(c, 1.0), copy.deepcopy(affine)) for c in centers])
    m.fit(data, num_steps=400, batch_size=256, learning_rate=2e-2, progress=False)
    assert m.logits.softmax(0)[1].item() == pytest.approx(0.7, abs=4 * 0.0103)
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    modes = dist.Normal(torch.tensor([-4.0, 4.0]), 0.5)
    truth = dist.MixtureSameFamily(weights, modes)
    x = torch.linspace(-7, 7, 2001)
    grid = torch.cartesian_prod(x, torch.linspace(-5, 5, 101))
    with torch.no_grad():
        marginal = m.log_prob(grid).exp().view(2001, 101).sum(1) * 0.1
    error = (marginal - truth.log_prob(x).exp()).abs().sum() * 0.007
    assert error < 0.1


def test_bad_mixtures_are_refused() -> None:
    flow = shifted(0.0)
    with pytest.raises(ValueError, match="at least one flow, got none"):
        FlowMixture([])
    with pytest.raises(TypeError, match="must hold flows, got Normal"):
        FlowMixture([flow, dist.Normal(0.0, 1.0)])
    with pytest.raises(ValueError, match="agree in event_shape"):
        FlowMixture([flow, Flow(None, realnvp(0))])
    with pytest.raises(ValueError, match=r"agree in context_dim, got \[0, 3\]"):
        FlowMixture([Flow(None, realnvp(0)), Flow(None, realnvp(0, 2, 3))])
    with pytest.raises(ValueError, match=r"logits must have shape \(2,\).*got \(3,\)"):
        FlowMixture([flow, flow], torch.zeros(3))
    with pytest.raises(NotImplementedError, match="not differentiable in its weights"):
        mixture().rsample((2,))
    with pytest.raises(ValueError, match="support"):
        mixture().log_prob(torch.tensor([math.nan, 0.0]))
