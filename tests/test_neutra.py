"""NUTS in the base space of a guide: the right density, the right draws, all that is said of them.

The posteriors of most tests come from guides that were moved a little instead of fitted: the
answer must not depend on how good the guide is.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import iterated, spline_coupling
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormalizingFlow,
    init_to_value,
)
from torch import Tensor
from torch.autograd.functional import jacobian

import pyroflows as pf
from pyroflows.svi.density import ModelDensity
from pyroflows.svi.neutra import _BaseDensity, _constant
from pyroflows.svi.neutra_posterior import BASE
from tests.models import (
    GUIDES,
    TABLE,
    conjugate,
    gaussian,
    groups,
    groups_log_joint,
    over,
    perturb,
    realnvp,
    regression,
)
from tests.reference.posteriordb import eight_schools

SCORES = torch.tensor([2.0, -1.0, 0.5, 3.0])
CHAINS, SAMPLES = 2, 100
FEW = {"num_samples": 8, "warmup_steps": 5, "progress": False}
X, Y = torch.tensor([0.1, 0.6, 1.0]), torch.tensor([0.3, 1.1, 1.9])


def pupils(y: Tensor) -> None:
    """Model scores of pupils, each with an ability of its own around a common mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("pupil", len(y)):
        ability = pyro.sample("ability", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(ability, 1.0), obs=y)


def pupils_answer() -> tuple[Tensor, Tensor]:
    """Return the posterior mean and covariance of the mean and the four abilities."""
    precision = 2 * torch.eye(5).double()  # an ability's prior and its datum
    precision[0, 0] = 1 / 4 + 4
    precision[0, 1:] = precision[1:, 0] = -1.0
    covariance = precision.inverse()
    return covariance[:, 1:] @ SCORES.double(), covariance


def posterior_of(
    model: Callable, *args: Any, guide: AutoContinuous | None = None
) -> pf.VariationalPosterior:
    """Return the result of a guide that was moved instead of fitted."""
    density = ModelDensity(model, realnvp(model, init_scale=1.0) if guide is None else guide, args)
    perturb(density.guide, 0.2)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(1), 10)


@pytest.fixture(scope="module")
def chains() -> pf.NeuTraPosterior:
    torch.manual_seed(0)
    pyro.clear_param_store()
    result = posterior_of(pupils, SCORES)
    mean, covariance = (value.float() for value in pupils_answer())
    # The flow is moved away from the identity; good scales around it keep trajectories short.
    result.guide.get_transform()[-1].set_frame(mean, torch.linalg.cholesky(covariance))
    return pf.neutra(result, SAMPLES, 40, CHAINS, progress=False)


# The density


def iterated_splines(model: Callable) -> AutoNormalizingFlow:
    return AutoNormalizingFlow(model, partial(iterated, 2, spline_coupling))


PYRO_GUIDES = {
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoNormalizingFlow": iterated_splines,
}


@pytest.fixture(**over({**GUIDES, **PYRO_GUIDES}))
def build(request: pytest.FixtureRequest) -> Callable:
    return request.param


def test_density_counts_the_map_of_any_guide_once(build: Callable) -> None:
    guide = build(gaussian)
    guide()  # Pyro's AutoNormalizingFlow is built by its first draw
    density = ModelDensity(gaussian, guide)
    perturb(guide)
    u = torch.randn(4, 3)
    with _constant(density):
        target = _BaseDensity(density)
        z = target.push(u)[0]
        maps = [jacobian(lambda row: target.push(row.unsqueeze(0))[0][0], row) for row in u]
        log_det = torch.stack(maps).slogdet()[1]
        torch.testing.assert_close(
            target.log_density(u), density(z) + log_det, rtol=1e-3, atol=1e-3
        )


def test_density_counts_latents_in_plates_once() -> None:
    """The plates' sizes, 2 and 3, would multiply the log-determinant."""
    density = posterior_of(groups, TABLE).density
    target = _BaseDensity(density)
    u = torch.randn(5, 6)
    maps = torch.stack(
        [jacobian(lambda row: target.push(row.unsqueeze(0))[0][0], row) for row in u]
    )
    log_det = maps.slogdet()[1]
    assert log_det.std() > 0.05  # else a wrong multiple would only be a constant
    values = density.constrain(target.push(u)[0])
    expected = groups_log_joint(values, TABLE) + values["scale"].log() + log_det
    torch.testing.assert_close(target.log_density(u), expected)


class Picky(pf.transforms.Permutation):
    """Give up on vectors of large entries."""

    def forward_and_log_det(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if x.abs().max() > 3:
            raise pf.transforms.ConvergenceError("too far out")
        return super().forward_and_log_det(x)


def test_potential_is_nan_where_the_flow_gives_up() -> None:
    guide = pf.AutoFlow(gaussian, flow=lambda dim: Picky(range(dim)))
    target = _BaseDensity(ModelDensity(gaussian, guide))
    near, far = torch.zeros(3), torch.full((3,), 4.0, requires_grad=True)
    assert target.potential({BASE: near}).isfinite()
    potential = target.potential({BASE: far})
    assert potential.isnan()
    (gradient,) = torch.autograd.grad(potential, far)  # Pyro asks for it
    assert gradient.shape == (3,)


# The draws


def test_draws_follow_the_posterior(chains: pf.NeuTraPosterior) -> None:
    """Four standard errors of what 200 draws are worth; the sd's is ``sd / sqrt(2 ess)``."""
    mean, covariance = pupils_answer()
    sd = covariance.diagonal().sqrt()
    draws = torch.cat([chains.draws["mean"].unsqueeze(-1), chains.draws["ability"]], -1)
    flat = draws.flatten(0, 1).double()
    ess = chains.diagnostics["ess_bulk"]
    assert ess > 50
    assert ((flat.mean(0) - mean).abs() < 4 * sd / ess**0.5).all()
    assert ((flat.std(0) - sd).abs() < 4 * sd / (2 * ess) ** 0.5).all()


def test_all_spaces_hold_the_same_draws(chains: pf.NeuTraPosterior) -> None:
    assert chains.base.shape == chains.unconstrained.shape == (CHAINS, SAMPLES, 5)
    assert {name: value.shape for name, value in chains.draws.items()} == {
        "mean": (CHAINS, SAMPLES),
        "ability": (CHAINS, SAMPLES, 4),
    }
    guide = chains.result.guide
    z, log_det = guide.get_transform().forward_and_log_det(chains.base)
    torch.testing.assert_close(chains.unconstrained, z)
    torch.testing.assert_close(chains.stats["log_det"], log_det)
    torch.testing.assert_close(chains.draws["mean"], z[..., 0])
    torch.testing.assert_close(chains.draws["ability"], z[..., 1:])
    log_p = chains.result.density(z.flatten(0, 1)).reshape(CHAINS, SAMPLES)
    torch.testing.assert_close(chains.stats["lp"], log_p)


def test_draws_are_constrained_and_hold_deterministic_sites() -> None:
    draws = pf.neutra(posterior_of(regression, X, Y), **{**FEW, "warmup_steps": 30}).draws
    assert {name: value.shape for name, value in draws.items()} == {
        "weights": (1, 8, 3),
        "sigma": (1, 8),
        "slope": (1, 8),
    }
    torch.testing.assert_close(draws["weights"].sum(-1), torch.ones(1, 8))
    torch.testing.assert_close(draws["slope"], 2 * draws["weights"][..., 0])
    assert (draws["sigma"] > 0).all()


def test_pyro_guides_and_double_precision_work() -> None:
    y = SCORES.double()
    guide = AutoMultivariateNormal(conjugate)
    draws = pf.neutra(posterior_of(conjugate, y, guide=guide), **FEW).draws["mean"]
    assert draws.dtype == torch.float64
    assert draws.std() > 0


def test_data_may_be_more_precise_than_latents() -> None:
    draws = pf.neutra(posterior_of(pupils, SCORES.double()), **FEW, max_tree_depth=3).draws
    assert draws["mean"].dtype == torch.float32


def test_seed_makes_draws_reproducible_and_leaves_the_global_state_alone() -> None:
    result = posterior_of(conjugate, SCORES)
    before = torch.get_rng_state()
    first, again, other = (pf.neutra(result, **FEW, seed=seed).base for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_chains_differ(chains: pf.NeuTraPosterior) -> None:
    assert not torch.isclose(chains.base[0], chains.base[1]).any()


def test_guide_is_left_as_it_was() -> None:
    result = posterior_of(conjugate, SCORES)
    state = {name: value.clone() for name, value in result.guide.state_dict().items()}
    with torch.no_grad():
        pf.neutra(result, **FEW)
    assert all(torch.equal(value, state[name]) for name, value in result.guide.state_dict().items())
    assert all(parameter.requires_grad for parameter in result.guide.parameters())
    assert result.guide.training


def test_sample_picks_draws_without_repeating_them(chains: pf.NeuTraPosterior) -> None:
    total = CHAINS * SAMPLES
    everything = chains.sample(total, seed=0)["ability"]
    torch.testing.assert_close(
        everything.sort(0)[0], chains.draws["ability"].flatten(0, 1).sort(0)[0]
    )
    assert not torch.equal(everything, chains.draws["ability"].flatten(0, 1))  # shuffled
    more = chains.sample(total + 1, seed=0)
    torch.testing.assert_close(more["ability"][:total], everything)
    assert more["ability"].shape == (total + 1, 4)
    # Sites stay together.
    rows = torch.cat([more["mean"].unsqueeze(-1), more["ability"]], -1)
    distance = torch.cdist(rows.double(), chains.unconstrained.flatten(0, 1).double())
    assert distance.min(-1).values.max() < 1e-5


# What is said of them


def test_diagnostics_approve_of_good_chains(chains: pf.NeuTraPosterior) -> None:
    diagnostics = chains.diagnostics
    assert diagnostics["divergences"] == 0
    assert 0.98 < diagnostics["rhat"] < 1.1
    assert 50 < diagnostics["ess_tail"] < 4 * CHAINS * SAMPLES
    assert chains.stats["n_steps"].min() >= 1
    assert (chains.stats["step_size"] == chains.stats["step_size"][:, :1]).all()


def moved(chains: pf.NeuTraPosterior, base: Tensor) -> pf.NeuTraPosterior:
    """Return chains with other draws in their place."""
    parts = _BaseDensity(chains.result.density).evaluate(base)
    diverging = torch.zeros(base.shape[:2], dtype=torch.bool)
    return pf.NeuTraPosterior(chains.result, base, *parts, {"diverging": diverging})


def test_verdicts_name_what_is_wrong(chains: pf.NeuTraPosterior) -> None:
    half = torch.randn(1, 200, 5)
    noise = half.repeat(2, 2, 1)  # all halves of chains are the same: R-hat is below one
    assert moved(chains, noise).verdict.startswith("The chains agree and no transition diverged")
    apart = noise + torch.tensor([-2.0, 2.0]).reshape(2, 1, 1)
    assert "The chains do not agree (R-hat" in moved(chains, apart).verdict
    assert "worth only" in moved(chains, half[:, :25].repeat(2, 2, 1)).verdict
    drifting = noise[:1] + torch.linspace(-3, 3, 400).reshape(1, -1, 1)
    assert "do not agree" in moved(chains, drifting).verdict  # a single chain is cut in two
    stuck = torch.zeros(2, 400, 5)
    assert "do not agree (R-hat nan" in moved(chains, stuck).verdict


def test_summary_has_a_row_for_each_latent_number(chains: pf.NeuTraPosterior) -> None:
    table = chains.summary()
    assert table.index.tolist() == ["mean", *(f"ability[{i}]" for i in range(4))]
    columns = ["mean", "sd", "q05", "median", "q95", "rhat", "ess_bulk", "ess_tail"]
    assert table.columns.tolist() == columns
    last = chains.draws["ability"][..., 3].double()
    assert table["mean"]["ability[3]"] == pytest.approx(last.mean().item())
    assert table["median"]["ability[3]"] == pytest.approx(last.quantile(0.5).item())
    assert table["ess_bulk"].min() == pytest.approx(chains.diagnostics["ess_bulk"], rel=1e-3)
    assert table.attrs["verdict"] == chains.verdict


def walled() -> None:
    """Model a number by a normal distribution that has no density below zero."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(x > 0, 0.0, math.nan))


def test_divergences_are_counted_and_warned_of() -> None:
    start = init_to_value(values={"x": torch.tensor(0.3)})
    guide = realnvp(walled, init_scale=0.5, init_loc_fn=start)
    result = pf.VariationalPosterior.from_guide(ModelDensity(walled, guide), torch.zeros(1), 10)
    with pytest.warns(UserWarning, match="of 30 transitions diverged"):
        chains = pf.neutra(result, 30, 20, progress=False)
    assert chains.divergences == chains.diagnostics["divergences"] > 0
    assert "transitions diverged" in chains.verdict
    assert (chains.draws["x"] > 0).all()


# ArviZ


def test_arviz_holds_both_spaces_and_all_chains(chains: pf.NeuTraPosterior) -> None:
    data = chains.to_arviz(num_prior_draws=20, coords={"pupil": list("abcd")})
    ability = data["posterior"]["ability"]
    assert ability.dims == ("chain", "draw", "pupil")
    assert ability.coords["pupil"].values.tolist() == list("abcd")
    torch.testing.assert_close(torch.as_tensor(ability.values), chains.draws["ability"])
    base = data["base_posterior"][BASE]
    assert base.dims == ("chain", "draw", f"{BASE}_dim_0")
    torch.testing.assert_close(torch.as_tensor(base.values), chains.base)
    free = torch.as_tensor(data["unconstrained_posterior"]["ability"].values)
    torch.testing.assert_close(free, chains.unconstrained[..., 1:])
    assert set(data["sample_stats"].data_vars) == {
        "lp",
        "log_det",
        "diverging",
        "n_steps",
        "step_size",
    }
    assert data["sample_stats"]["diverging"].shape == (CHAINS, SAMPLES)
    likelihood = torch.as_tensor(data["log_likelihood"]["y"].values)
    expected = dist.Normal(chains.draws["ability"], 1.0).log_prob(SCORES)
    torch.testing.assert_close(likelihood, expected)
    assert data["prior"]["mean"].shape == (1, 20)
    assert data["observed_data"]["y"].shape == (4,)
    assert data.attrs["rhat"] == chains.diagnostics["rhat"]


# Interrupts


class Interrupted:
    """Be a model that is interrupted once, after a number of calls."""

    def __init__(self) -> None:
        self.calls_left = math.inf

    def __call__(self) -> None:
        self.calls_left -= 1
        if self.calls_left < 0:
            self.calls_left = math.inf
            raise KeyboardInterrupt
        pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.fixture
def interrupted() -> tuple[Interrupted, pf.VariationalPosterior]:
    model = Interrupted()
    return model, posterior_of(model)


def test_interrupt_keeps_what_the_first_chain_has_drawn(
    interrupted: tuple[Interrupted, pf.VariationalPosterior],
) -> None:
    model, result = interrupted
    model.calls_left = 300
    with pytest.warns(UserWarning, match="interrupted: the result holds 1 chains of"):
        chains = pf.neutra(result, 10_000, 5, 2, progress=False)
    assert chains.shape[0] == 1
    assert 8 <= chains.shape[1] < 300


def test_interrupt_before_the_first_draws_is_passed_on(
    interrupted: tuple[Interrupted, pf.VariationalPosterior],
) -> None:
    model, result = interrupted
    model.calls_left = 10
    with pytest.raises(KeyboardInterrupt):
        pf.neutra(result, 100, 100, progress=False)


# Mistakes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 7}, ValueError, "num_samples must be at least 8, got 7"),
        ({"num_samples": 10.0}, TypeError, "num_samples must be an integer, got 10.0"),
        ({"warmup_steps": 0}, ValueError, "warmup_steps must be at least 1, got 0"),
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1, got 0"),
        ({"max_tree_depth": 0}, ValueError, "max_tree_depth must be at least 1, got 0"),
        ({"target_accept_prob": 1.0}, ValueError, "target_accept_prob must be between 0 and 1"),
    ],
)
def test_impossible_numbers_are_named(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        pf.neutra(posterior_of(conjugate, SCORES), **options)


def test_only_variational_results_are_taken() -> None:
    with pytest.raises(TypeError, match=r"result must be what pyroflows.fit returns, got function"):
        pf.neutra(conjugate)


def test_guides_without_a_transform_are_named() -> None:
    result = posterior_of(gaussian, guide=AutoLowRankMultivariateNormal(gaussian))
    with pytest.raises(TypeError, match="got one of AutoLowRankMultivariateNormal"):
        pf.neutra(result, **FEW)


def subsampled(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("item", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])


def test_random_densities_are_refused() -> None:
    with pytest.raises(ValueError, match="log-density is the same each time"):
        pf.neutra(posterior_of(subsampled, SCORES), **FEW)


def test_guides_that_went_astray_are_refused() -> None:
    result = posterior_of(conjugate, SCORES)
    with torch.no_grad():
        result.guide.get_transform()[-1].loc.fill_(math.nan)
    with pytest.raises(ValueError, match="finite at 0 of 40 draws of the guide of result"):
        pf.neutra(result, **FEW, num_chains=2)


def test_sample_needs_a_positive_number(chains: pf.NeuTraPosterior) -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        chains.sample(0)


# A posterior that NUTS alone does not get right


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* transitions diverged")
def test_centred_eight_schools() -> None:
    """The exact moments are integrals over ``tau`` alone; four standard errors are allowed."""
    torch.set_default_dtype(torch.float64)
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    guide = pf.AutoRealNVP(eight_schools)
    result = pf.fit(eight_schools, guide, (y, sigma), num_steps=500, progress=False)
    chains = pf.neutra(result, 500, 200, 2, progress=False, target_accept_prob=0.9)
    table = chains.summary()
    log_tau = chains.draws["tau"].log().flatten()
    mu = chains.draws["mu"].flatten()
    assert chains.diagnostics["rhat"] < 1.05
    for site, draws, mean, sd in (
        ("mu", mu, 4.3968, 3.3177),
        ("tau", log_tau, 0.8021, 1.1713),
    ):
        ess = min(table["ess_bulk"][site], table["ess_tail"][site])
        assert ess > 100
        assert abs(draws.mean().item() - mean) < 4 * sd / ess**0.5
        assert draws.std().item() == pytest.approx(sd, rel=4 / (2 * ess) ** 0.5)
