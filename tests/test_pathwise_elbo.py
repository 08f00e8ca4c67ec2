"""Path gradients: the right value, no bias, no variance where the guide is exact, refusals."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
)
from pyro.infer.elbo import ELBO
from torch import Tensor, nn

import pyroflows as pf
from pyroflows.svi.draws import log_prob_and_score
from pyroflows.transforms import Affine, Autoregressive, Chain, Compose, Shift, Spline
from pyroflows.transforms.scalar import ScalarBijection
from pyroflows.transforms.score import is_autoregressive
from tests.models import (
    GUIDES,
    HEIGHTS,
    PRIOR_SD,
    TABLE,
    conjugate,
    conjugate_answer,
    groups,
    mixture,
    perturb,
    realnvp,
    with_supports,
)
from tests.reference import Flat

Y = HEIGHTS.double()
BIJECTIONS = (Affine(), Shift(), Spline(bins=4), Chain(Spline(bins=4), Affine()))
GAUSSIAN_GUIDES = {"diagonal": AutoDiagonalNormal, "full rank": AutoMultivariateNormal}


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def subsampled(y: Tensor) -> None:
    """Model half of the data, scaled to stand for all."""
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("item", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def scaled(y: Tensor) -> None:
    """Model one datum drawn at random, scaled by hand."""
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SD))
    with poutine.scale(scale=float(len(y))):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[torch.randint(len(y), ())])


def masked(y: Tensor) -> None:
    """Model the data but for one that is missing."""
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("item", len(y)), poutine.mask(mask=y > 1.5):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


MODELS: dict[str, tuple[Callable, tuple]] = {
    "plate": (conjugate, (Y,)),
    "nested plates": (groups, (TABLE.double(),)),
    "subsampled": (subsampled, (Y,)),
    "scaled": (scaled, (Y,)),
    "masked": (masked, (Y,)),
    "supports": (with_supports("positive", "simplex"), ()),
}
model_cases = pytest.mark.parametrize(("model", "args"), MODELS.values(), ids=MODELS)


def gradient(elbo: ELBO, model: Callable, guide: nn.Module, *args: Any) -> Tensor:
    """Return an estimate of the gradient with respect to all of a guide, as one vector."""
    guide.zero_grad()
    elbo.loss_and_grads(model, guide, *args)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in guide.parameters()]
    return torch.cat([part.flatten() for part in parts]).clone()


def assert_unbiased(estimates: Tensor, exact: Tensor) -> None:
    """Compare means of estimates ``(R, P)`` to the truth.

    Five standard errors are allowed, exceeded once in 1.7 million comparisons of a mean; and the
    estimates must be able to tell: the standard error is below 2 % of the gradient's norm.
    """
    error = estimates.std(0) / len(estimates) ** 0.5
    assert error.max() < 0.02 * exact.norm()
    assert ((estimates.mean(0) - exact).abs() < 5 * error).all()


# The value and its mean gradient


@model_cases
@pytest.mark.parametrize("vectorized", [True, False])
def test_the_value_is_that_of_the_total_gradient(
    model: Callable, args: tuple, vectorized: bool
) -> None:
    guide = realnvp(model)
    guide(*args)
    values = []
    for kind in (Trace_ELBO, pf.PathwiseELBO):
        torch.manual_seed(1)  # the same draws, and the same part of the data
        values.append(
            kind(num_particles=3, vectorize_particles=vectorized).loss(model, guide, *args)
        )
    assert values[1] == pytest.approx(values[0], rel=1e-8)


@pytest.mark.parametrize("build", GUIDES.values(), ids=GUIDES)
def test_differs_from_the_total_gradient_by_the_score_whose_mean_is_zero(build: Callable) -> None:
    model, args = MODELS["nested plates"]
    guide = build(model)
    guide(*args)
    perturb(guide, 0.03)
    gradients = []
    for kind in (Trace_ELBO, pf.PathwiseELBO):
        torch.manual_seed(1)
        gradients.append(gradient(kind(), model, guide, *args))
    torch.manual_seed(1)
    posterior = guide.get_posterior()
    score = torch.autograd.grad(
        posterior.log_prob(posterior.sample().clone()), list(guide.parameters()), allow_unused=True
    )
    flat = [(torch.zeros_like(p) if s is None else s) for p, s in zip(guide.parameters(), score)]
    expected = torch.cat([part.flatten() for part in flat])
    assert expected.norm() > 0.1
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=1e-4, atol=1e-5)


def conjugate_loss(loc: Tensor, sd: Tensor) -> Tensor:
    """Return the negative ELBO of a normal guide of the conjugate model, up to a constant."""
    prior = (loc.square() + sd.square()) / (2 * PRIOR_SD**2)
    likelihood = ((Y - loc).square() + sd.square()).sum() / 2
    return (prior + likelihood - sd.log()).sum()


@pytest.mark.parametrize("model", [conjugate, subsampled, scaled])
def test_the_mean_gradient_is_the_closed_form_of_all_data(model: Callable) -> None:
    guide = AutoDiagonalNormal(model, init_scale=0.5)
    guide(Y)
    elbo = pf.PathwiseELBO(num_particles=200, vectorize_particles=True)
    estimates = torch.stack([gradient(elbo, model, guide, Y) for _ in range(300)])
    exact = torch.autograd.grad(conjugate_loss(guide.loc, guide.scale), list(guide.parameters()))
    assert_unbiased(estimates, torch.cat(exact))


# The score of a flow's draws


@pytest.mark.parametrize(
    ("dim", "context_dim", "hidden_dims"),
    [(1, 2, (5,)), (2, 0, (8,)), (9, 0, (3,)), (20, 0, (16, 16)), (40, 3, (7, 60, 9))],
)
@pytest.mark.parametrize("bijection", BIJECTIONS, ids=repr)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_scores_of_autoregressive_draws_are_those_by_the_inverse(
    bijection: ScalarBijection,
    dim: int,
    context_dim: int,
    hidden_dims: tuple[int, ...],
    activation: type[nn.Module],
) -> None:
    torch.manual_seed(1)
    order = torch.randperm(dim).tolist()
    layer = Autoregressive(bijection, dim, context_dim, hidden_dims, order, activation)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, score, context = torch.randn(3, 4, dim), torch.randn(3, 4, dim), ()
    if context_dim:
        context = (torch.randn(4, context_dim),)
    y, found = layer.forward_and_score(x, score, *context)
    torch.testing.assert_close(y, layer.forward_and_log_det(x, *context)[0].detach())
    leaf = y.clone().requires_grad_()
    back, log_det = layer.inverse_and_log_det(leaf, *context)
    (expected,) = torch.autograd.grad((back * score).sum() + log_det.sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("remembered", [True, False])
def test_scores_of_draws_are_gradients_of_the_density(build: Callable, remembered: bool) -> None:
    model, args = MODELS["nested plates"]
    guide = build(model)
    guide(*args)
    flow = perturb(guide, 0.03).get_posterior()
    draws = flow.rsample((3,))
    leaf = draws.detach().clone().requires_grad_()
    log_prob, score = log_prob_and_score(flow, draws if remembered else draws.clone())
    expected = flow.log_prob(leaf)
    torch.testing.assert_close(log_prob, expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        score, torch.autograd.grad(expected.sum(), leaf)[0], rtol=1e-5, atol=1e-6
    )
    assert not score.requires_grad
    assert not log_prob.requires_grad


def test_a_pass_forward_serves_flows_whose_inverse_is_slow() -> None:
    iaf, maf = pf.flow("iaf", 3), pf.flow("maf", 3)
    assert is_autoregressive(iaf)
    assert is_autoregressive(Compose([pf.flow("realnvp", 3), iaf]))
    assert is_autoregressive(pf.flow("iaf", 3, context_dim=2).condition(torch.zeros(2)))
    assert not is_autoregressive(maf)
    assert not is_autoregressive(pf.flow("realnvp", 3))


# No variance where the guide is exact


def target(density: dist.Distribution) -> None:
    """Spread a vector by a given density."""
    z = pyro.sample("z", Flat(constraints.real_vector, (), (3,)))
    pyro.factor("energy", density.log_prob(z))


@torch.no_grad()
def copy_of_posterior(guide: AutoContinuous) -> dist.Distribution:
    """Return the density of a guide, which does not change with it."""
    return copy.deepcopy(guide).get_posterior()


@pytest.mark.parametrize(
    "build", [*GUIDES.values(), *GAUSSIAN_GUIDES.values()], ids=[*GUIDES, *GAUSSIAN_GUIDES]
)
def test_gradients_vanish_draw_by_draw_where_the_guide_is_exact(build: Callable) -> None:
    guide = build(partial(target, dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    guide()
    if isinstance(guide, pf.AutoFlow):
        perturb(guide, 0.03)
    model = partial(target, copy_of_posterior(guide))
    assert gradient(pf.PathwiseELBO(), model, guide).abs().max() < 1e-5
    assert gradient(Trace_ELBO(), model, guide).abs().max() > 0.1


@pytest.mark.parametrize("build", [realnvp, AutoMultivariateNormal])
def test_doubly_reparameterised_gradients_vanish_where_the_guide_is_exact(build: Callable) -> None:
    guide = build(partial(target, dist.Normal(torch.zeros(3), 1.0).to_event(1)))
    guide()
    model = partial(target, copy_of_posterior(guide))
    elbo = pf.PathwiseELBO(2, num_importance_samples=5, vectorize_particles=True)
    assert gradient(elbo, model, guide).abs().max() < 1e-8


def chain() -> None:
    """Let a second variable depend on the first."""
    first = pyro.sample("first", dist.Normal(1.0, 2.0))
    pyro.sample("second", dist.Normal(0.5 * first, 0.3))


def test_serves_guides_written_by_hand() -> None:
    def guide() -> None:
        first = pyro.sample("first", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 2.0))
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.3), constraint=constraints.positive)
        pyro.sample("second", dist.Normal(slope * first, scale))

    pf.PathwiseELBO().loss_and_grads(chain, guide)
    learned = [pyro.param(name).unconstrained() for name in ("loc", "slope", "scale")]
    assert all(parameter.grad.abs() < 1e-12 for parameter in learned)


def test_is_not_misled_by_transforms_that_remember_their_last_draw() -> None:
    guide = AutoIAFNormal(chain)
    guide()
    torch.manual_seed(1)
    total = gradient(Trace_ELBO(), chain, guide)
    torch.manual_seed(1)
    path = gradient(pf.PathwiseELBO(), chain, guide)
    torch.manual_seed(1)
    z = guide.get_posterior().sample().clone()
    score = torch.autograd.grad(guide.get_posterior().log_prob(z), list(guide.parameters()))
    torch.testing.assert_close(total - path, torch.cat([part.flatten() for part in score]))


# The importance-weighted bound


def noisy(y: Tensor) -> None:
    """Model a number by a normal latent variable and learned noise."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    noise = pyro.param("noise", torch.tensor(0.8), constraint=constraints.positive)
    pyro.sample("y", dist.Normal(z, noise), obs=y)


def bound_by_quadrature(y: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Integrate the bound of two importance samples over a grid of their noise."""
    grid = torch.linspace(-7.0, 7.0, 281)
    standard = dist.Normal(0.0, 1.0)
    mass = standard.log_prob(grid).exp() * (grid[1] - grid[0])
    z = loc + scale * grid
    log_q = dist.Normal(loc, scale).log_prob(z)
    log_w = standard.log_prob(z) + dist.Normal(z, noise).log_prob(y) - log_q
    pairs = torch.logaddexp(log_w, log_w.unsqueeze(-1)) - math.log(2.0)
    return mass @ pairs @ mass


def off_centre(y: Tensor) -> AutoDiagonalNormal:
    """Return a guide far from the posterior."""
    guide = AutoDiagonalNormal(noisy, init_scale=0.4)
    guide(y)
    with torch.no_grad():
        guide.loc.fill_(-0.3)
    return guide


def test_the_mean_gradient_of_the_importance_weighted_bound() -> None:
    y = torch.tensor(1.5)
    guide = off_centre(y)
    elbo = pf.PathwiseELBO(500, num_importance_samples=2, vectorize_particles=True)
    elbo.loss(noisy, guide, y)
    noise = pyro.param("noise").unconstrained()
    losses, estimates = [], []
    for _ in range(300):
        noise.grad = None
        guide.zero_grad()
        losses.append(elbo.loss_and_grads(noisy, guide, y))
        learned = [*guide.parameters(), noise]
        estimates.append(torch.cat([p.grad.reshape(-1) for p in learned]).clone())
    loss = -bound_by_quadrature(y, guide.loc, guide.scale, pyro.param("noise"))
    exact = torch.autograd.grad(loss, [*guide.parameters(), noise])
    assert_unbiased(torch.stack(estimates), torch.cat([part.reshape(-1) for part in exact]))
    assert_unbiased(torch.tensor(losses).unsqueeze(-1), loss.detach().unsqueeze(-1))


def test_importance_samples_drawn_one_by_one_weigh_the_same() -> None:
    y = torch.tensor(1.5)
    guide = off_centre(y)
    gradients = []
    for vectorized in (True, False):
        elbo = pf.PathwiseELBO(2, num_importance_samples=3, vectorize_particles=vectorized)
        elbo.loss(noisy, guide, y)
        torch.manual_seed(1)
        gradients.append(gradient(elbo, noisy, guide, y))
    torch.testing.assert_close(*gradients)


# In use


def test_svi_finds_the_conjugate_answer() -> None:
    guide = AutoDiagonalNormal(conjugate)
    elbo = pf.PathwiseELBO(8, vectorize_particles=True)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(120):
        svi.step(Y)
    mean, sd, log_evidence = conjugate_answer(Y)
    # The gradient has no variance at the answer, where Adam hence comes to rest.
    assert guide.loc.item() == pytest.approx(mean, abs=0.01)
    assert guide.scale.item() == pytest.approx(sd, abs=0.01)
    assert svi.evaluate_loss(Y) == pytest.approx(-log_evidence, abs=0.01)


def test_is_differentiable_as_a_module() -> None:
    with pyro.settings.context(module_local_params=True):
        guide = realnvp(partial(target, dist.Normal(torch.zeros(3), 1.0).to_event(1)))
        guide()
        perturb(guide)
        exact = pyro.nn.PyroModule[Target](copy_of_posterior(guide))
        pf.PathwiseELBO()(exact, guide)().backward()
        assert all(p.grad.abs().max() < 1e-8 for p in guide.parameters())
        Trace_ELBO()(exact, guide)().backward()
        assert any(p.grad.abs().max() > 0.1 for p in guide.parameters())


class Target(nn.Module):
    """Hold the model of a given density."""

    def __init__(self, density: dist.Distribution) -> None:
        super().__init__()
        self.density = density

    def forward(self) -> None:
        target(self.density)


def test_nothing_stays_frozen() -> None:
    guide = realnvp(conjugate)
    pf.PathwiseELBO().loss(conjugate, guide, Y)
    assert all(parameter.requires_grad for parameter in guide.parameters())


# Refusals


@pytest.mark.parametrize("name", ["num_particles", "num_importance_samples"])
def test_refuses_impossible_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        pf.PathwiseELBO(**{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 2.5"):
        pf.PathwiseELBO(**{name: 2.5})


def test_refuses_sites_without_reparameterisation() -> None:
    def model() -> None:
        pyro.sample("count", dist.Poisson(3.0))

    def guide() -> None:
        pyro.sample("count", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    with pytest.raises(ValueError, match=r"site 'count' .* cannot be reparameterised \(Poisson\)"):
        pf.PathwiseELBO().loss(model, guide)


def test_refuses_models_to_enumerate() -> None:
    guide = realnvp(mixture)
    with pytest.raises(ValueError, match=r"'member' .* enumerated: use pf.fit or TraceEnum_ELBO"):
        pf.PathwiseELBO().loss(mixture, guide, Y)


def test_refuses_guides_that_leave_latent_variables_out() -> None:
    guide = AutoNormal(poutine.block(chain, hide=["second"]))
    with pytest.raises(ValueError, match="'second' of the model is not drawn by the guide"):
        pf.PathwiseELBO().loss(chain, guide)


def test_refuses_flows_without_an_inverse() -> None:
    guide = AutoNormalizingFlow(chain, dist.transforms.planar)
    with pytest.raises(ValueError, match="for want of an inverse"):
        pf.PathwiseELBO().loss(chain, guide)


def test_refuses_guides_that_run_with_the_model() -> None:
    with pytest.raises(ValueError, match=r"guide is a AutoNormalMessenger, .*: use Trace_ELBO"):
        pf.PathwiseELBO().loss(chain, AutoNormalMessenger(chain))


def test_refuses_to_weigh_draws_from_several_distributions() -> None:
    elbo = pf.PathwiseELBO(num_importance_samples=2)
    with pytest.raises(ValueError, match=r"sites .*'first_unconstrained', 'second_unconstrained'"):
        elbo.loss(chain, AutoNormal(chain))


def test_refuses_to_weigh_draws_from_a_scaled_guide() -> None:
    guide = poutine.scale(realnvp(chain), scale=0.1)
    elbo = pf.PathwiseELBO(num_importance_samples=2)
    with pytest.raises(ValueError, match=r"with scale 0\.1: scale the model alone"):
        elbo.loss(chain, guide)
