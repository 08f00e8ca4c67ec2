"""Results of every kind in ArviZ: their groups and names, and what ArviZ makes of them."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyroflows as pf
from pyroflows.diagnostics import SBC, coverage
from pyroflows.distributions.export import density_to_arviz
from pyroflows.sbi import (
    CorrectedPosterior,
    FlowMatching,
    LikelihoodPosterior,
    Posterior,
    Simulations,
    calibration,
    predictive_check,
    simulate,
)
from pyroflows.svi.density import ModelDensity
from tests.models import TABLE, groups, perturb, realnvp

pytestmark = [
    # What arviz 0.23 uses of newer releases of pandas and matplotlib.
    pytest.mark.filterwarnings("ignore:The inplace keyword"),
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
    # Guides here are not fitted.
    pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution"),
    pytest.mark.filterwarnings("ignore:The learned posterior misses part of the true one"),
]

ARVIZ_1 = os.environ.get("PYROFLOWS_ARVIZ1_PYTHON")
PLACES = ["north", "east", "west"]
SIZES = torch.tensor([1.0, 2.0, 0.5])
X = torch.tensor([0.3, -1.0, 0.2])


def simulator(sizes: Tensor) -> None:
    """Draw a number for each of three places of known size."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("place", 3):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(effect * sizes, 1.0))


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@cache
def variational(seed: int = 0) -> pf.VariationalPosterior:
    """Return the result of a guide that was moved a little instead of fitted."""
    torch.manual_seed(0)
    guide = realnvp(groups)
    density = ModelDensity(groups, guide, (TABLE,))
    perturb(guide)
    return pf.VariationalPosterior.from_guide(density, torch.zeros(1), 200, seed)


@cache
def amortized() -> Posterior:
    estimator = FlowMatching(simulator, args=(SIZES,), width=16, num_blocks=1)
    return estimator.fit(num_simulations=200, num_steps=3, augment=False, progress=False)


@cache
def corrected() -> CorrectedPosterior:
    return amortized().correct(x=X, num_samples=200)


@cache
def simulations() -> Simulations:
    return simulate(simulator, 50, args=(SIZES,), progress=False)


def likelihood() -> LikelihoodPosterior:
    draws = amortized().sample(60, x=X, seed=0)
    return LikelihoodPosterior(draws, -3.0, 0.1, {"x": X}, {"seed": 0}, amortized().joint)


def flow(context_dim: int = 0) -> pf.Flow:
    return pf.Flow(None, pf.flow("realnvp", 2, num_layers=2, context_dim=context_dim))


def rows(size: int = 30) -> Tensor:
    return torch.randn(size, 2, generator=torch.Generator().manual_seed(0))


def names_of(data: Any) -> set[str]:
    return set(data.groups())


# What results of simulators hold


def test_one_observation_has_the_models_names_and_constants() -> None:
    data = amortized().to_arviz(x=X, num_samples=20, seed=0, coords={"place": PLACES})
    assert names_of(data) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    assert data["posterior"]["mean"].dims == ("chain", "draw")
    assert data["posterior"]["effect"].dims == ("chain", "draw", "place")
    assert data["observed_data"]["x"].dims == ("place",)
    assert list(data["posterior"]["effect"].coords["place"].values) == PLACES
    np.testing.assert_array_equal(data["constant_data"]["sizes"], SIZES)


def test_many_observations_are_a_dimension() -> None:
    x = torch.stack([X, -X])
    data = amortized().to_arviz(x=x, num_samples=20, coords={"observation": ["up", "down"]})
    assert data["posterior"]["mean"].dims == ("chain", "draw", "observation")
    assert data["posterior"]["effect"].dims == ("chain", "draw", "observation", "place")
    assert data["sample_stats"]["lp"].dims == ("chain", "draw", "observation")
    assert data["observed_data"]["x"].dims == ("observation", "place")
    np.testing.assert_array_equal(data["observed_data"]["x"].sel(observation="down"), -X)
    grid = amortized().to_arviz(x=x.expand(4, 2, 3), num_samples=5)["posterior"]["mean"]
    assert grid.dims == ("chain", "draw", "observation_dim_0", "observation_dim_1")
    named = amortized().to_arviz(x=x, num_samples=5, dims={"effect": ["somewhere"]})["posterior"]
    assert named["effect"].dims == ("chain", "draw", "observation", "somewhere")


@pytest.mark.parametrize("result", [corrected, likelihood])
def test_draws_given_one_observation_have_the_models_names(result: Callable) -> None:
    data = result().to_arviz(coords={"place": PLACES})
    assert data["posterior"]["effect"].dims == ("chain", "draw", "place")
    assert data["observed_data"]["x"].dims == ("place",)
    np.testing.assert_array_equal(data["constant_data"]["sizes"], SIZES)


def test_simulations_are_prior_and_prior_predictive_draws() -> None:
    data = simulations().to_arviz(x=X, coords={"place": PLACES})
    assert names_of(data) == {"prior", "prior_predictive", "observed_data"}
    np.testing.assert_array_equal(data["prior"]["mean"][0], simulations().parameters["mean"])
    np.testing.assert_array_equal(data["prior_predictive"]["x"][0], simulations().observations["x"])
    assert data["prior_predictive"]["x"].dims == ("chain", "draw", "place")
    assert list(data["prior"]["effect"].coords["place"].values) == PLACES
    np.testing.assert_array_equal(data["observed_data"]["x"], X)
    assert data["observed_data"]["x"].dims == ("place",)
    assert data.attrs["num_invalid"] == 0
    assert names_of(simulations().to_arviz()) == {"prior", "prior_predictive"}
    assert names_of(simulations().to_arviz(x={"x": X})) == names_of(data)


def test_simulations_keep_the_names_of_plates(tmp_path: Path) -> None:
    """Through all that makes simulations of simulations; what is given goes before."""
    whole = simulations()
    whole.save(tmp_path / "simulations")
    several = (
        whole[:5],
        whole.to("cpu"),
        whole.valid(),
        whole.empty(5).fill(slice(0, 5), whole[:5]),
        Simulations.concatenate([whole[:3], whole[3:]]),
        Simulations.load(tmp_path / "simulations"),
        simulate(simulator, 7, args=(SIZES,), batch_size=3, path=tmp_path / "f", progress=False),
    )
    for one in several:
        assert one.to_arviz()["prior"]["effect"].dims == ("chain", "draw", "place")
    data = whole.to_arviz(dims={"effect": ["somewhere"]})
    assert data["prior"]["effect"].dims == ("chain", "draw", "somewhere")
    assert data["prior_predictive"]["x"].dims == ("chain", "draw", "place")


def test_simulations_of_no_known_simulator_number_their_dimensions(tmp_path: Path) -> None:
    from pyroflows import tensor_file

    unknown = Simulations(simulations().parameters, simulations().observations)
    tensors = {"parameters.a": torch.zeros(5, 2), "observations.x": torch.zeros(5)}
    tensor_file.write(tmp_path / "old", "pyroflows.Simulations/1", tensors, {"num_invalid": 0})
    old = Simulations.load(tmp_path / "old")
    assert unknown.to_arviz()["prior"]["effect"].dims == ("chain", "draw", "effect_dim_0")
    assert old.to_arviz()["prior"]["a"].dims == ("chain", "draw", "a_dim_0")


def test_predictive_checks_hold_simulated_data() -> None:
    check = predictive_check(
        simulations().parameters, simulator, x=X, args=(SIZES,), progress=False
    )
    data = check.to_arviz(coords={"place": PLACES})
    assert names_of(data) == {"posterior", "posterior_predictive", "observed_data"}
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "place")
    assert data["posterior"]["effect"].dims == ("chain", "draw", "place")
    assert data["observed_data"]["x"].dims == ("place",)
    other = check.to_arviz(dims={"effect": ["somewhere"]})
    assert other["posterior"]["effect"].dims == ("chain", "draw", "somewhere")
    assert list(check.to_frame().columns) == list(simulations().to_frame().columns)
    az.plot_ppc(data)


# What checks of calibration hold


def test_calibration_is_probability_integral_transforms() -> None:
    checks = calibration(amortized(), simulations(), num_draws=19, num_densities=5, batch_size=50)
    data = checks.to_arviz()
    assert names_of(data) == {"prior_sbc", "ranks"}
    assert set(data["prior_sbc"].data_vars) == {"sbc", "tarp", "coverage"}
    assert data["prior_sbc"]["sbc"].dims == ("chain", "draw", "parameter")
    assert data["prior_sbc"]["sbc"].shape == (1, 50, 4)
    assert list(data["prior_sbc"]["sbc"].coords["parameter"].values) == [*checks.sbc.names]
    one = data["ranks"]["sbc"].sel(parameter="effect[1]")
    np.testing.assert_array_equal(one[0], checks.sbc.ranks[:, 2])
    np.testing.assert_allclose(data["prior_sbc"]["tarp"], (data["ranks"]["tarp"] + 0.5) / 20)
    assert json.loads(data.attrs["num_draws"]) == {"sbc": 19, "tarp": 19, "coverage": 5}
    few = calibration(amortized(), simulations(), num_draws=19, num_densities=0).to_arviz()
    assert set(few["prior_sbc"].data_vars) == {"sbc", "tarp"}


def test_single_checks_convert_too() -> None:
    ranks = torch.arange(20).unsqueeze(-1)
    check = SBC(ranks, 19, ("theta",))
    np.testing.assert_allclose(
        check.to_arviz()["prior_sbc"]["sbc"][0, :, 0], (ranks[:, 0] + 0.5) / 20
    )
    table = check.summary()
    assert table.loc["theta", "mean_pit"] == pytest.approx(0.5)
    assert table.loc["theta", "p_value"] == check.p_values[0].item()
    curve = coverage(torch.zeros(9, 20), torch.zeros(20))
    assert curve.to_arviz()["ranks"]["coverage"].dims == ("chain", "draw")


# What densities hold


@pytest.mark.parametrize("context_dim", [0, 1])
def test_densities_are_compared_with_data(context_dim: int) -> None:
    density, data = flow(context_dim), rows()
    context = torch.linspace(-1.0, 1.0, 30).unsqueeze(-1) if context_dim else None
    converted = density_to_arviz(density, data, context, num_replicates=4, dims=["side"])
    assert converted["posterior_predictive"]["x"].dims == ("chain", "draw", "row", "side")
    assert converted["posterior_predictive"]["x"].shape == (1, 4, 30, 2)
    np.testing.assert_array_equal(converted["observed_data"]["x"], data)
    given = density if context is None else density.condition(context)
    expected = given.log_prob(data).detach()
    for draw in range(4):
        np.testing.assert_allclose(converted["log_likelihood"]["x"][0, draw], expected, rtol=1e-5)
    assert converted.attrs["mean_log_density"] == pytest.approx(expected.mean().item())
    if context is not None:
        np.testing.assert_array_equal(converted["constant_data"]["context"], context)
    with pytest.raises(ValueError, match="num_replicates must be at least 1, got 0"):
        density_to_arviz(density, data, context, num_replicates=0)


def test_replicates_follow_their_contexts() -> None:
    """Means of 400 unit normals, 20 of them: five errors allowed, once in 10^5 seeds too few."""
    density = flow(context_dim=1)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2000, 1, generator=generator)
    data = 3 * context + 0.1 * torch.randn(2000, 2, generator=generator)
    density.fit(data, context, num_steps=150, progress=False)
    chosen = torch.linspace(-1.0, 1.0, 10).unsqueeze(-1)
    converted = density_to_arviz(density, 3 * chosen.expand(10, 2), chosen, num_replicates=400)
    replicates = torch.as_tensor(converted["posterior_predictive"]["x"].values[0])
    exact = density.condition(chosen).sample((4000,))
    error = (replicates.var(0) / 400 + exact.var(0) / 4000).sqrt()
    assert ((replicates.mean(0) - exact.mean(0)).abs() < 5 * error).all()
    assert (replicates.mean(0)[-1] - replicates.mean(0)[0] > 3).all()


def test_replicates_are_reproducible() -> None:
    before = torch.get_rng_state()
    density = flow()
    torch.set_rng_state(before)
    one, same, other = (
        density_to_arviz(density, rows(), seed=seed)["posterior_predictive"]["x"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert (one == same).all()
    assert not (one == other).any()


# Tables


def test_frames_have_a_row_for_each_draw() -> None:
    result = variational()
    table = result.to_frame()
    assert len(table) == 200
    assert {"scale", "effect[1, 2]", "log_weight_psis"} <= set(table.columns)
    np.testing.assert_allclose(table["scale"], result.site_values(result.draws)["scale"])
    assert np.exp(table["log_weight_psis"]).sum() == pytest.approx(1.0)
    restarts = pf.Restarts([result, variational(1)])
    both = restarts.to_frame()
    assert both.index.names == ["restart", "draw"]
    np.testing.assert_array_equal(both.loc[1], variational(1).to_frame())


def test_frames_of_chains() -> None:
    result = variational()
    z, stats = result.draws[:20].reshape(2, 10, -1), torch.zeros(2, 10)
    chains = pf.NeuTraPosterior(result, z, z, stats, stats, {"diverging": stats})
    table = chains.to_frame()
    assert table.index.names == ["chain", "draw"]
    assert table.loc[(1, 3), "scale"] == chains.draws["scale"][1, 3].item()
    np.testing.assert_array_equal(
        table, result.to_frame().iloc[:20].drop(columns="log_weight_psis")
    )


def test_frames_of_simulators() -> None:
    assert list(simulations().to_frame().columns) == [
        *("mean", "effect[0]", "effect[1]", "effect[2]", "x[0]", "x[1]", "x[2]"),
    ]
    one = amortized().to_frame(x=X, num_samples=5, seed=0)
    assert one.index.name == "draw"
    np.testing.assert_array_equal(one["mean"], amortized().sample(5, x=X, seed=0)["mean"])
    many = amortized().to_frame(x=torch.stack([X, -X]), num_samples=5, seed=0)
    assert many.index.names == ["draw", "observation"]
    assert len(many) == 10
    draws = amortized().sample(5, x=torch.stack([X, -X]), seed=0)
    assert many.loc[(3, 1), "effect[2]"] == draws["effect"][3, 1, 2].item()
    assert len(corrected().to_frame()) == 200
    assert list(likelihood().to_frame().columns) == list(one.columns)


def test_summary_of_a_learned_likelihoods_posterior() -> None:
    result = likelihood()
    table = result.summary()
    assert table.loc["effect[1]", "mean"] == pytest.approx(
        result.draws["effect"][:, 1].mean().item()
    )
    assert table.attrs["log_evidence"] == -3.0


# What ArviZ makes of it


@cache
def converted() -> dict[str, Any]:
    return {
        "variational": variational().to_arviz(num_prior_draws=30),
        "resampled": variational().to_arviz(num_prior_draws=30, resample=True),
        "restarts": pf.Restarts([variational(), variational(1)]).to_arviz(num_prior_draws=30),
        "amortized": amortized().to_arviz(x=X, num_samples=50),
        "batch": amortized().to_arviz(x=torch.stack([X, -X]), num_samples=50),
        "corrected": corrected().to_arviz(),
        "likelihood": likelihood().to_arviz(),
        "simulations": simulations().to_arviz(x=X),
        "density": density_to_arviz(flow(), rows(), num_replicates=5),
    }


VARIATIONAL = ("variational", "resampled", "restarts")
WITH_POSTERIOR = (*VARIATIONAL, "amortized", "batch", "corrected", "likelihood")


@pytest.mark.parametrize("name", WITH_POSTERIOR)
def test_arviz_summarises_and_draws_posteriors(name: str) -> None:
    data = converted()[name]
    variables = ["scale"] if name in VARIATIONAL else ["mean"]
    table = az.summary(data, var_names=variables, kind="stats")
    size = 2 if name == "batch" else 1
    assert len(table) == size
    values = data["posterior"][variables[0]].values.reshape(-1, size)
    np.testing.assert_allclose(table["mean"].astype(float), values.mean(0), atol=6e-4)
    other = "row_effect" if name in VARIATIONAL else "effect"
    az.plot_forest(data, var_names=variables)
    az.plot_pair(data, var_names=[*variables, other])


@pytest.mark.parametrize("name", VARIATIONAL)
def test_arviz_leaves_one_out_and_checks_predictions(name: str) -> None:
    data = converted()[name]
    pointwise = az.loo(data, pointwise=True)
    assert pointwise.n_data_points == TABLE.numel()
    assert np.isfinite(pointwise.elpd_loo)
    az.plot_khat(pointwise)
    az.plot_ppc(data, num_pp_samples=10)
    az.plot_ppc(data, group="prior", num_pp_samples=10)
    assert np.isfinite(az.psens(data, component="prior", var_names=["scale"]))


def test_arviz_leaves_points_out_of_corrected_posteriors() -> None:
    data = converted()["corrected"]
    assert names_of(data) == {
        *("posterior", "sample_stats", "log_likelihood", "log_prior"),
        *("observed_data", "constant_data"),
    }
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "place")
    assert data["log_prior"]["effect"].dims == ("chain", "draw", "place")
    pointwise = az.loo(data, pointwise=True)
    assert pointwise.n_data_points == 3
    assert np.isfinite(pointwise.elpd_loo)
    az.plot_khat(pointwise)
    table = az.compare({"by_weights": corrected().loo().to_arviz(), "plain": pointwise})
    assert set(table.index) == {"by_weights", "plain"}


def test_arviz_compares_results() -> None:
    table = az.compare({name: converted()[name] for name in ("resampled", "restarts")})
    assert set(table.index) == {"resampled", "restarts"}


@pytest.mark.parametrize(("name", "group"), [("simulations", "prior"), ("density", "posterior")])
def test_arviz_checks_predictions_of_simulators_and_densities(name: str, group: str) -> None:
    az.plot_ppc(converted()[name], group=group, num_pp_samples=5)


def test_arviz_draws_calibration() -> None:
    check = SBC(torch.arange(100).unsqueeze(-1), 99, ("theta",))
    values = check.to_arviz()["prior_sbc"]["sbc"].values[0, :, 0]
    az.plot_ecdf(values, cdf=lambda x: x, eval_points=np.linspace(0, 1, 20), difference=True)


def test_anything_else_is_refused() -> None:
    assert pf.to_arviz(simulations())["prior"]["mean"].shape == (1, 50)
    with pytest.raises(TypeError, match="result must be what pyroflows returns, got dict"):
        pf.to_arviz({})


# Across major versions

UNDER_ARVIZ_1 = """
import json, sys
import arviz as az
folder = sys.argv[1]
data = az.from_netcdf(f"{folder}/result.nc")
log_p, log_q = (data["sample_stats"][name] for name in ("lp", "log_q"))
by_weights = az.loo_approximate_posterior(data, log_p, log_q, pointwise=True)
az.plot_forest(data, var_names=["scale", "row_effect"], backend="none")
az.plot_pair(data, var_names=["scale", "row_effect"], backend="none")
az.plot_khat(by_weights, backend="none")
az.plot_ppc_dist(data, backend="none")
az.plot_ecdf_pit(az.from_netcdf(f"{folder}/sbc.nc"), backend="none")
data.to_netcdf(f"{folder}/again.nc")
print(json.dumps({
    "version": az.__version__,
    "groups": sorted(data.children),
    "mean": float(az.summary(data, var_names=["scale"], round_to="none")["mean"].iloc[0]),
    "elpd_i": by_weights.elpd_i.values.tolist(),
    "pareto_k": by_weights.pareto_k.values.tolist(),
    "verdict": data.attrs["verdict"],
}))
"""


CORRECTED_UNDER_ARVIZ_1 = """
import json, sys
import arviz as az
data = az.from_netcdf(f"{sys.argv[1]}/corrected.nc")
log_p, log_q = (data["sample_stats"][name] for name in ("lp", "log_q"))
by_weights = az.loo_approximate_posterior(data, log_p, log_q, pointwise=True)
print(json.dumps({
    "version": az.__version__,
    "dims": list(by_weights.elpd_i.dims),
    "elpd_i": by_weights.elpd_i.values.tolist(),
    "pareto_k": by_weights.pareto_k.values.tolist(),
    "of_plain_draws": int(az.loo(data).n_data_points),
}))
"""

needs_arviz_1 = pytest.mark.skipif(
    ARVIZ_1 is None, reason="PYROFLOWS_ARVIZ1_PYTHON names no Python of ArviZ 1"
)


def under_arviz_1(script: str, folder: Path) -> dict[str, Any]:
    """Run a script there; return what it prints last."""
    done = subprocess.run(
        [str(ARVIZ_1), "-W", "ignore", "-c", script, str(folder)],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith("1.")
    return found


@needs_arviz_1
def test_corrected_posteriors_leave_points_out_under_the_other_major(tmp_path: Path) -> None:
    converted()["corrected"].to_netcdf(str(tmp_path / "corrected.nc"))
    found, left_out = under_arviz_1(CORRECTED_UNDER_ARVIZ_1, tmp_path), corrected().loo()
    np.testing.assert_allclose(found["elpd_i"], left_out.elpd_i, atol=1e-3)
    np.testing.assert_allclose(found["pareto_k"], left_out.khat, atol=1e-2)
    assert found["dims"] == ["place"]
    assert found["of_plain_draws"] == 3


@needs_arviz_1
def test_files_open_under_the_other_major(tmp_path: Path) -> None:
    """A result written here, read there, and written back; both leave out by the same weights."""
    result, data = variational(), converted()["variational"]
    data.to_netcdf(str(tmp_path / "result.nc"))
    SBC(torch.arange(100).unsqueeze(-1), 99, ("theta",)).to_arviz().to_netcdf(
        str(tmp_path / "sbc.nc")
    )
    found = under_arviz_1(UNDER_ARVIZ_1, tmp_path)
    assert found["groups"] == sorted(names_of(data))
    assert found["verdict"] == result.verdict
    assert found["mean"] == pytest.approx(float(data["posterior"]["scale"].mean()), rel=1e-3)
    left_out = result.loo()
    np.testing.assert_allclose(found["elpd_i"], left_out.elpd_i, atol=1e-3)
    np.testing.assert_allclose(found["pareto_k"], left_out.khat, atol=1e-2)
    again = az.from_netcdf(str(tmp_path / "again.nc"))
    assert names_of(again) == names_of(data)
    for group in names_of(data):
        for name, values in data[group].data_vars.items():
            np.testing.assert_array_equal(again[group][name].values, values.values)
            assert again[group][name].dims == values.dims
    assert again["posterior"].attrs["pareto_k"] == result.khat
