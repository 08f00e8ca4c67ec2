"""The Gaussian start: exact where the target is Gaussian, never a step back elsewhere."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch import Tensor

import pyroflows as pf
from pyroflows.svi.density import ModelDensity
from pyroflows.svi.warm_start import Gaussian, fit_gaussian
from tests.benchmarks import posteriors
from tests.models import GAUSSIAN_FACTOR, GAUSSIAN_MEAN, gaussian, realnvp
from tests.reference import exact, needs_reference, posteriordb

LogDensity = Callable[[Tensor], Tensor]


def start(dim: int, scale: float = 0.1, dtype: torch.dtype = torch.float32) -> Gaussian:
    """Return a small ball around the origin."""
    return Gaussian(torch.zeros(dim, dtype=dtype), scale * torch.eye(dim, dtype=dtype))


def diagonal_start(dim: int) -> Gaussian:
    return Gaussian(torch.zeros(dim), torch.full((dim,), 0.1))


def elbo(log_density: LogDensity, g: Gaussian, draws: int = 20_000) -> tuple[float, float]:
    """Estimate the ELBO of a normal distribution, with its Monte Carlo error."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(draws, len(g.loc), generator=generator, dtype=g.loc.dtype)
    entropy = g.log_det() + 0.5 * len(g.loc) * math.log(2 * math.pi * math.e)
    with torch.no_grad():
        log_p = log_density(g.push(noise))
    return float(log_p.mean() + entropy), float(log_p.std()) / math.sqrt(draws)


def normal(mean: Tensor, scale_tril: Tensor) -> LogDensity:
    return dist.MultivariateNormal(mean, scale_tril=scale_tril).log_prob


# Gaussian targets


def test_finds_a_gaussian() -> None:
    found = fit_gaussian(normal(GAUSSIAN_MEAN, GAUSSIAN_FACTOR), start(3))
    torch.testing.assert_close(found.loc, GAUSSIAN_MEAN, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scale, GAUSSIAN_FACTOR, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dim", [1, 8])
def test_finds_gaussians_far_away_and_of_another_scale(dim: int) -> None:
    mean = torch.linspace(50, 100, dim)
    found = fit_gaussian(normal(mean, 30 * torch.eye(dim)), start(dim))
    assert (found.loc - mean).abs().max() < 0.03
    assert (found.scale - 30 * torch.eye(dim)).abs().max() < 0.03


def test_finds_an_ill_conditioned_gaussian() -> None:
    """Condition number 1e6, in double precision: relative to itself the fit is the identity."""
    torch.set_default_dtype(torch.float64)
    rotation, scales = exact.ill_conditioned_gaussian(8).args
    covariance = rotation @ scales.square().diag() @ rotation.T
    factor = torch.linalg.cholesky(covariance)

    def log_density(z: Tensor) -> Tensor:
        return -0.5 * (z @ rotation / scales).square().sum(-1)

    found = fit_gaussian(log_density, start(8, dtype=torch.float64))
    relative = torch.linalg.solve_triangular(factor, found.scale, upper=False)
    shift = torch.linalg.solve_triangular(factor, found.loc.unsqueeze(-1), upper=False)
    assert (relative - torch.eye(8)).abs().max() < 1e-3
    assert shift.abs().max() < 1e-3


def test_fit_starts_from_the_evidence_of_an_ill_conditioned_gaussian() -> None:
    """Where the start is exact, log-weights are constant: the evidence, without a step."""
    torch.set_default_dtype(torch.float64)
    target = exact.ill_conditioned_gaussian()
    guide = realnvp(target.model)
    result = pf.fit(target.model, guide, target.args, num_steps=1, num_draws=1000, progress=False)
    assert result.log_evidence == pytest.approx(target.log_evidence, abs=1e-2)
    assert result.elbo == pytest.approx(target.log_evidence, abs=5e-2)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_does_not_depend_on_the_scale_of_the_units(offset: float) -> None:
    """Coordinates in units of a thousand and a thousandth are found alike."""
    scale = torch.tensor([1e3, 1e-3])
    mean = torch.tensor([offset, offset * 1e-6])
    found = fit_gaussian(lambda z: normal(mean / scale, torch.eye(2))(z / scale), start(2))
    torch.testing.assert_close(found.scale.diagonal() / scale, torch.ones(2), rtol=0, atol=1e-2)
    torch.testing.assert_close((found.loc - mean) / scale, torch.zeros(2), rtol=0, atol=1e-2)


def test_keeps_the_precision_of_the_start() -> None:
    for dtype in (torch.float32, torch.float64):
        mean, factor = GAUSSIAN_MEAN.to(dtype), GAUSSIAN_FACTOR.to(dtype)
        found = fit_gaussian(normal(mean, factor), start(3, dtype=dtype))
        assert found.loc.dtype == found.scale.dtype == dtype


# The diagonal variant


def test_diagonal_start_gives_the_best_diagonal_gaussian() -> None:
    """The best diagonal scale has the inverse square root of the precision's diagonal."""
    found = fit_gaussian(normal(GAUSSIAN_MEAN, GAUSSIAN_FACTOR), diagonal_start(3))
    precision = torch.cholesky_inverse(GAUSSIAN_FACTOR)
    assert found.scale.shape == (3,)
    torch.testing.assert_close(found.loc, GAUSSIAN_MEAN, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scale, precision.diagonal().rsqrt(), rtol=0, atol=1e-3)


def test_diagonal_start_is_exact_on_independent_targets() -> None:
    mean, scale = torch.tensor([3.0, -1.0]), torch.tensor([0.1, 5.0])
    found = fit_gaussian(lambda z: dist.Normal(mean, scale).log_prob(z).sum(-1), diagonal_start(2))
    torch.testing.assert_close((found.loc - mean) / scale, torch.zeros(2), rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scale / scale, torch.ones(2), rtol=0, atol=1e-2)


# Other targets


def density_of(target: exact.ExactTarget | posteriordb.ReferencePosterior) -> LogDensity:
    return ModelDensity(target.model, realnvp(target.model), target.args)


TARGETS = [
    exact.banana,
    exact.funnel,
    pytest.param(lambda: posteriordb.load("eight_schools"), marks=needs_reference),
]


@pytest.mark.parametrize("build", TARGETS)
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("full_rank", [True, False])
def test_is_never_worse_than_the_start(build: Callable, scale: float, full_rank: bool) -> None:
    """Four standard errors of the difference of two ELBOs on the same noise are allowed."""
    density = density_of(build())
    dim = density.guide.latent_dim
    ones = torch.full((dim,), scale)
    begin = Gaussian(density.guide._init_loc(), ones.diag() if full_rank else ones)
    found = fit_gaussian(density, begin)
    (before, error), (after, other_error) = elbo(density, begin), elbo(density, found)
    assert after > before - 4 * math.hypot(error, other_error)


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_is_never_worse_than_a_start_that_is_nearly_best(factor: float) -> None:
    """A second fit from the first one's answer, or from near it, keeps its ELBO."""
    density = density_of(exact.banana())
    best = fit_gaussian(density, start(2))
    again = fit_gaussian(density, Gaussian(best.loc, factor * best.scale))
    (value, error), (other, other_error) = elbo(density, best), elbo(density, again)
    assert other > value - 4 * math.hypot(error, other_error)


@needs_reference
def test_reaches_the_best_gaussian_of_the_eight_schools() -> None:
    """The best full-rank normal has an ELBO of -32.787; 512 draws overfit by at most 0.1."""
    density = density_of(posteriordb.load("eight_schools"))
    found = fit_gaussian(density, start(density.guide.latent_dim))
    value, error = elbo(density, found)
    assert value > -32.787 - 0.1 - 4 * error


def test_is_reproducible_by_seed() -> None:
    density = density_of(exact.banana())
    first, again, other = (fit_gaussian(density, start(2), seed) for seed in (0, 0, 1))
    assert torch.equal(first.loc, again.loc)
    assert torch.equal(first.scale, again.scale)
    assert not torch.equal(first.loc, other.loc)


def test_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    fit_gaussian(normal(GAUSSIAN_MEAN, GAUSSIAN_FACTOR), start(3))
    assert torch.equal(torch.get_rng_state(), before)


# Regions where the density is no number


def test_walls_do_not_break_it() -> None:
    """Beyond 3 the density is NaN, below -3 zero: the answer stays between."""

    def log_density(z: Tensor) -> Tensor:
        x = z.squeeze(-1)
        inside = -0.5 * (x / 0.3).square() + (3 - x).sqrt().log()
        return torch.where(x < -3, torch.full_like(x, -math.inf), inside)

    found = fit_gaussian(log_density, start(1))
    assert found.loc.isfinite().all()
    assert found.scale.isfinite().all()
    value, _ = elbo(log_density, found)
    assert math.isfinite(value)
    assert value > elbo(log_density, start(1))[0]


def test_a_density_that_is_no_number_away_from_the_start_keeps_the_start() -> None:
    def log_density(z: Tensor) -> Tensor:
        return torch.where(z.norm(dim=-1) < 5, -z.square().sum(-1), math.nan)

    begin = start(2, scale=0.5)
    found = fit_gaussian(log_density, begin)
    assert math.isfinite(elbo(log_density, found)[0])
    assert elbo(log_density, found)[0] >= elbo(log_density, begin)[0] - 1e-3


def test_a_density_that_is_no_number_anywhere_gives_the_start_back() -> None:
    begin = start(2)
    found = fit_gaussian(lambda z: z.sum(-1) * math.nan, begin)
    assert torch.equal(found.loc, begin.loc)
    assert torch.equal(found.scale, begin.scale)


def test_unbounded_densities_give_finite_numbers() -> None:
    found = fit_gaussian(lambda z: z.sum(-1).exp(), start(2))
    assert found.loc.isfinite().all()
    assert found.scale.isfinite().all()


def test_models_that_are_no_number_far_away_fit_without_warnings() -> None:
    """A line search may step far out: that is no news to the user."""

    def model() -> None:
        steps = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        pyro.sample("x", dist.TransformedDistribution(steps, [dist.transforms.OrderedTransform()]))

    result = pf.fit(model, realnvp(model), num_steps=5, num_draws=100, progress=False)
    assert math.isfinite(result.elbo)


# Inside fit


def test_fit_starts_there() -> None:
    guide = realnvp(gaussian, init_loc_fn=init_to_value(values={"a": torch.tensor(9.0)}))
    result = pf.fit(gaussian, guide, num_steps=1, num_draws=1000, progress=False)
    assert result.elbo == pytest.approx(0.0, abs=0.01)
    loc, scale_tril = guide.transform[-1].affine()
    torch.testing.assert_close(loc.detach(), GAUSSIAN_MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(scale_tril.detach(), GAUSSIAN_FACTOR, rtol=0, atol=0.01)


def test_fit_can_go_on_without_it() -> None:
    guide = realnvp(gaussian, init_scale=0.5)
    options = {"num_draws": 100, "progress": False, "warm_start": False}
    result = pf.fit(gaussian, guide, num_steps=1, **options)
    assert result.elbo < -1
    better = pf.fit(gaussian, guide, num_steps=100, learning_rate=0.05, **options)
    assert better.losses[0] == pytest.approx(float(result.losses[0]), abs=5)
    assert better.elbo > result.elbo


@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize("name", posteriors.TARGETS)
def test_fits_from_it_are_never_worse_than_from_a_ball(name: str) -> None:
    """Short fits of RealNVP to all models with a known evidence: three standard errors."""
    target = posteriors.TARGETS[name]()
    options: dict[str, Any] = {"num_steps": 500, "num_particles": 64, "progress": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The guide misses part")  # it would, after 500 steps
        warm, cold = (
            pf.fit(
                target.model,
                pf.AutoRealNVP(target.model),
                target.args,
                warm_start=warm_start,
                **options,
                **target.options,
            )
            for warm_start in (True, False)
        )
    error = math.hypot(warm.elbo_standard_error, cold.elbo_standard_error)
    assert warm.elbo >= cold.elbo - 3 * error
