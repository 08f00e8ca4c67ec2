"""The log-density of a model: right, for many vectors at once, whatever the model does."""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import biject_to

from pyroflows.svi.density import ModelDensity
from tests.models import (
    GAUSSIAN_FACTOR,
    GAUSSIAN_MEAN,
    HEIGHTS,
    PRIOR_SD,
    SUPPORTS,
    TABLE,
    conjugate,
    density_of,
    gaussian,
    groups,
    groups_log_joint,
    latent_vectors,
    log_normal,
    mixture,
    mixture_log_joint,
    one_at_a_time,
    one_at_a_time_log_joint,
    over,
    realnvp,
    regression,
    sites_of,
    with_supports,
)

Y = torch.tensor([0.3, 1.1, 1.9])
SLOW = "runs for one at a time"

# name: the log-density of a support's site in unconstrained coordinates, written out.
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "real": lambda z: log_normal(z[:, 0], 1.0, 2.0),
    # Gamma(3, 2) of x = exp(z): 2^3 x^2 exp(-2x) / Gamma(3), times dx/dz = x.
    "positive": lambda z: math.log(8 / 2) + 3 * z[:, 0] - 2 * z[:, 0].exp(),
    # Uniform of width 4: 1/4 times dx/dz = 4 s (1 - s) with s the sigmoid.
    "interval": lambda z: (z[:, 0].sigmoid() * (1 - z[:, 0].sigmoid())).log(),
    "vector": lambda z: log_normal(z, 0.0, 1.0).sum(-1),
    # Sorted by exponential steps from a standard normal vector: z is that vector.
    "ordered": lambda z: log_normal(z, 0.0, 1.0).sum(-1),
}


@pytest.mark.parametrize("support", FORMULAS)
def test_equals_the_formula_in_unconstrained_coordinates(support: str) -> None:
    density = density_of(with_supports(support))
    z = latent_vectors(density, 7)
    torch.testing.assert_close(density(z), FORMULAS[support](z), rtol=1e-4, atol=1e-4)


def volume(support: str, z: Tensor) -> Tensor:
    """Return the log volume change of a support's bijection by its Jacobian matrix.

    A simplex of three entries has two free ones, a correlation factor those below the diagonal.
    """
    site = sites_of(with_supports(support))[support]
    transform = biject_to(site["fn"].support)
    free = {
        "simplex": lambda value: value[:-1],
        "cholesky": lambda value: value[tuple(torch.tril_indices(3, 3, -1))],
    }.get(support, lambda value: value.reshape(-1))
    shape = transform.inverse_shape(site["value"].shape)
    jacobians = [
        torch.autograd.functional.jacobian(lambda r: free(transform(r.reshape(shape))), row)
        for row in z
    ]
    return torch.stack(jacobians).slogdet().logabsdet


@pytest.mark.parametrize("support", SUPPORTS)
def test_is_the_joint_density_times_the_jacobian(support: str) -> None:
    density = density_of(with_supports(support))
    z = latent_vectors(density, 7)
    value = density.constrain(z)[support]
    expected = SUPPORTS[support]().log_prob(value) + volume(support, z)
    torch.testing.assert_close(density(z), expected, rtol=1e-4, atol=1e-4)


def test_sites_add_up() -> None:
    density = density_of(with_supports())
    z = latent_vectors(density, 4)
    parts = {name: density_of(with_supports(name)) for name in SUPPORTS}
    rows = z.split([part.guide.latent_dim for part in parts.values()], -1)
    expected = sum(part(row) for part, row in zip(parts.values(), rows))
    torch.testing.assert_close(density(z), expected, rtol=1e-4, atol=1e-4)


def test_gaussian_equals_its_formula() -> None:
    density = density_of(gaussian)
    z = latent_vectors(density, 7, scale=2.0)
    expected = dist.MultivariateNormal(GAUSSIAN_MEAN, scale_tril=GAUSSIAN_FACTOR).log_prob(z)
    torch.testing.assert_close(density(z), expected)


def test_gradient_equals_that_of_the_formula() -> None:
    density = density_of(conjugate, HEIGHTS)
    z = latent_vectors(density, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(density(z).sum(), z)
    expected = -z / PRIOR_SD**2 + (HEIGHTS - z).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, expected.detach())


# Plates


def no_plates() -> None:
    """Model two numbers, one of which scales the other."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, scale))


def two_inside_each_other(y: Tensor) -> None:
    """Model a table by local variables inside two nested plates."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("row", y.shape[0], dim=-2):
        row = pyro.sample("row_loc", dist.Normal(loc, 1.0))
        with pyro.plate("column", y.shape[1], dim=-1):
            cell = pyro.sample("cell", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(row + cell, 1.0), obs=y)


def vectors_in_a_plate(y: Tensor) -> None:
    """Model a table by simplexes, one a row."""
    with pyro.plate("row", y.shape[0]):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(weights, 1.0).to_event(1), obs=y)


STRUCTURES: dict[str, tuple[Callable, tuple, int]] = {
    "no plates": (no_plates, (), 0),
    "one plate": (conjugate, (Y,), 1),
    "a vector and a plate": (regression, (Y, Y), 1),
    "vectors in a plate": (vectors_in_a_plate, (TABLE,), 1),
    "crossed plates": (groups, (TABLE,), 2),
    "nested plates": (two_inside_each_other, (TABLE,), 2),
    "every support": (with_supports(), (), 0),
    "enumeration": (mixture, (HEIGHTS,), 1),
}


@pytest.fixture(**over(STRUCTURES))
def structure(request: pytest.FixtureRequest) -> tuple[Callable, tuple, int]:
    """Return a model, its arguments and how deep its plates nest."""
    return request.param


def test_many_vectors_at_once_equal_one_by_one(structure: tuple) -> None:
    model, args, nesting = structure
    density = density_of(model, *args)
    assert density.vectorized
    assert density.plate_nesting == nesting
    z = latent_vectors(density, 6)
    together = density(z)
    assert together.shape == (6,)
    density.vectorized = False
    torch.testing.assert_close(together, density(z), rtol=1e-5, atol=1e-4)


def test_one_vector_is_enough(structure: tuple) -> None:
    model, args, _ = structure
    density = density_of(model, *args)
    z = latent_vectors(density, 6)
    torch.testing.assert_close(density(z[:1]), density(z)[:1], rtol=1e-5, atol=1e-4)


def test_crossed_plates_equal_the_formula() -> None:
    density = density_of(groups, TABLE)
    z = latent_vectors(density, 5)
    values = density.constrain(z)
    assert values["row_effect"].shape == (5, 2, 1)
    assert values["column_effect"].shape == (5, 3)
    expected = groups_log_joint(values, TABLE) + values["scale"].log()
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-4)


def test_nested_plates_equal_the_formula() -> None:
    density = density_of(two_inside_each_other, TABLE)
    z = latent_vectors(density, 5)
    values = density.constrain(z)
    loc, row, cell = values["loc"], values["row_loc"], values["cell"]
    expected = (
        log_normal(loc, 0.0, 1.0)
        + log_normal(row, loc[:, None, None], 1.0).sum((1, 2))
        + (2 * cell.log() - cell).sum((1, 2))  # Gamma(2, 1) and its Jacobian
        + log_normal(TABLE, row + cell, 1.0).sum((1, 2))
    )
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-4)


# Models that run for one vector at a time


def converts_to_python(y: Tensor) -> None:
    """Take a latent number out of torch, which many particles do not allow."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    shift = math.sin(mean.item())
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(mean + shift, 1.0), obs=y)


def test_indexing_from_the_left_runs_one_by_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=SLOW):
        density = density_of(one_at_a_time, Y)
    assert not density.vectorized
    z = latent_vectors(density, 5)
    torch.testing.assert_close(density(z), one_at_a_time_log_joint(z, Y))


def test_python_numbers_run_one_by_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=SLOW):
        density = density_of(converts_to_python, Y)
    assert not density.vectorized
    z = latent_vectors(density, 5)
    with torch.no_grad():
        prior = log_normal(z, 0.0, 1.0).sum(-1)
        expected = prior + log_normal(Y, z + z.sin(), 1.0).sum(-1)
        torch.testing.assert_close(density(z), expected)


def test_branches_on_a_latent_run_one_by_one_with_a_warning() -> None:
    """Particles near the branch point take different branches."""

    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        scale = 0.5 if x > 0 else 2.0
        pyro.sample("y", dist.Normal(x, scale), obs=torch.tensor(1.0))

    guide = realnvp(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)}))
    with pytest.warns(UserWarning, match=SLOW):
        density = ModelDensity(model, guide)
    z = torch.tensor([[-1.0], [2.0]])
    expected = log_normal(z[:, 0], 0.0, 1.0)
    expected = expected + log_normal(1.0, z[:, 0], torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(density(z), expected)


def test_a_mean_over_all_particles_is_noticed() -> None:
    """The answers differ silently: a mean over particles is a number like that over entries."""

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(theta.mean(), 0.01), obs=torch.tensor(0.0))

    with pytest.warns(UserWarning, match=SLOW):
        density = density_of(model)
    z = latent_vectors(density, 3)
    expected = log_normal(z, 0.0, 1.0).sum(-1) + log_normal(z.mean(-1), 0.0, 0.01)
    torch.testing.assert_close(density(z), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("method", ["deterministic", "collect"])
def test_sites_of_models_run_one_by_one(method: str) -> None:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("sum", theta[0] + theta[1])
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(theta[0], 1.0), obs=y)

    with pytest.warns(UserWarning, match=SLOW):
        density = density_of(model, Y)
    z = latent_vectors(density, 4)
    if method == "deterministic":
        torch.testing.assert_close(density.deterministic(z), {"sum": z.sum(-1)})
    else:
        log_prob = density.collect(z, "log_prob", density.is_data)
        torch.testing.assert_close(log_prob, {"y": log_normal(Y, z[:, :1], 1.0)})


# Discrete sites


def test_discrete_sites_in_a_plate_are_summed_out() -> None:
    density = density_of(mixture, HEIGHTS)
    assert density.has_enumeration
    z = latent_vectors(density, 6)
    values = density.constrain(z)
    weight = values["weight"]
    expected = mixture_log_joint(values, HEIGHTS) + (weight * (1 - weight)).log()
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-4)


@config_enumerate
def three_regimes(y: Tensor) -> None:
    """Model data by one of three means, the same for all."""
    means = pyro.sample("means", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    regime = pyro.sample("regime", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    index = regime.unsqueeze(-1)
    shape = torch.broadcast_shapes(index.shape[:-1], means.shape[:-1])
    mean = means.expand(*shape, 3).gather(-1, index.expand(*shape, 1))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(mean.squeeze(-1), 1.0), obs=y)


def test_discrete_sites_outside_plates_are_summed_out() -> None:
    density = density_of(three_regimes, Y)
    assert density.vectorized
    z = latent_vectors(density, 6)
    likelihood = log_normal(Y, z.unsqueeze(-1), 1.0).sum(-1)
    prior = log_normal(z, 0.0, 2.0).sum(-1)
    expected = prior + torch.logsumexp(likelihood + torch.tensor([0.5, 0.3, 0.2]).log(), -1)
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-4)


@config_enumerate
def two_discrete_sites(y: Tensor) -> None:
    """Model a table by a discrete site for each row and one for each cell."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("row", y.shape[0], dim=-2):
        shift = pyro.sample("shift", dist.Bernoulli(0.3))
        with pyro.plate("column", y.shape[1], dim=-1):
            sign = pyro.sample("sign", dist.Bernoulli(0.5 + 0.2 * shift))
            pyro.sample("y", dist.Normal(loc * (2 * sign - 1) + shift, 1.0), obs=y)


def test_discrete_sites_at_two_levels_of_plates_are_summed_out() -> None:
    density = density_of(two_discrete_sites, TABLE)
    assert density.vectorized
    z = latent_vectors(density, 4)
    loc = z[:, 0, None, None]
    rows = []
    for shift, probability in ((0.0, 0.7), (1.0, 0.3)):
        signs = torch.tensor([0.5 - 0.2 * shift, 0.5 + 0.2 * shift]).log()
        cells = [
            signs[i] + log_normal(TABLE, sign * loc + shift, 1.0) for i, sign in enumerate((-1, 1))
        ]
        rows.append(math.log(probability) + torch.logaddexp(*cells).sum(-1))
    expected = log_normal(z[:, 0], 0.0, 1.0) + torch.logaddexp(*rows).sum(-1)
    torch.testing.assert_close(density(z), expected, rtol=1e-5, atol=1e-4)


# Masks, factors, subsampling


def test_masked_observations_do_not_count() -> None:
    observed = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)), pyro.poutine.mask(mask=observed):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    for missing in (100.0, math.nan):
        density = density_of(model, torch.tensor([0.3, missing, 1.9]))
        z = latent_vectors(density, 5)
        expected = log_normal(z, 0.0, 1.0).sum(-1) + log_normal(Y[observed], z, 1.0).sum(-1)
        torch.testing.assert_close(density(z), expected)


def test_partly_observed_sites_are_latent_where_missing() -> None:
    observed = torch.tensor([True, False, True])

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y, obs_mask=observed)

    density = density_of(model, Y)
    assert density.vectorized
    z = latent_vectors(density, 5)
    values = density.constrain(z)
    assert set(values) == {"mean", "y_unobserved"}
    completed = torch.where(observed, Y, values["y_unobserved"])
    mean = values["mean"].unsqueeze(-1)
    # What the unobserved site holds where data are is drawn from nothing and counts for nothing.
    expected = log_normal(mean, 0.0, 1.0).sum(-1) + log_normal(completed, mean, 1.0).sum(-1)
    torch.testing.assert_close(density(z), expected)


def test_factors_count() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("bend", -x.square().sum(-1).square())

    density = density_of(model)
    z = latent_vectors(density, 5)
    expected = log_normal(z, 0.0, 1.0).sum(-1) - z.square().sum(-1).square()
    torch.testing.assert_close(density(z), expected)


def test_scaled_sites_count_more() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)), pyro.poutine.scale(scale=3.0):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    density = density_of(model, Y)
    z = latent_vectors(density, 5)
    expected = log_normal(z, 0.0, 1.0).sum(-1) + 3 * log_normal(Y, z, 1.0).sum(-1)
    torch.testing.assert_close(density(z), expected)


def test_a_subsample_of_the_data_stands_for_all() -> None:
    """With equal data every subsample of two gives the likelihood of all six."""

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    density = density_of(model, torch.full((6,), 0.7))
    assert density.vectorized
    z = latent_vectors(density, 5)
    expected = log_normal(z, 0.0, 1.0).sum(-1) + 6 * log_normal(0.7, z, 1.0).sum(-1)
    torch.testing.assert_close(density(z), expected)


def test_subsamples_differ_from_call_to_call() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    density = density_of(model, torch.linspace(-9, 9, 20))
    z = latent_vectors(density, 1)
    assert len({float(density(z)) for _ in range(5)}) > 1


# Constraining and back


@pytest.mark.parametrize("support", SUPPORTS)
def test_unconstrain_inverts_constrain(support: str) -> None:
    density = density_of(with_supports(support))
    z = latent_vectors(density, 7)
    again, log_det = density.unconstrain(density.constrain(z))
    torch.testing.assert_close(again, z, rtol=1e-3, atol=1e-3)
    assert log_det.shape == (7,)
    torch.testing.assert_close(log_det, -volume(support, z), rtol=1e-3, atol=1e-3)


def test_constrain_inverts_unconstrain(structure: tuple) -> None:
    model, args, _ = structure
    density = density_of(model, *args)
    values = density.constrain(latent_vectors(density, 4))
    for name, site in density.sites.items():
        assert values[name].shape == (4, *site["value"].shape)
        assert site["fn"].support.check(values[name]).all()
    again = density.constrain(density.unconstrain(values)[0])
    torch.testing.assert_close(again, values, rtol=1e-3, atol=1e-3)


def test_unconstrain_names_what_is_missing() -> None:
    density = density_of(gaussian)
    with pytest.raises(ValueError, match=r"must hold site 'b', got \['a'\]"):
        density.unconstrain({"a": torch.zeros(2)})


def test_unconstrain_names_the_shape_it_expects() -> None:
    density = density_of(gaussian)
    values = {"a": torch.zeros(2), "b": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"values\['b'\] must have shape \('S', 2\), got \(2, 3\)"):
        density.unconstrain(values)


@pytest.mark.parametrize("scalar", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_unconstrain_needs_a_dimension_of_draws(scalar: Any) -> None:
    density = density_of(conjugate, Y)
    with pytest.raises(ValueError, match="must have shape"):
        density.unconstrain({"mean": scalar})


def test_unconstrain_needs_equally_many_draws_of_all_sites() -> None:
    density = density_of(gaussian)
    with pytest.raises(ValueError, match="'b'"):
        density.unconstrain({"a": torch.zeros(2), "b": torch.zeros(3, 2)})


def test_unconstrain_checks_the_support() -> None:
    density = density_of(with_supports("interval"))
    with pytest.raises(ValueError, match=r"values\['interval'\] leave the support"):
        density.unconstrain({"interval": torch.tensor([0.0, 4.0])})


# Deterministic sites and entries of the trace


def test_deterministic_sites_follow_the_latents() -> None:
    density = density_of(groups, TABLE)
    z = latent_vectors(density, 4)
    values = density.constrain(z)
    effect = density.deterministic(z)["effect"]
    expected = values["row_effect"] + values["column_effect"].unsqueeze(1)
    torch.testing.assert_close(effect, expected)


def test_models_without_deterministic_sites_have_none() -> None:
    density = density_of(conjugate, Y)
    assert density.deterministic(latent_vectors(density, 4)) == {}


def test_deterministic_sites_that_are_constant_repeat() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("constant", torch.tensor([1.0, 2.0]))
        pyro.deterministic("double", 2 * x)

    density = density_of(model)
    z = latent_vectors(density, 4)
    values = density.deterministic(z)
    torch.testing.assert_close(values["constant"], torch.tensor([[1.0, 2.0]]).expand(4, 2))
    torch.testing.assert_close(values["double"], 2 * z[:, 0])


def test_data_are_what_is_observed() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * mean)
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    density = density_of(model, Y)
    data = [name for name, site in density.prototype.nodes.items() if density.is_data(site)]
    assert data == ["y"]


def test_factors_are_not_data() -> None:
    density = density_of(gaussian)
    assert not any(map(density.is_data, density.prototype.nodes.values()))


# What goes wrong at the start


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_data_that_are_not_finite_are_an_error(bad: float) -> None:
    message = "site 'y' is not finite at the start: its value holds 1 NaN or infinite entries"
    with pytest.raises(ValueError, match=message):
        density_of(conjugate, torch.tensor([0.5, bad, 1.0]))


def test_data_outside_the_support_are_an_error() -> None:
    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Exponential(rate), obs=y)

    with pytest.raises(ValueError, match=r"site 'y'"):
        density_of(model, torch.tensor([0.5, -1.0]))


def test_impossible_data_are_an_error() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.full_like(x, -math.inf))

    with pytest.raises(ValueError, match="site 'wall' is not finite at the start"):
        density_of(model)


def test_priors_that_are_nan_are_an_error() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("root", (-1 - x.square()).sqrt())

    with pytest.raises(ValueError, match="site 'root' is not finite at the start"):
        density_of(model)


def test_regions_that_are_not_finite_elsewhere_are_fine() -> None:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("root", (2 - x).sqrt())

    guide = realnvp(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)}))
    density = ModelDensity(model, guide)
    assert density(torch.tensor([[0.0], [3.0]])).isfinite().tolist() == [True, False]


@pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
def test_guides_without_a_latent_vector_are_an_error(guide: Callable) -> None:
    with pytest.raises(TypeError, match=f"AutoContinuous.*got {guide.__name__}"):
        ModelDensity(conjugate, guide(conjugate), (Y,))


def test_pyro_guides_are_accepted() -> None:
    density = ModelDensity(conjugate, AutoMultivariateNormal(conjugate), (Y,))
    z = latent_vectors(density, 5)
    torch.testing.assert_close(density(z), density_of(conjugate, Y)(z))


# Randomness, parameters, precision


def test_check_of_vectorization_leaves_the_random_state_alone() -> None:
    density = density_of(conjugate, Y)
    start = density.guide._init_loc()
    before = torch.get_rng_state()
    assert density._can_vectorize(start)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_leaves_the_random_state_alone() -> None:
    density = density_of(conjugate, Y)
    z = latent_vectors(density, 3)
    before = torch.get_rng_state()
    density(z)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_leaves_no_trace_in_an_outer_program() -> None:
    density = density_of(conjugate, Y)
    z = latent_vectors(density, 3)
    with pyro.poutine.trace() as outer:
        density(z)
        density_of(conjugate, Y)
    assert not outer.trace.nodes


def with_parameters(y: Tensor) -> None:
    """Model data with two parameters to learn, one of them positive."""
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    mean = pyro.sample("mean", dist.Normal(loc, scale))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def test_parameters_of_the_model_are_its_unconstrained_ones() -> None:
    density = density_of(with_parameters, Y)
    loc, scale = density.parameters()
    assert loc is pyro.param("loc").unconstrained()
    assert scale is pyro.param("scale").unconstrained()
    assert float(scale.detach()) == pytest.approx(math.log(2.0))
    assert all(p.is_leaf and p.requires_grad for p in (loc, scale))


def test_gradients_reach_the_parameters_of_the_model() -> None:
    density = density_of(with_parameters, Y)
    z = torch.tensor([[1.5]])
    gradients = torch.autograd.grad(density(z).sum(), density.parameters())
    # d/d loc and d/d log(scale) of the prior's log-density at distance 1 of scale 2.
    torch.testing.assert_close(torch.stack(gradients), torch.tensor([0.25, 0.25 - 1.0]))


def test_updated_parameters_of_the_model_count() -> None:
    density = density_of(with_parameters, Y)
    z = torch.tensor([[1.5]])
    before = density(z)
    with torch.no_grad():
        density.parameters()[0].fill_(1.5)
    torch.testing.assert_close(density(z) - before, torch.tensor([0.125]))


def test_parameters_of_modules_are_the_models_own() -> None:
    network = torch.nn.Linear(1, 1)

    def model(y: Tensor) -> None:
        pyro.module("network", network)
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(network(mean.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    parameters = density_of(model, Y).parameters()
    assert {id(p) for p in parameters} == {id(p) for p in network.parameters()}


def test_models_without_parameters_have_none() -> None:
    assert density_of(conjugate, Y).parameters() == []


def test_computes_in_the_precision_of_the_model() -> None:
    density = density_of(conjugate, Y.double())
    z = latent_vectors(density, 5)
    assert z.dtype == torch.float64
    y = Y.double()
    expected = log_normal(z, 0.0, PRIOR_SD).sum(-1) + log_normal(y, z, 1.0).sum(-1)
    torch.testing.assert_close(density(z), expected, rtol=1e-12, atol=1e-12)


def test_keyword_arguments_reach_the_model() -> None:
    by_keyword = density_of(conjugate, y=Y)
    z = latent_vectors(by_keyword, 5)
    torch.testing.assert_close(by_keyword(z), density_of(conjugate, Y)(z))
