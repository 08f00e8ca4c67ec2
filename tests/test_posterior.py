"""What a fit returns: draws, densities, and a verdict that can be trusted."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import effective_sample_size, log_evidence, psis
from pyroflows.svi.density import ModelDensity
from tests.models import (
    FLOWS,
    GAUSSIAN_FACTOR,
    GAUSSIAN_MEAN,
    GAUSSIAN_SD,
    GUIDES,
    HEIGHTS,
    SUPPORTS,
    TABLE,
    GuideBuilder,
    conjugate,
    conjugate_answer,
    gaussian,
    groups,
    mixture,
    over,
    perturb,
    realnvp,
    regression,
    sites_of,
    with_supports,
)
from tests.reference import exact

Y = torch.tensor([0.3, 1.1, 1.9])


def posterior_of(
    model: Callable, *args: Any, num_draws: int = 500, build: GuideBuilder = realnvp, **options: Any
) -> pf.VariationalPosterior:
    """Return the result of a small guide that was moved a little instead of fitted."""
    guide = build(model, **options)
    density = ModelDensity(model, guide, args)
    perturb(guide)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(3), num_draws)


def wrong_posterior(shift: float, shrink: float, num_draws: int = 10_000) -> Any:
    """Return a result whose guide misses the Gaussian target on purpose.

    It is off by ``shift`` deviations along each factor and narrower by ``shrink``.
    """
    guide = realnvp(gaussian)
    density = ModelDensity(gaussian, guide)
    loc = GAUSSIAN_MEAN + GAUSSIAN_FACTOR @ torch.full((3,), shift)
    guide.transform[-1].set_frame(loc, shrink * GAUSSIAN_FACTOR)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(3), num_draws)


@pytest.fixture(scope="module")
def result() -> pf.VariationalPosterior:
    """Return a result with plates, two kinds of support and a deterministic site."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    return posterior_of(groups, TABLE)


MODELS: dict[str, tuple[Callable, tuple]] = {
    "supports": (with_supports(), ()),
    "plates": (groups, (TABLE,)),
    "vector": (regression, (Y, Y)),
    "double": (conjugate, (Y.double(),)),
    "enumeration": (mixture, (HEIGHTS,)),
}


@pytest.fixture(**over(MODELS))
def case(request: pytest.FixtureRequest) -> tuple[Callable, tuple]:
    """Return a model and its arguments."""
    return request.param


# Draws


@pytest.mark.parametrize("resample", [False, True])
def test_draws_have_the_shapes_precisions_and_supports_of_the_sites(
    case: tuple, resample: bool
) -> None:
    model, args = case
    result = posterior_of(model, *args)
    draws = result.sample(7, resample=resample)
    for name, site in result.density.sites.items():
        assert draws[name].shape == (7, *site["value"].shape)
        assert draws[name].dtype == site["value"].dtype
        assert site["fn"].support.check(draws[name]).all()
        assert not draws[name].requires_grad


def test_draws_include_deterministic_sites(result: pf.VariationalPosterior) -> None:
    draws = result.sample(7)
    assert set(draws) == {"scale", "row_effect", "column_effect", "effect"}
    expected = draws["row_effect"] + draws["column_effect"].unsqueeze(1)
    torch.testing.assert_close(draws["effect"], expected)


@pytest.mark.parametrize("resample", [False, True])
def test_draws_are_reproducible_by_seed(result: pf.VariationalPosterior, resample: bool) -> None:
    before = torch.get_rng_state()
    first, again, other = (result.sample(50, resample, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["scale"], other["scale"])


def test_draws_without_a_seed_follow_the_global_state(result: pf.VariationalPosterior) -> None:
    first, second = result.sample(5), result.sample(5)
    assert not torch.equal(first["scale"], second["scale"])
    torch.manual_seed(0)
    third = result.sample(5)
    torch.manual_seed(0)
    assert torch.equal(third["scale"], result.sample(5)["scale"])


@pytest.mark.parametrize("number", [0, -3])
def test_at_least_one_draw_is_asked_for(result: pf.VariationalPosterior, number: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {number}"):
        result.sample(number)


@pytest.mark.parametrize("support", SUPPORTS)
def test_draws_stay_in_the_support_far_out(support: str) -> None:
    model = with_supports(support)
    site = sites_of(model)[support]
    draws = posterior_of(model, init_scale=2.0).sample(200)[support]
    assert draws.isfinite().all()
    assert site["fn"].support.check(draws).all()


def test_resampling_corrects_a_wrong_guide() -> None:
    """The weights have a tail of 0.4, so that 40 000 draws are worth thousands.

    Errors of 10 000 resampled draws are about 0.015 deviations; four times that is allowed. Plain
    draws are off by at least 0.3 * 0.6 = 0.18 in the last entry and more in the others.
    """
    wrong = wrong_posterior(shift=0.3, shrink=0.775)
    assert 0.1 < wrong.khat < 0.7
    plain, resampled = (wrong.sample(10_000, resample, seed=1) for resample in (False, True))
    for draws, right in ((plain, False), (resampled, True)):
        z = torch.cat([draws["a"].unsqueeze(-1), draws["b"]], -1)
        errors = ((z.mean(0) - GAUSSIAN_MEAN) / GAUSSIAN_SD).abs()
        spreads = (z.std(0) / GAUSSIAN_SD - 1).abs()
        assert (errors.max() < 0.06) == right
        assert (spreads.max() < 0.06) == right


# Densities


def test_log_prob_integrates_to_one_on_the_line() -> None:
    guide = GUIDES["AutoSpline"](with_supports("positive"))
    density = ModelDensity(guide.model, guide)
    perturb(guide, 0.3)
    result = pf.VariationalPosterior.from_guide(density, torch.zeros(1), 100)
    u = torch.linspace(-15, 10, 20_001)
    x = u.exp()
    log_prob = result.log_prob({"positive": x})
    integral = torch.trapezoid(log_prob.exp() * x, u)
    assert integral.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("support", SUPPORTS)
def test_log_prob_is_a_change_of_variables(support: str) -> None:
    result = posterior_of(with_supports(support))
    z = result.draws[:20]
    with torch.no_grad():
        log_q = result.guide.get_posterior().log_prob(z)
    values = result.site_values(z)
    transform = torch.distributions.biject_to(result.density.sites[support]["fn"].support)
    unconstrained = z.reshape(20, *result.guide._unconstrained_shapes[support])
    log_det = transform.log_abs_det_jacobian(unconstrained, values[support])
    expected = log_q - log_det.reshape(20, -1).sum(-1)
    torch.testing.assert_close(result.log_prob(values), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
def test_log_prob_of_unconstrained_sites_is_that_of_the_flow(build: GuideBuilder) -> None:
    result = posterior_of(gaussian, build=build)
    values = result.site_values(result.draws)
    torch.testing.assert_close(result.log_prob(values), result.log_q, rtol=1e-4, atol=1e-4)


def test_log_prob_ignores_deterministic_sites(result: pf.VariationalPosterior) -> None:
    draws = result.sample(5)
    expected = result.log_prob(draws)
    assert expected.shape == (5,)
    draws["effect"] = draws["effect"] * math.nan
    assert torch.equal(result.log_prob(draws), expected)


def test_log_prob_of_missing_sites_is_an_error(result: pf.VariationalPosterior) -> None:
    with pytest.raises(ValueError, match="must hold site 'row_effect'"):
        result.log_prob({"scale": torch.ones(3)})


def test_log_prob_outside_the_support_is_an_error(result: pf.VariationalPosterior) -> None:
    draws = result.sample(3)
    with pytest.raises(ValueError, match=r"values\['scale'\] leave the support"):
        result.log_prob({**draws, "scale": -draws["scale"]})


def test_log_prob_takes_arrays_of_draws(result: pf.VariationalPosterior) -> None:
    draws = result.sample(3)
    arrays = {name: value.numpy() for name, value in draws.items()}
    torch.testing.assert_close(result.log_prob(arrays), result.log_prob(draws))


# Weights and the verdict


def test_weights_are_the_ratio_of_the_densities(case: tuple) -> None:
    model, args = case
    result = posterior_of(model, *args)
    with torch.no_grad():
        log_p = result.density(result.draws)
        log_q = result.guide.get_posterior().log_prob(result.draws)
    torch.testing.assert_close(result.log_p, log_p)
    torch.testing.assert_close(result.log_q, log_q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(result.log_weights, result.log_p - result.log_q)


def test_numbers_follow_from_the_weights(result: pf.VariationalPosterior) -> None:
    weights = result.log_weights.double()
    smoothed, khat = psis(weights)
    assert result.elbo == pytest.approx(weights.mean().item())
    assert result.elbo_standard_error == pytest.approx(weights.std().item() / math.sqrt(500))
    assert result.khat == pytest.approx(khat)
    assert result.ess == pytest.approx(effective_sample_size(smoothed))
    assert (result.log_evidence, result.log_evidence_standard_error) == log_evidence(weights)
    assert result.elbo <= result.log_evidence


def test_numbers_are_python_floats(result: pf.VariationalPosterior) -> None:
    scalars = result.scalars()
    assert set(scalars) == {
        "elbo",
        "elbo_standard_error",
        "khat",
        "ess",
        "log_evidence",
        "log_evidence_standard_error",
    }
    for name, value in scalars.items():
        assert type(value) is float
        assert getattr(result, name) == value
    assert isinstance(result.losses, Tensor)


def test_numbers_agree_with_the_exact_answer() -> None:
    """A guide exact but for a shift has a gap of half its square; its evidence is the target's."""
    wrong = wrong_posterior(shift=0.2, shrink=1.0)
    gap = 0.5 * 3 * 0.2**2
    assert wrong.elbo == pytest.approx(-gap, abs=4 * wrong.elbo_standard_error)
    assert wrong.log_evidence == pytest.approx(0.0, abs=4 * wrong.log_evidence_standard_error)
    assert 0.003 < wrong.elbo_standard_error < 0.004  # 0.2 * sqrt(3) / 100


@pytest.mark.parametrize(
    ("khat", "words"),
    [
        (-math.inf, "close to the posterior"),
        (0.0, "close to the posterior"),
        (0.499, "close to the posterior"),
        (0.5, "near the posterior"),
        (0.699, "near the posterior"),
        (0.7, "misses part of the posterior"),
        (3.0, "misses part of the posterior"),
        (math.inf, "misses part of the posterior"),
    ],
)
def test_verdict_follows_khat(khat: float, words: str) -> None:
    wrong = wrong_posterior(shift=0.5, shrink=0.8, num_draws=500)
    wrong.khat = khat
    assert words in wrong.verdict


@pytest.mark.parametrize("shrink", [0.05, 0.3])
def test_verdict_on_a_narrow_guide_is_bad(shrink: float) -> None:
    """The true tail index is 1 - shrink**2, at least 0.91."""
    wrong = wrong_posterior(shift=0.0, shrink=shrink)
    assert wrong.khat > 0.7
    assert "misses part of the posterior" in wrong.verdict


def test_verdict_on_a_normal_guide_in_a_funnel_is_bad() -> None:
    target = exact.funnel(4)
    result = pf.fit(
        target.model,
        AutoDiagonalNormal(target.model),
        target.args,
        num_steps=300,
        num_particles=64,
        learning_rate=0.02,
        progress=False,
    )
    assert result.khat > 0.7
    assert "misses part of the posterior" in result.verdict


@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("seed", range(3))
def test_verdict_on_an_exact_guide_is_good(build: GuideBuilder, seed: int) -> None:
    """Within a thousandth of a nat of the evidence, whatever the shape of the weights' tail."""
    # The gradients of polynomials are noisier: they take longer.
    num_steps = 300 if build is FLOWS["sum_of_squares"] else 60
    result = pf.fit(
        conjugate, build(conjugate), (HEIGHTS,), num_steps=num_steps, seed=seed, progress=False
    )
    _, _, evidence = conjugate_answer(HEIGHTS)
    assert result.elbo == pytest.approx(evidence, abs=1e-3)
    assert result.ess > 0.99 * len(result.draws)
    assert "close to the posterior" in result.verdict


def with_log_p(log_p: Tensor) -> pf.VariationalPosterior:
    """Return a result whose draws have given log-densities under the model."""
    density = ModelDensity(conjugate, realnvp(conjugate), (Y,))
    draws = torch.zeros(len(log_p), 1)
    return pf.VariationalPosterior(density, torch.zeros(1), draws, log_p, torch.zeros(len(log_p)))


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("count", [1, 500])
def test_draws_of_no_density_count_as_zero_weights(bad: float, count: int) -> None:
    log_p = torch.linspace(-1, 0, 1000)
    log_p[:count] = bad
    result = with_log_p(log_p)
    expected = log_p[count:].double().exp().sum().log().item() - math.log(1000)
    assert result.log_evidence == pytest.approx(expected, abs=1e-6)
    assert result.ess <= 1000 - count
    assert result.elbo == -math.inf


def test_result_reads_like_its_numbers(result: pf.VariationalPosterior) -> None:
    text = repr(result)
    assert text.startswith("VariationalPosterior(AutoRealNVP, D=6, elbo=")
    for number in (f"{result.elbo:.3f}", f"{result.log_evidence:.3f}", f"khat={result.khat:.2f}"):
        assert number in text


# The summary


def test_summary_has_a_row_for_each_number(result: pf.VariationalPosterior) -> None:
    table = result.summary()
    assert isinstance(table, pd.DataFrame)
    assert list(table.columns) == [
        "mean",
        "sd",
        "q05",
        "median",
        "q95",
        "weighted_mean",
        "weighted_sd",
    ]
    rows = [f"row_effect[{i}, 0]" for i in range(2)]
    columns = [f"column_effect[{i}]" for i in range(3)]
    effects = [f"effect[{i}, {j}]" for i in range(2) for j in range(3)]
    assert list(table.index) == ["scale", *rows, *columns, *effects]
    assert table.notna().all(axis=None)


def test_summary_describes_the_draws(result: pf.VariationalPosterior) -> None:
    table = result.summary()
    values = result.site_values(result.draws)
    weights = result.log_weights_psis.exp()
    for row, value in (
        ("scale", values["scale"]),
        ("row_effect[1, 0]", values["row_effect"][:, 1, 0]),
        ("effect[1, 2]", values["effect"][:, 1, 2]),
    ):
        value = value.double()
        mean = (weights * value).sum().item()
        sd = math.sqrt((weights * (value - mean).square()).sum().item())
        expected = {
            "mean": value.mean().item(),
            "sd": value.std().item(),
            "q05": value.quantile(0.05).item(),
            "median": value.median().item(),
            "q95": value.quantile(0.95).item(),
            "weighted_mean": mean,
            "weighted_sd": sd,
        }
        assert table.loc[row].to_dict() == pytest.approx(expected, rel=1e-2, abs=1e-2)
        for name in ("mean", "sd", "weighted_mean", "weighted_sd"):
            assert table.loc[row, name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_summary_corrects_a_wrong_guide() -> None:
    """Errors of the weighted mean are about 0.015 deviations; four times that is allowed."""
    table = wrong_posterior(shift=0.3, shrink=0.775).summary().loc[["a", "b[0]", "b[1]"]]
    mean, sd = GAUSSIAN_MEAN.numpy(), GAUSSIAN_SD.numpy()
    assert (abs(table["weighted_mean"] - mean) < 0.06 * sd).all()
    assert (abs(table["weighted_sd"] / sd - 1) < 0.06).all()
    assert (table["sd"] / sd < 0.85).all()


def test_summary_carries_the_verdict(result: pf.VariationalPosterior) -> None:
    attrs = result.summary().attrs
    assert attrs == {**result.scalars(), "verdict": result.verdict}


# Moving


def test_moved_results_stay_the_same(result: pf.VariationalPosterior) -> None:
    moved = result.to("cpu")
    assert moved.scalars() == result.scalars()
    assert torch.equal(moved.losses, result.losses)
    draws, expected = moved.sample(5, seed=1), result.sample(5, seed=1)
    assert all(torch.equal(draws[name], expected[name]) for name in expected)
    torch.testing.assert_close(moved.log_prob(draws), result.log_prob(draws))
    assert torch.equal(result.density(result.draws[:5]), moved.density(result.draws[:5]))
