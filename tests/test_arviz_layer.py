"""The ArviZ layer under either major of ArviZ.

The module is loaded from its file, so that these tests run where torch is not installed.
"""

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr

MODULE_PATH = Path(__file__).parents[1] / "pyroflows" / "arviz.py"


def load_layer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("arviz_layer", MODULE_PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
    layer = load_layer()

az = layer.az
ARVIZ_MAJOR = int(az.__version__.split(".")[0])

DIMS = {
    "theta": ["school"],
    "scales": ["school", "kind"],
    "y": ["school"],
    "pair": ["school", "side"],
    "weights": ["component"],
}
COORDS = {
    "school": ["Deerfield", "Choate", "St. Paul's"],
    "side": ["left", "right"],
    "component": ["small", "middle", "large"],
    "unused": [1, 2, 3, 4],
}
ATTRS: dict[str, Any] = {
    "method": "flow",
    "empty": "",
    "pareto_k": 0.25,
    "missing": math.nan,
    "upper": -math.inf,
    "seed": 42,
    "array_scalar": np.float32(0.5),
    "large_seed": 2**64 - 1,
    "converged": True,
    "numpy_flag": np.bool_(False),
    "note": None,
    "config": {"layers": [1, 2], "scale": np.float64(0.5), "grid": np.arange(2)},
    "long": ["x" * 100] * 1_000,
}
KEPT = ("method", "empty", "pareto_k", "missing", "upper", "seed", "array_scalar")


@pytest.fixture
def groups() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(2, 50, *shape))

    return {
        "posterior": {
            "mu": normal(),
            "theta": normal(3),
            "scales": normal(3, 2),
            "count": rng.poisson(3, size=(2, 50)),
            "weights": rng.dirichlet(np.ones(3), size=(2, 50)),
        },
        "unconstrained_posterior": {"mu": normal(), "theta": normal(3), "weights": normal(2)},
        "sample_stats": {
            "log_weight": normal().astype(np.float32),
            "diverging": rng.random((2, 50)) < 0.5,
        },
        "log_likelihood": {"y": normal(3), "pair": normal(3)},
        "log_prior": {"theta": normal(3), "weights": normal()},
        "posterior_predictive": {"y": normal(3), "pair": normal(3, 2)},
        "prior": {"theta": rng.normal(size=(1, 7, 3))},
        "prior_predictive": {"y": rng.normal(size=(1, 7, 3))},
        "observed_data": {"y": np.array([28.0, 8.0, -3.0]), "pair": np.ones((3, 2))},
        "constant_data": {"sigma": np.array([15, 10, 16]), "total": np.array(41)},
    }


@pytest.fixture
def built(groups: dict[str, dict[str, np.ndarray]]) -> Any:
    return layer.build(groups, dims=DIMS, coords=COORDS, attrs=ATTRS)


def group_names(built: Any) -> set[str]:
    return set(built.groups()) if ARVIZ_MAJOR == 0 else set(built.children)


def as_dataset(built: Any, group: str) -> xr.Dataset:
    return built[group] if ARVIZ_MAJOR == 0 else built[group].to_dataset()


def test_builds_the_container_of_the_installed_arviz(built: Any) -> None:
    assert type(built).__name__ == ("InferenceData" if ARVIZ_MAJOR == 0 else "DataTree")


def test_holds_every_value(built: Any, groups: dict[str, dict[str, np.ndarray]]) -> None:
    assert group_names(built) == set(groups)
    for group, variables in groups.items():
        dataset = as_dataset(built, group)
        assert set(dataset.data_vars) == set(variables)
        for variable, values in variables.items():
            np.testing.assert_array_equal(dataset[variable].values, values)
            assert dataset[variable].dtype == values.dtype


@pytest.mark.parametrize(
    ("group", "variable", "expected"),
    [
        ("posterior", "mu", ("chain", "draw")),
        ("posterior", "theta", ("chain", "draw", "school")),
        ("posterior", "scales", ("chain", "draw", "school", "kind")),
        ("unconstrained_posterior", "theta", ("chain", "draw", "school")),
        ("unconstrained_posterior", "weights", ("chain", "draw", "weights_unconstrained_dim_0")),
        ("posterior_predictive", "pair", ("chain", "draw", "school", "side")),
        ("prior", "theta", ("chain", "draw", "school")),
        ("log_likelihood", "pair", ("chain", "draw", "school")),
        ("log_prior", "weights", ("chain", "draw")),
        ("observed_data", "pair", ("school", "side")),
        ("constant_data", "sigma", ("sigma_dim_0",)),
        ("constant_data", "total", ()),
    ],
)
def test_names_dimensions(built: Any, group: str, variable: str, expected: tuple[str, ...]) -> None:
    assert as_dataset(built, group)[variable].dims == expected


def test_labels_dimensions(built: Any) -> None:
    posterior = as_dataset(built, "posterior")
    assert set(posterior.coords) == {"chain", "draw", "school", "kind", "component"}
    assert posterior["school"].values.tolist() == COORDS["school"]
    assert posterior["kind"].values.tolist() == [0, 1]
    assert posterior["chain"].values.tolist() == [0, 1]
    assert posterior["draw"].values.tolist() == list(range(50))
    assert as_dataset(built, "prior")["draw"].values.tolist() == list(range(7))


def test_labels_draws(groups: dict[str, dict[str, np.ndarray]]) -> None:
    built = layer.build({"posterior": groups["posterior"]}, coords={"chain": [3, 8]})
    assert as_dataset(built, "posterior")["chain"].values.tolist() == [3, 8]


def test_leaves_out_empty_groups_and_needs_no_posterior() -> None:
    built = layer.build({"posterior": {}, "prior": {"mu": np.zeros((1, 3))}}, attrs={"seed": 1})
    assert group_names(built) == {"prior"}
    assert built.attrs == {"seed": 1}


def test_warns_about_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        built = layer.build(
            {
                "posterior": {"mu": np.zeros((5, 2)), "log_likelihood": np.zeros((5, 2))},
                "my_own_group": {"mu": np.zeros((5, 2))},
            }
        )
    assert group_names(built) == {"posterior", "my_own_group"}


def test_leaves_the_arguments_alone(groups: dict[str, dict[str, np.ndarray]]) -> None:
    dims = {"theta": ["school"]}
    coords = {"school": ["a", "b", "c"]}
    attrs = {"converged": True}
    layer.build(groups, dims=dims, coords=coords, attrs=attrs)
    assert dims == {"theta": ["school"]}
    assert coords == {"school": ["a", "b", "c"]}
    assert attrs == {"converged": True}


def assert_attrs(attrs: Any) -> None:
    assert set(attrs) == set(ATTRS)
    for name in KEPT:
        np.testing.assert_equal(attrs[name], ATTRS[name])
    decoded = {name: json.loads(attrs[name]) for name in set(ATTRS) - set(KEPT)}
    assert decoded == {
        "large_seed": 2**64 - 1,
        "converged": True,
        "numpy_flag": False,
        "note": None,
        "config": {"layers": [1, 2], "scale": 0.5, "grid": [0, 1]},
        "long": ["x" * 100] * 1_000,
    }


def test_encodes_attributes(built: Any) -> None:
    assert_attrs(built.attrs)
    assert_attrs(built["posterior"].attrs)
    assert not built["observed_data"].attrs


def test_rejects_attributes_that_json_cannot_hold() -> None:
    with pytest.raises(TypeError, match=r"attrs\['model'\] must be .* got object"):
        layer.build({}, attrs={"model": object()})


@pytest.mark.parametrize(("engine", "library"), [("h5netcdf", "h5py"), ("netcdf4", "netCDF4")])
def test_survives_netcdf(built: Any, tmp_path: Path, engine: str, library: str) -> None:
    pytest.importorskip(library)
    path = str(tmp_path / "fit.nc")
    built.to_netcdf(path, engine=engine)
    read = az.from_netcdf(path, engine=engine)
    assert group_names(read) == group_names(built)
    assert_attrs(read.attrs)
    assert_attrs(read["posterior"].attrs)
    for group in group_names(built):
        before, after = as_dataset(built, group), as_dataset(read, group)
        xr.testing.assert_equal(after, before)
        assert {name: values.dtype for name, values in after.data_vars.items()} == {
            name: values.dtype for name, values in before.data_vars.items()
        }
    read.close()


def test_summary_reads_it(built: Any, groups: dict[str, dict[str, np.ndarray]]) -> None:
    summary = az.summary(built, var_names=["mu", "theta"])
    assert list(summary.index) == ["mu", *(f"theta[{school}]" for school in COORDS["school"])]
    means = [groups["posterior"]["mu"].mean(), *groups["posterior"]["theta"].mean((0, 1))]
    np.testing.assert_allclose(summary["mean"].astype(float), means, atol=0.06)


def test_loo_reads_it(built: Any) -> None:
    result = az.loo(built, var_name="y")
    assert math.isfinite(result.elpd_loo if ARVIZ_MAJOR == 0 else result.elpd)


# What ArviZ makes of it. ArviZ 1 draws without matplotlib too, nothing then.


def plot(name: str, *arguments: Any, **options: Any) -> Any:
    if ARVIZ_MAJOR > 0 and importlib.util.find_spec("matplotlib") is None:
        options["backend"] = "none"
    with warnings.catch_warnings():
        # Of newer releases of pandas and matplotlib, which ArviZ 0.23 does not know.
        warnings.simplefilter("ignore", DeprecationWarning)
        drawn = getattr(az, name)(*arguments, **options)
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")
    return drawn


PLOTS = ["plot_forest", "plot_pair", *(["plot_dist"] if ARVIZ_MAJOR else ["plot_posterior"])]


@pytest.mark.parametrize("name", PLOTS)
def test_plots_draw_posteriors(name: str, built: Any) -> None:
    assert plot(name, built, var_names=["mu", "theta"]) is not None


@pytest.mark.parametrize("group", ["posterior", "prior"])
def test_predictive_checks_draw_it(group: str, built: Any) -> None:
    options: dict[str, Any] = {"var_names": ["y"]}
    if ARVIZ_MAJOR == 0:
        assert plot("plot_ppc", built, group=group, num_pp_samples=5, **options) is not None
    else:
        group = f"{group}_predictive"
        assert plot("plot_ppc_dist", built, group=group, num_samples=5, **options) is not None


@pytest.fixture
def left_out() -> dict[str, Any]:
    """Return two cross-validations of the same three observations."""
    rng = np.random.default_rng(1)
    return {
        name: layer.elpd_data(
            rng.normal(level, 0.1, size=3),
            np.array([0.1, 0.9, level / 10]),
            p=1.5,
            num_draws=100,
            khat_limit=0.5,
            dims=["school"],
            coords=COORDS,
        )
        for name, level in (("worse", -3.0), ("better", -1.0))
    }


def test_cross_validations_are_arviz_own(left_out: dict[str, Any]) -> None:
    one = left_out["better"]
    assert isinstance(one, az.ELPDData)
    pointwise = one["loo_i" if ARVIZ_MAJOR == 0 else "elpd_i"]
    assert one["elpd_loo" if ARVIZ_MAJOR == 0 else "elpd"] == pytest.approx(pointwise.sum().item())
    assert one["se"] == pytest.approx(math.sqrt(3) * pointwise.std().item())
    assert pointwise["school"].values.tolist() == COORDS["school"]
    np.testing.assert_array_equal(one["pareto_k"], [0.1, 0.9, -0.1])
    assert one["warning"]
    assert "100 posterior samples" in str(one)


def test_compare_and_khat_plots_take_cross_validations(left_out: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas; and few observations
        table = az.compare(left_out)
    assert list(table.index) == ["better", "worse"]
    assert plot("plot_khat", left_out["better"]) is not None


def test_compare_takes_it(built: Any, groups: dict[str, dict[str, np.ndarray]]) -> None:
    groups["log_likelihood"] = {"y": groups["log_likelihood"]["y"] - 5}
    worse = layer.build(groups, dims=DIMS, coords=COORDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these likelihoods are noise
        table = az.compare({"worse": worse, "better": built}, var_name="y")
    assert list(table.index) == ["better", "worse"]


@pytest.mark.skipif(ARVIZ_MAJOR == 0, reason="ArviZ 0.23 takes no data there")
def test_calibration_is_where_arviz_looks_for_it() -> None:
    rng = np.random.default_rng(2)
    transforms = {"sbc": rng.random((1, 100, 2)), "tarp": rng.random((1, 100))}
    built = layer.build(
        {"prior_sbc": transforms},
        dims={"sbc": ["parameter"]},
        coords={"parameter": ["theta[0]", "theta[1]"]},
    )
    assert plot("plot_ecdf_pit", built) is not None


@pytest.mark.skipif(ARVIZ_MAJOR == 0, reason="ArviZ 0.23 leaves out by the draws as they are")
def test_loo_of_approximations_reads_it(groups: dict[str, dict[str, np.ndarray]]) -> None:
    rng = np.random.default_rng(3)
    groups["sample_stats"] = {name: rng.normal(size=(2, 50)) for name in ("lp", "log_q")}
    built = layer.build(groups, dims=DIMS, coords=COORDS)
    stats = built["sample_stats"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these likelihoods are noise
        result = az.loo_approximate_posterior(built, stats["lp"], stats["log_q"], var_name="y")
    assert math.isfinite(result.elpd)


ZEROS = np.zeros((2, 5, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"groups": {"posterior": {"mu": np.zeros(5)}}},
            r"'mu' of group 'posterior' has shape \(5,\), expected \(chain, draw, \*shape\)",
        ),
        (
            {"groups": {"posterior": {"mu": ZEROS, "nu": ZEROS[:1]}}},
            r"'nu' of group 'posterior' has \(chain, draw\) = \(1, 5\), expected \(2, 5\)",
        ),
        (
            {"groups": {"posterior": {"mu": ZEROS}, "log_prior": {"mu": ZEROS[:, :4]}}},
            r"'mu' of group 'log_prior' has \(chain, draw\) = \(2, 4\), expected \(2, 5\)",
        ),
        (
            {"groups": {"prior": {"mu": ZEROS}, "prior_predictive": {"y": ZEROS[:1]}}},
            r"'y' of group 'prior_predictive' has \(chain, draw\) = \(1, 5\), expected \(2, 5\)",
        ),
        (
            {"groups": {"posterior": {"mu": ZEROS}}, "dims": {"mu": ["a", "b"]}},
            r"'mu' of group 'posterior' has 1 dimensions to name, .* 2 names for them: \['a', 'b'",
        ),
        (
            {"groups": {"observed_data": {"y": ZEROS}}, "dims": {"y": ["a"]}},
            r"'y' of group 'observed_data' has 3 dimensions to name, .* 1 names",
        ),
        (
            {"groups": {"log_likelihood": {"y": ZEROS}}, "dims": {"y": []}},
            r"'y' of group 'log_likelihood' has 1 dimensions to name, .* 0 names",
        ),
        (
            {"groups": {"observed_data": {"y": ZEROS[0, :3]}}, "dims": {"y": ["a", "a"]}},
            "'y' of group 'observed_data' has repeated dimension names",
        ),
        (
            {"groups": {"posterior": {"mu": ZEROS}}, "dims": {"mu": ["draw"]}},
            "'mu' of group 'posterior' has repeated dimension names",
        ),
        (
            {
                "groups": {"posterior": {"mu": ZEROS, "nu": ZEROS[..., :2]}},
                "dims": {"mu": ["a"], "nu": ["a"]},
            },
            "'nu' of group 'posterior' has length 2 along 'a', expected 3",
        ),
        (
            {
                "groups": {"posterior": {"mu": ZEROS}},
                "dims": {"mu": ["a"]},
                "coords": {"a": [1, 2]},
            },
            "'mu' of group 'posterior' has length 3 along 'a', expected 2",
        ),
        (
            {"groups": {"posterior": {"a": ZEROS}}, "dims": {"a": ["a"]}},
            "'a' of group 'posterior' must not be called like a dimension",
        ),
        (
            {"groups": {"posterior": {"outer/mu": ZEROS}}},
            "group 'posterior' uses the name 'outer/mu', expected no slash",
        ),
        (
            {"groups": {"posterior": {"mu": ZEROS}}, "dims": {"mu": ["outer/plate"]}},
            "'mu' of group 'posterior' uses the name 'outer/plate', expected no slash",
        ),
    ],
)
def test_rejects_arrays_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    groups = arguments.pop("groups")
    with pytest.raises(ValueError, match=message):
        layer.build(groups, **arguments)


def test_needs_neither_torch_nor_the_rest_of_the_package() -> None:
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('arviz_layer', {str(MODULE_PATH)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert not {'torch', 'pyro', 'pyroflows'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
