"""Variational results as ArviZ objects: every group, its names, and its numbers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.svi.density import ModelDensity
from tests.models import (
    HEIGHTS,
    TABLE,
    conjugate,
    gaussian,
    groups,
    mixture,
    one_at_a_time,
    perturb,
    realnvp,
    regression,
    with_supports,
)

X = torch.tensor([0.1, 0.6, 1.0])
Y = torch.tensor([0.3, 1.1, 1.9])
GROUPS = {
    "posterior",
    "unconstrained_posterior",
    "sample_stats",
    "log_likelihood",
    "log_prior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
}
DRAWS, PRIOR_DRAWS = 50, 40


def posterior_of(
    model: Callable, *args: Any, num_draws: int = DRAWS, **kwargs: Any
) -> pf.VariationalPosterior:
    """Return the result of a guide that was moved a little instead of fitted."""
    guide = realnvp(model)
    density = ModelDensity(model, guide, args, kwargs)
    perturb(guide)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(7), num_draws)


def export(model: Callable, *args: Any, **options: Any) -> Any:
    return posterior_of(model, *args).to_arviz(num_prior_draws=PRIOR_DRAWS, **options)


def names_of(data: Any) -> set[str]:
    """Return the names of the groups, under either major of ArviZ."""
    return (
        set(data.groups()) if callable(data.groups) else {g.strip("/") for g in data.groups} - {""}
    )


@pytest.fixture(scope="module")
def result() -> pf.VariationalPosterior:
    """Return a result with two kinds of support, a deterministic site and a plate."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    return posterior_of(regression, X, Y)


@pytest.fixture(scope="module")
def data(result: pf.VariationalPosterior) -> Any:
    return result.to_arviz(num_prior_draws=PRIOR_DRAWS)


def tensor(array: Any) -> Tensor:
    """Return the draws of the only chain."""
    assert array.dims[:2] == ("chain", "draw")
    assert array.sizes["chain"] == 1
    return torch.as_tensor(array.values[0])


# Groups, dimensions, labels


def test_all_groups_are_there(data: Any) -> None:
    assert names_of(data) == GROUPS


def test_groups_hold_their_variables(data: Any) -> None:
    variables = {group: set(data[group].data_vars) for group in GROUPS}
    assert variables == {
        "posterior": {"weights", "sigma", "slope"},
        "unconstrained_posterior": {"weights", "sigma"},
        "sample_stats": {"lp", "log_q", "log_weight", "log_weight_psis"},
        "log_likelihood": {"y"},
        "log_prior": {"weights", "sigma"},
        "posterior_predictive": {"y"},
        "prior": {"weights", "sigma", "slope"},
        "prior_predictive": {"y"},
        "observed_data": {"y"},
        "constant_data": {"x"},
    }


def test_dimensions_are_those_of_the_sites(data: Any) -> None:
    posterior = data["posterior"]
    assert posterior["weights"].dims == ("chain", "draw", "weights_dim_0")
    assert posterior["weights"].shape == (1, DRAWS, 3)
    assert posterior["sigma"].shape == posterior["slope"].shape == (1, DRAWS)
    assert data["prior"]["weights"].shape == (1, PRIOR_DRAWS, 3)
    assert data["unconstrained_posterior"]["weights"].shape == (1, DRAWS, 2)


def test_dimensions_are_named_after_plates(data: Any) -> None:
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive"):
        assert data[group]["y"].dims == ("chain", "draw", "item")
    assert data["observed_data"]["y"].dims == ("item",)
    assert data["observed_data"]["y"].sizes == {"item": 3}


def test_two_plates_give_two_names() -> None:
    data = export(groups, TABLE)
    assert names_of(data) == GROUPS - {"constant_data"}
    posterior = data["posterior"]
    assert posterior["scale"].dims == ("chain", "draw")
    assert posterior["row_effect"].dims[2] == "row"
    assert posterior["row_effect"].shape == (1, DRAWS, 2, 1)
    assert posterior["column_effect"].dims == ("chain", "draw", "column")
    assert posterior["effect"].dims == ("chain", "draw", "row", "column")
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive"):
        assert data[group]["y"].dims == ("chain", "draw", "row", "column")
        assert data[group]["y"].shape[2:] == (2, 3)
    assert data["observed_data"]["y"].dims == ("row", "column")
    assert data["log_prior"]["column_effect"].dims == ("chain", "draw", "column")


def test_models_without_plates() -> None:
    def model(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    data = export(model, Y[:2])
    assert data["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")
    assert data["log_likelihood"]["y"].shape == (1, DRAWS)
    assert data["observed_data"]["y"].dims == ("y_dim_0",)


def test_vectors_in_a_plate() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("row", len(y)):
            weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(weights, 1.0).to_event(1), obs=y)

    data = export(model, TABLE)
    assert data["posterior"]["weights"].dims == ("chain", "draw", "row", "weights_dim_1")
    assert data["unconstrained_posterior"]["weights"].shape == (1, DRAWS, 2, 2)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert data["log_prior"]["weights"].dims == ("chain", "draw", "row")
    assert data["posterior_predictive"]["y"].shape == (1, DRAWS, 2, 3)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)], ids=str)
def test_data_that_a_plate_repeats(shape: tuple[int, ...]) -> None:
    """One datum may stand for a whole plate: its likelihood counts for every place."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.ones(shape)
    data = export(model, y)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "row", "column")
    assert data["log_likelihood"]["y"].shape == (1, DRAWS, 2, 3)
    assert data["observed_data"]["y"].size in (y.numel(), 6)


def test_users_name_dimensions_and_label_them(result: pf.VariationalPosterior) -> None:
    labels = {"item": ["first", "second", "third"], "component": ["a", "b", "c"]}
    data = result.to_arviz(
        num_prior_draws=PRIOR_DRAWS, dims={"weights": ["component"]}, coords=labels
    )
    for group in ("posterior", "prior"):
        assert data[group]["weights"].dims == ("chain", "draw", "component")
        assert list(data[group]["weights"].coords["component"].values) == ["a", "b", "c"]
    assert list(data["observed_data"]["y"].coords["item"].values) == labels["item"]
    assert data["posterior"]["weights"].sel(component="b").shape == (1, DRAWS)


def test_labels_of_the_wrong_length_are_an_error(result: pf.VariationalPosterior) -> None:
    with pytest.raises(ValueError, match="'item'"):
        result.to_arviz(num_prior_draws=PRIOR_DRAWS, coords={"item": ["one", "two"]})


# Numbers


def test_posterior_holds_the_draws(result: pf.VariationalPosterior, data: Any) -> None:
    for name, value in result.site_values(result.draws).items():
        torch.testing.assert_close(tensor(data["posterior"][name]), value)


def test_unconstrained_posterior_holds_the_latent_vectors(
    result: pf.VariationalPosterior, data: Any
) -> None:
    group = data["unconstrained_posterior"]
    rows = [tensor(group[name]).reshape(DRAWS, -1) for name in result.density.sites]
    torch.testing.assert_close(torch.cat(rows, -1), result.draws)


@pytest.mark.parametrize("support", ["simplex", "cholesky", "ordered", "positive"])
def test_unconstrained_shapes_are_their_own(support: str) -> None:
    data = export(with_supports(support, "real"))
    constrained = data["posterior"][support].shape[2:]
    free = data["unconstrained_posterior"][support].shape[2:]
    expected = {
        "simplex": ((3,), (2,)),
        "cholesky": ((3, 3), (3,)),
        "ordered": ((3,), (3,)),
        "positive": ((), ()),
    }
    assert (constrained, free) == expected[support]
    assert "log_likelihood" not in names_of(data)
    assert "observed_data" not in names_of(data)


def test_sample_stats_hold_densities_and_weights(
    result: pf.VariationalPosterior, data: Any
) -> None:
    stats = data["sample_stats"]
    torch.testing.assert_close(tensor(stats["lp"]), result.log_p)
    torch.testing.assert_close(tensor(stats["log_q"]), result.log_q)
    torch.testing.assert_close(tensor(stats["log_weight"]), result.log_p - result.log_q)
    torch.testing.assert_close(tensor(stats["log_weight_psis"]), result.log_weights_psis)
    assert tensor(stats["log_weight_psis"]).exp().sum().item() == pytest.approx(1.0)


def test_log_likelihood_is_that_of_each_datum(data: Any) -> None:
    slope = tensor(data["posterior"]["slope"]).unsqueeze(-1)
    sigma = tensor(data["posterior"]["sigma"]).unsqueeze(-1)
    expected = -0.5 * ((Y - slope * X) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(tensor(data["log_likelihood"]["y"]), expected)


def test_log_prior_is_that_of_each_site(data: Any) -> None:
    sigma = tensor(data["posterior"]["sigma"])
    expected = dist.HalfNormal(1.0).log_prob(sigma)
    torch.testing.assert_close(tensor(data["log_prior"]["sigma"]), expected)
    uniform = torch.full((DRAWS,), math.log(2.0))  # the simplex of three entries has area 1/2
    torch.testing.assert_close(tensor(data["log_prior"]["weights"]), uniform)


def test_prior_and_likelihood_and_jacobian_make_the_joint(
    result: pf.VariationalPosterior, data: Any
) -> None:
    likelihood = tensor(data["log_likelihood"]["y"]).sum(-1)
    prior = sum(tensor(data["log_prior"][name]) for name in ("weights", "sigma"))
    values = {name: tensor(data["posterior"][name]) for name in ("weights", "sigma")}
    _, log_det = result.density.unconstrain(values)
    torch.testing.assert_close(likelihood + prior - log_det, result.log_p, rtol=1e-4, atol=1e-4)


def test_observed_and_constant_data_are_the_arguments(data: Any) -> None:
    np.testing.assert_array_equal(data["observed_data"]["y"].values, Y.numpy())
    np.testing.assert_array_equal(data["constant_data"]["x"].values, X.numpy())


def test_constant_data_may_come_by_keyword() -> None:
    result = posterior_of(regression, y=Y, x=X)
    data = result.to_arviz(num_prior_draws=PRIOR_DRAWS)
    np.testing.assert_array_equal(data["constant_data"]["x"].values, X.numpy())


def test_prior_draws_have_the_moments_of_the_prior() -> None:
    """Five errors of 4000 draws are allowed: one false alarm in 100 000 runs."""
    data = posterior_of(conjugate, HEIGHTS).to_arviz(num_prior_draws=4000)
    mean, y = tensor(data["prior"]["mean"]), tensor(data["prior_predictive"]["y"])
    assert abs(mean.mean().item()) < 5 * 2 / math.sqrt(4000)
    assert abs(mean.std().item() / 2 - 1) < 5 / math.sqrt(8000)
    assert y.mean(0).abs().max() < 5 * math.sqrt(5 / 4000)
    assert (y.std(0) / math.sqrt(5) - 1).abs().max() < 5 / math.sqrt(8000)
    residual = y - mean.unsqueeze(-1)
    assert residual.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (residual.std(0) - 1).abs().max() < 5 / math.sqrt(8000)


def test_posterior_predictive_draws_follow_the_posterior() -> None:
    """Residuals are unit normal; five errors of 8000 are allowed: one false alarm in 10^6 runs."""
    data = posterior_of(conjugate, HEIGHTS, num_draws=2000).to_arviz(num_prior_draws=2)
    mean, y = tensor(data["posterior"]["mean"]), tensor(data["posterior_predictive"]["y"])
    residual = (y - mean.unsqueeze(-1)).flatten()
    assert abs(residual.mean().item()) < 5 / math.sqrt(8000)
    assert abs(residual.std().item() - 1) < 5 / math.sqrt(16_000)
    assert y.std(0).min() > 0.5


def test_predictions_follow_deterministic_sites_in_plates() -> None:
    """Posterior and prior draws of data are unit normal around the deterministic mean.

    5 errors of 6000 numbers allowed, once in 10^6 runs too few.
    """
    data = posterior_of(groups, TABLE, num_draws=1000).to_arviz(num_prior_draws=1000)
    for group, predictive in (
        ("posterior", "posterior_predictive"),
        ("prior", "prior_predictive"),
    ):
        effect = tensor(data[group]["effect"])
        assert effect.shape == (1000, 2, 3)
        rows, columns = tensor(data[group]["row_effect"]), tensor(data[group]["column_effect"])
        torch.testing.assert_close(effect, rows + columns.unsqueeze(1))
        residual = (tensor(data[predictive]["y"]) - effect).flatten()
        assert abs(residual.mean().item()) < 5 / math.sqrt(6000)
        assert abs(residual.std().item() - 1) < 5 / math.sqrt(12_000)


# Attributes


def test_attributes_carry_the_verdict(result: pf.VariationalPosterior, data: Any) -> None:
    for attrs in (data.attrs, data["posterior"].attrs):
        for name, value in result.scalars().items():
            assert attrs[name] == value
        assert attrs["pareto_k"] == result.khat
        assert attrs["verdict"] == result.verdict
        assert attrs["method"] == "AutoRealNVP"
        assert attrs["flow"] == "realnvp"
        assert attrs["num_steps"] == 7
        assert attrs["inference_library"] == "pyroflows"


# Options


def test_resampled_draws_carry_equal_weights(result: pf.VariationalPosterior) -> None:
    data = result.to_arviz(resample=True, num_prior_draws=PRIOR_DRAWS)
    stats = data["sample_stats"]
    assert (tensor(stats["log_weight"]) == 0).all()
    torch.testing.assert_close(tensor(stats["log_weight_psis"]).exp().sum().item(), 1.0)
    assert tensor(stats["log_weight_psis"]).unique().numel() == 1
    sigma = result.site_values(result.draws)["sigma"]
    resampled = tensor(data["posterior"]["sigma"])
    assert torch.isin(resampled, sigma).all()
    assert not torch.equal(resampled, sigma)
    lp = dict(zip(sigma.tolist(), result.log_p.tolist()))
    torch.testing.assert_close(
        tensor(stats["lp"]), torch.tensor([lp[value] for value in resampled.tolist()])
    )


def test_resampling_follows_the_weights() -> None:
    """Counts of 20 000 resampled draws in ten bins against their weights, five errors allowed."""
    result = posterior_of(conjugate, HEIGHTS, num_draws=20_000)
    weights, mean = result.log_weights_psis.exp(), result.draws[:, 0]
    edges = mean.quantile(torch.linspace(0, 1, 11))[1:-1]
    expected = torch.zeros(10).double().index_add(0, torch.bucketize(mean, edges), weights.double())
    data = result.to_arviz(resample=True, num_prior_draws=2)
    resampled = tensor(data["posterior"]["mean"])
    counts = torch.bucketize(resampled, edges).bincount(minlength=10) / 20_000
    errors = (expected * (1 - expected) / 20_000).sqrt()
    assert ((counts - expected).abs() < 5 * errors + 1e-4).all()


def test_exports_are_reproducible_by_seed(result: pf.VariationalPosterior) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        result.to_arviz(num_prior_draws=PRIOR_DRAWS, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for group in ("prior", "prior_predictive", "posterior_predictive"):
        name = next(iter(first[group].data_vars))
        assert (first[group][name] == again[group][name]).all()
        assert not (first[group][name] == other[group][name]).all()


def test_the_function_is_the_method(result: pf.VariationalPosterior) -> None:
    one = pf.to_arviz(result, num_prior_draws=3, seed=5)
    other = result.to_arviz(num_prior_draws=3, seed=5)
    assert one["prior"].equals(other["prior"])
    assert names_of(one) == names_of(other)


# Models of other kinds


def test_models_that_run_for_one_vector_only() -> None:
    with pytest.warns(UserWarning, match="one at a time"):
        result = posterior_of(one_at_a_time, Y, num_draws=12)
    data = result.to_arviz(num_prior_draws=5)
    assert data["prior"]["theta"].shape == (1, 5, 2)
    assert data["prior_predictive"]["y"].shape == (1, 5, 3)
    assert data["posterior_predictive"]["y"].shape == (1, 12, 3)
    theta = tensor(data["posterior"]["theta"])
    expected = dist.Normal(theta[:, :1], theta[:, 1:].exp()).log_prob(Y)
    torch.testing.assert_close(tensor(data["log_likelihood"]["y"]), expected)


def test_enumerated_models_leave_the_likelihood_out() -> None:
    data = export(mixture, HEIGHTS)
    assert names_of(data) == GROUPS - {"log_likelihood", "constant_data"}
    assert set(data["posterior"].data_vars) == {"weight", "means"}
    assert data["posterior_predictive"]["y"].shape == (1, DRAWS, 4)


def test_factors_are_no_data() -> None:
    """A factor has a density but no value: it is neither observed nor predicted."""
    data = export(gaussian)
    assert not names_of(data) & {"observed_data", "posterior_predictive", "prior_predictive"}


def test_arrays_of_pandas_are_constant_data() -> None:
    """Arrays that must not be written to, as recent pandas hands them out."""
    x = X.numpy().copy()
    x.flags.writeable = False

    def model(x: np.ndarray, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(slope * torch.tensor(x), 1.0), obs=y)

    data = export(model, x, Y)
    np.testing.assert_array_equal(data["constant_data"]["x"].values, x)


def test_data_of_the_users_own_type_are_left_alone() -> None:
    def model(options: dict, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, options["scale"]))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    data = export(model, {"scale": 2.0}, Y)
    assert "constant_data" not in names_of(data)


def test_double_precision_is_kept() -> None:
    data = export(conjugate, Y.double())
    assert data["posterior"]["mean"].dtype == np.float64
    assert data["prior"]["mean"].dtype == np.float64


# ArviZ works with it


def test_netcdf_brings_everything_back(result: pf.VariationalPosterior, tmp_path: Path) -> None:
    data = result.to_arviz(num_prior_draws=PRIOR_DRAWS, coords={"item": ["a", "b", "c"]})
    path = tmp_path / "result.nc"
    data.to_netcdf(str(path), engine="h5netcdf")
    again = az.from_netcdf(str(path), engine="h5netcdf")
    assert names_of(again) == GROUPS
    for group in GROUPS:
        for name, variable in data[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, variable.values)
            assert again[group][name].dims == variable.dims
    assert list(again["observed_data"]["item"].values) == ["a", "b", "c"]
    assert again.attrs["verdict"] == result.verdict
    assert again["posterior"].attrs["pareto_k"] == result.khat


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
def test_leave_one_out_runs() -> None:
    data = posterior_of(conjugate, HEIGHTS, num_draws=500).to_arviz(num_prior_draws=2)
    loo = az.loo(data)
    assert loo.n_data_points == 4
    assert math.isfinite(loo.elpd_loo)


def test_summary_runs(data: Any) -> None:
    table = az.summary(data, var_names=["weights", "sigma"], kind="stats")
    assert list(table.index) == ["weights[0]", "weights[1]", "weights[2]", "sigma"]
