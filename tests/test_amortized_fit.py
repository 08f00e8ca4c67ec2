"""Fits of amortized guides: the density of whole plates, and what the result can say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyroflows as pf
from pyroflows.svi import training
from pyroflows.svi.plate_density import PlateDensity
from tests.test_amortized_guide import (
    DATA,
    evidence,
    global_posterior,
    hierarchical,
    local_posterior,
    only_local,
    pairs,
    perturbed,
    small,
)

QUICK: dict[str, Any] = {"num_steps": 5, "num_particles": 2, "num_draws": 50, "progress": False}


def several_sites(data: Tensor, batch: int | None = None) -> None:
    """Model data by two local sites of different supports and shapes, in a plate on the left."""
    scale = pyro.sample("scale", dist.LogNormal(data.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(data), subsample_size=batch, dim=-2) as index:
        mean = pyro.sample("mean", dist.Normal(0.0, scale[..., 0]))
        share = pyro.sample("share", dist.Dirichlet(data.new_ones(3)))
        pyro.deterministic("double", 2 * mean)
        with pyro.plate("item", 2, dim=-1):
            loc = mean + share[..., 0]
            pyro.sample("x", dist.Normal(loc, 0.5), obs=data[index].unsqueeze(-1).expand(-1, 2))


MODELS = [hierarchical, only_local, pairs, several_sites]


# The density of the whole plate.


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [None, 3, 8])
def test_log_density_of_the_model_over_all_data(model: Callable, batch: int | None) -> None:
    guide = perturbed(small(model), DATA)
    density = PlateDensity(model, guide, (DATA, batch))
    z = guide.get_posterior(DATA, batch).sample((5,))
    values = density.constrain(z)
    again, log_det = density.unconstrain(values)
    expected = []
    for i in range(5):
        drawn = {name: value[i] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(model, drawn)).get_trace(DATA)
        expected.append(trace.log_prob_sum())
    assert density.vectorized
    torch.testing.assert_close(again, z, atol=1e-4, rtol=1e-4)
    # The density in unconstrained space is that in constrained space times the Jacobian.
    torch.testing.assert_close(density(z) + log_det, torch.stack(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_log_density_of_the_guide_over_all_data(model: Callable) -> None:
    """It is the sum of what a run of the guide records."""
    guide = perturbed(small(model), DATA)
    trace = poutine.trace(guide).get_trace(DATA)
    trace.compute_log_prob()
    latent = [site for name, site in trace.nodes.items() if name.endswith("_latent")]
    density = PlateDensity(model, guide, (DATA,))
    values = {name: trace.nodes[name]["value"].unsqueeze(0) for name in density.sites}
    z, _ = density.unconstrain(values)
    for batch in (None, 3):
        log_q = guide.get_posterior(DATA, batch).log_prob(z)
        expected = sum(site["log_prob"].sum() for site in latent)
        torch.testing.assert_close(log_q[0], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_draws_of_all_data_invert(model: Callable) -> None:
    posterior = perturbed(small(model), DATA).get_posterior(DATA)
    z, log_q = posterior.rsample_and_log_prob((3, 2))
    torch.testing.assert_close(posterior.log_prob(z), log_q, atol=1e-3, rtol=1e-4)
    # The Jacobian of a draw by automatic differentiation.
    noise = posterior.base_dist.sample().double()
    flow = posterior.transform.double()
    flow.embedding = flow.embedding.double()
    jacobian = torch.autograd.functional.jacobian(flow, noise)
    log_det = flow.forward_and_log_det(noise)[1]
    torch.testing.assert_close(jacobian.slogdet().logabsdet, log_det)


def test_draws_agree_with_those_by_minibatches() -> None:
    guide = small(several_sites, init_scale=0.3)
    result = pf.fit(several_sites, guide, (DATA, 3), **QUICK)
    torch.manual_seed(1)
    expected = guide.sample(20_000, DATA, 3)
    draws = result.sample(20_000, seed=2)
    assert draws["double"].shape == (20_000, 8, 1)
    for name, value in expected.items():
        assert draws[name].shape == value.shape
        deviation = value.std(0)
        # Means of 20 000 draws differ by 0.01 sd: a false alarm at five of these once in 10^5 runs.
        assert ((draws[name].mean(0) - value.mean(0)).abs() < 0.05 * deviation).all()
        assert ((draws[name].std(0) / deviation - 1).abs() < 0.1).all()


def test_many_rows_are_mapped_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    guide = perturbed(small(pairs), DATA)
    z = torch.randn(4, 18)
    expected = guide.get_posterior(DATA).log_prob(z)
    monkeypatch.setattr("pyroflows.guides.plate_transform.MAX_ROWS", 12)  # three data at a time
    torch.testing.assert_close(guide.get_posterior(DATA).log_prob(z), expected)


# The fit.


@pytest.fixture(scope="module")
def result() -> pf.VariationalPosterior:
    """Return a fit to minibatches of four."""
    return pf.fit(
        hierarchical, small(), (DATA, 4), num_steps=400, learning_rate=0.02, progress=False
    )


def test_the_evidence_of_a_conjugate_model(result: pf.VariationalPosterior) -> None:
    exact = evidence(DATA)
    error = result.log_evidence_standard_error
    assert result.khat < 0.7
    assert error < 0.01
    # Five standard errors: a false alarm in two million runs.
    assert abs(result.log_evidence - exact) < 5 * error + 1e-4
    assert exact - 0.1 < result.elbo < exact + 5 * result.elbo_standard_error
    assert result.elbo_standard_error < 0.01


def test_weighted_draws_have_the_exact_moments(result: pf.VariationalPosterior) -> None:
    table = result.summary()
    mean, sd = global_posterior(DATA)
    means, local_sd = local_posterior(DATA, mean, sd)
    exact = np.array([mean, *means.tolist()])
    deviations = np.array([sd, *[local_sd] * len(DATA)])
    assert list(table.index) == ["loc", *(f"z[{i}]" for i in range(8))]
    # Means of 10 000 draws are off by 0.01 sd, standard deviations by 0.007 of themselves: at five
    # times as much nine numbers give a false alarm in 10^5 runs.
    assert (np.abs(table["weighted_mean"] - exact) < 0.05 * deviations).all()
    assert (np.abs(table["weighted_sd"] / deviations - 1) < 0.05).all()
    # The noise of minibatches leaves the guide off by a fraction of a standard deviation.
    assert (np.abs(table["mean"] - exact) < 0.5 * deviations).all()
    draws = result.sample(10_000, resample=True, seed=1)
    assert abs(float(draws["loc"].mean()) - mean) < 0.07 * sd  # resampled of resampled


def test_what_the_result_cannot_do_is_refused(
    result: pf.VariationalPosterior, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=r"AmortizedFlow .* cannot be saved: save guide\."):
        result.save(tmp_path / "result")
    assert not (tmp_path / "result").exists()
    with pytest.raises(TypeError, match="must be that of a guide with a transform"):
        pf.neutra(result, progress=False)


def test_what_the_result_offers(result: pf.VariationalPosterior) -> None:
    assert result.draws.shape == (10_000, 9)
    assert len(result.losses) == 400
    assert "k-hat was not computed" not in result.verdict
    assert list(result.to_frame().columns)[:2] == ["loc", "z[0]"]
    values = result.sample(3)
    z, log_det = result.density.unconstrain(values)
    expected = result.guide.get_posterior(DATA).log_prob(z) + log_det
    torch.testing.assert_close(result.log_prob(values), expected)
    assert result.guide.sample(5, torch.tensor([0.0, 3.0]))["z"].shape == (5, 2)
    assert result.loo().khat.shape == (8,)
    data = result.to_arviz()
    assert data["posterior"]["z"].dims == ("chain", "draw", "data")
    assert data["log_likelihood"]["x"].shape == (1, 10_000, 8)
    assert data["posterior_predictive"]["x"].shape == (1, 10_000, 8)
    np.testing.assert_array_equal(data["observed_data"]["x"], DATA)
    resampled = result.to_arviz(resample=True)
    assert float(resampled["sample_stats"]["log_weight"].std()) == 0.0
    assert result.to("cpu").elbo == result.elbo


def test_mass_can_be_covered() -> None:
    options = {**QUICK, "num_steps": 100, "num_draws": 10_000, "learning_rate": 0.02}
    rough = pf.fit(hierarchical, small(), (DATA, 4), **options)
    refined = pf.cover_mass(rough, num_steps=100, progress=False)
    error = refined.log_evidence_standard_error
    assert error < rough.log_evidence_standard_error
    # Five standard errors: a false alarm in two million runs.
    assert abs(refined.log_evidence - evidence(DATA)) < 5 * error


@pytest.mark.parametrize("batch", [None, 3])
def test_plates_on_the_left_and_deterministic_sites(batch: int | None) -> None:
    result = pf.fit(several_sites, small(several_sites), (DATA, batch), **QUICK)
    data = result.to_arviz()
    assert data["posterior"]["double"].shape == (1, 50, 8, 1)
    np.testing.assert_allclose(data["posterior"]["double"], 2 * data["posterior"]["mean"])
    assert data["posterior"]["share"].shape == (1, 50, 8, 1, 3)
    assert data["unconstrained_posterior"]["share"].shape == (1, 50, 8, 1, 2)
    assert data["prior"]["mean"].shape == (1, 1000, 8, 1)
    # All data have the prior scale that was drawn for them, whichever minibatch they were in.
    ratio = data["prior"]["mean"][..., 0] / data["prior"]["scale"][..., :1].to_numpy()
    assert abs(float(ratio.std()) - 1) < 0.05  # 8000 ratios: an error of 0.008
    assert data["prior_predictive"]["x"].shape == (1, 1000, 8, 2)
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "data", "item")
    assert data["log_likelihood"]["x"].shape == (1, 50, 8, 2)
    assert data["observed_data"]["x"].shape == (8, 2)


def test_minibatches_take_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_converged", bool)  # as soon as there are losses to look at
    options = {**QUICK, "num_steps": 100}
    assert len(pf.fit(hierarchical, small(), (DATA, 4), **options).losses) == 100
    assert len(pf.fit(hierarchical, small(), (DATA,), **options).losses) < 100


@pytest.mark.parametrize(("batch", "sizes"), [(None, {2, 4, 8}), (4, {2})])
def test_only_fits_of_all_data_take_more_particles_in_the_end(
    batch: int | None, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss = set(), pf.PathwiseELBO.differentiable_loss

    def spy(elbo: pf.PathwiseELBO, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(elbo.num_particles)
        return loss(elbo, *args, **kwargs)

    monkeypatch.setattr(pf.PathwiseELBO, "differentiable_loss", spy)
    pf.fit(hierarchical, small(), (DATA, batch), **{**QUICK, "num_steps": 12})
    assert seen == sizes


def test_fits_are_reproducible_and_leave_the_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (pf.fit(hierarchical, small(), (DATA, 4), **QUICK) for _ in range(2))
    assert torch.equal(first.draws, second.draws)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_parameters_of_the_model_are_learned_and_those_of_other_guides_left_alone() -> None:
    def model(data: Tensor, batch: int) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(data), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=data[index])

    other = small(model)
    other(DATA, 4)  # fills the param store
    weights = {name: value.clone() for name, value in other.state_dict().items()}
    guide = small(model)
    options = {**QUICK, "num_steps": 200, "num_particles": 4, "learning_rate": 0.02}
    result = pf.fit(model, guide, (DATA, 4), **options)
    # The likeliest is the mean of the data; minibatches leave the noise of a few steps.
    assert abs(pyro.param("loc").item() - DATA.mean()) < 0.3
    assert [p.item() for p in result.density.parameters()] == [pyro.param("loc").item()]
    assert all(torch.equal(value, weights[name]) for name, value in other.state_dict().items())
    assert not torch.equal(guide.state_dict()["local.transform.parts.3.loc"], torch.zeros(1))


def test_float64() -> None:
    result = pf.fit(several_sites, small(several_sites), (DATA.double(), 3), **QUICK)
    assert result.draws.dtype == torch.float64
    assert result.sample(2)["share"].dtype == torch.float64


# Data too many for weights.


def test_without_weights_the_result_says_so() -> None:
    result = pf.fit(hierarchical, small(), (DATA, 4), **QUICK)  # no warning
    assert "k-hat was not computed" in result.verdict
    assert "1000 draws of all 9 latent dimensions" in result.verdict
    assert not result.is_reliable
    scalars = result.scalars()
    for name in ("khat", "ess", "log_evidence", "log_evidence_standard_error"):
        assert math.isnan(scalars[name])
    assert scalars["elbo"] == pytest.approx(result.log_weights.double().mean().item())
    assert scalars["elbo_standard_error"] > 0
    table = result.summary()
    assert table["weighted_mean"].isna().all()
    assert table["mean"].notna().all()
    assert table.attrs["verdict"] == result.verdict
    assert result.to_frame()["log_weight_psis"].isna().all()
    assert result.sample(4)["z"].shape == (4, 8)
    data = result.to_arviz()
    assert data["posterior"]["z"].shape == (1, 50, 8)
    assert np.isnan(data["sample_stats"]["log_weight_psis"]).all()
    assert "nan" in repr(result)
    for method, options in ((result.sample, {"num_samples": 3}), (result.to_arviz, {})):
        with pytest.raises(ValueError, match="without resample=True"):
            method(**options, resample=True)
    with pytest.raises(ValueError, match="take 1000 draws, got 50"):
        result.loo()


def test_draws_are_fewer_for_many_data(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**QUICK, "num_draws": None, "num_steps": 1}
    for entries, number in ((90 * 100, 1000), (0, 20), (10**9, 10_000)):
        monkeypatch.setattr("pyroflows.svi.amortized.MAX_ENTRIES", entries)
        result = pf.fit(hierarchical, small(), (DATA, 4), **options)
        assert result.draws.shape == (number, 9)
        assert result.is_weighted == (not math.isnan(result.khat)) == (number >= 1000)


# Errors.


def test_models_and_options_it_cannot_do() -> None:
    def enumerated(data: Tensor) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            sign = pyro.sample("sign", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z + sign, 0.5), obs=data)

    def fixed(index: Tensor) -> None:
        with pyro.plate("data", len(DATA), subsample=index):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=DATA[index])

    def two_plates() -> None:
        only_local(DATA, 4)
        with pyro.plate("other", 6, subsample_size=2):
            pyro.factor("penalty", torch.zeros(2))

    def unclear(data: Tensor) -> None:
        with pyro.plate("data", len(data), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.deterministic("powers", torch.stack([z, z**2, z**3], -1))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])

    cases: list[tuple[Callable, tuple, dict, str]] = [
        (enumerated, (DATA,), {}, "SVI with TraceEnum_ELBO"),
        (fixed, (torch.tensor([5, 1, 2]),), {}, "fixes 3 of the 8 indices of plate 'data'"),
        (two_plates, (), {}, "plate 'other' is subsampled, 2 of 6"),
        (unclear, (DATA,), {}, "site 'powers' .* give event_dim"),
        (hierarchical, (DATA,), {"initial_temperature": 2.0}, "must be 1 for an AmortizedFlow"),
    ]
    for model, args, options, match in cases:
        with pytest.raises(ValueError, match=match):
            pf.fit(model, small(model), args, **{**QUICK, **options})
    with pytest.raises(TypeError, match=r"or a pf\.AmortizedFlow, got function"):
        pf.fit(hierarchical, hierarchical, (DATA,), **QUICK)


def test_bad_data_are_found_in_whichever_minibatch() -> None:
    def model(data: Tensor) -> None:
        with pyro.plate("data", len(data), subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=data[index])

    counts = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 2.0, -1.0])
    with pytest.raises(ValueError, match="site 'x'"):
        pf.fit(model, small(model), (counts,), **QUICK)


# At length.


@pytest.mark.slow
def test_a_thousand_data_by_minibatches() -> None:
    torch.manual_seed(0)
    data = 2.0 + math.sqrt(1.25) * torch.randn(1000)
    guide = pf.AmortizedFlow(
        hierarchical,
        "data",
        "realnvp",
        num_layers=1,
        global_flow=lambda dim: pf.flow("realnvp", dim, num_layers=1, hidden_dims=(8,)),
    )
    result = pf.fit(hierarchical, guide, (data, 100), num_steps=3000, progress=False)
    assert result.is_weighted
    mean, sd = global_posterior(data)
    means, local_sd = local_posterior(data, mean, sd)
    draws = result.sample(2000)
    assert result.elbo > evidence(data) - 10  # a hundredth of a nat for each datum
    assert ((draws["z"].mean(0) - means).abs() < 0.3 * local_sd).all()
    assert abs(float(draws["loc"].mean()) - mean) < 2 * sd
