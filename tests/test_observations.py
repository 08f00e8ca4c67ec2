"""Observations: missing values, sets of any size, series, several sites, errors."""

import itertools
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, NeuralPosterior, Posterior, SeriesEmbedding, simulate
from pyroflows.sbi.densities.preconditioner import LinearGaussian
from pyroflows.sbi.model.exchangeable import exchangeable_sites
from pyroflows.sbi.model.masking import Masking
from pyroflows.sbi.model.observations import ObservationSpace, Standardizer
from tests.simulators import conjugate, slcp, two_moons

DESIGN = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.5, -1.0]])
SMALL = {"flow": "maf", "num_layers": 2, "hidden_dims": (32,)}


def linear() -> None:
    """Draw three noisy linear functions of two parameters."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(theta @ DESIGN.T, 0.5).to_event(1))


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of the parameters of `linear` given entries that are not NaN."""
    seen = ~x.isnan()
    design = DESIGN[seen]
    covariance = torch.linalg.inv(torch.eye(2) + 4 * design.T @ design)
    return 4 * covariance @ design.T @ x[seen], covariance


def group_and_global() -> None:
    """Draw points around a mean, and one more reading of the mean from outside the plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("reading", dist.Normal(mean, 0.5))
    with pyro.plate("points", 6):
        pyro.sample("x", dist.Normal(mean, 1.0))


def counts() -> None:
    """Draw counts whose rate has a gamma prior: the posterior is a gamma distribution."""
    rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
    with pyro.plate("points", 5):
        pyro.sample("x", dist.Poisson(rate))


def space(
    model: Callable, observed: tuple[str, ...] = ("x",), **options: object
) -> ObservationSpace:
    return ObservationSpace.of_model(model, observed).of_training(
        options.get("missing"), options.get("min_size")
    )


# Missing values


@pytest.fixture(scope="module")
def any_subset() -> Posterior:
    return FlowMatching(linear, missing="random", width=32, num_blocks=1).fit(
        num_simulations=10_000, num_steps=200, batch_size=128, augment=False, progress=False
    )


@pytest.mark.parametrize("seen", [*itertools.product([True, False], repeat=3)])
def test_the_posterior_given_any_subset_of_entries_is_exact(
    any_subset: Posterior, seen: tuple[bool, ...]
) -> None:
    """Draws and simulations add errors of .02 each; the rest is that of the training."""
    x = torch.tensor([1.2, 0.7, -0.8]).where(torch.tensor(seen), torch.nan)
    draws = any_subset.sample(4000, x=x, seed=0)["theta"]
    mean, covariance = exact(x)
    scale = covariance.diagonal().sqrt()
    assert ((draws.mean(0) - mean) / scale).abs().max() < 0.12
    assert (draws.std(0) / scale - 1).abs().max() < 0.08
    assert (torch.corrcoef(draws.T)[0, 1] - covariance[0, 1] / scale.prod()).abs() < 0.08


def test_a_batch_may_miss_something_else_in_each_row(any_subset: Posterior) -> None:
    x = torch.tensor([[1.0, torch.nan, 0.5], [torch.nan, 0.3, torch.nan]])
    batch = any_subset.log_prob({"theta": torch.zeros(2)}, x=x)
    alone = [any_subset.log_prob({"theta": torch.zeros(2)}, x=row) for row in x]
    torch.testing.assert_close(batch, torch.stack(alone))


def test_simulators_can_say_what_is_missing() -> None:
    """Values above 1 are never seen: a missing value is news, its parameters are large."""

    def censored() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        x = pyro.sample("clean", dist.Normal(theta, 0.5))
        pyro.deterministic("x", torch.where(x > 1, torch.nan, x))

    estimator = NeuralPosterior(censored, parameters=["theta"], missing="simulated", **SMALL)
    posterior = estimator.fit(num_simulations=10_000, num_steps=600, augment=False, progress=False)
    grid = torch.linspace(-5, 5, 2001)
    density = dist.Normal(0, 1).log_prob(grid).exp() * (
        1 - dist.Normal(grid, 0.5).cdf(torch.ones(1))
    )
    expected = (grid * density).sum() / density.sum()
    draws = posterior.sample(4000, x=torch.tensor(torch.nan), seed=0)["theta"]
    assert draws.mean() == pytest.approx(expected.item(), abs=0.12)
    draws = posterior.sample(4000, x=torch.tensor(-1.0), seed=0)["theta"]
    assert draws.mean() == pytest.approx(-0.8, abs=0.12)


def test_masks_are_random_in_training_and_frozen_in_validation() -> None:
    masking = Masking(space(linear, missing="random"))
    x = torch.randn(5000, 3)
    frozen = masking.frozen(x, 3)
    assert torch.equal(frozen.isnan(), masking.frozen(x, 3).isnan())
    assert not torch.equal(frozen.isnan(), masking.frozen(x, 4).isnan())
    assert not torch.equal(masking.batch(x).isnan(), masking.batch(x).isnan())
    patterns = frozen.isnan().unique(dim=0, return_counts=True)[1]
    assert len(patterns) == 8
    # A pattern of one or two missing of three has the share .8 / 12; the count is 5 errors off.
    assert patterns.min() > 5000 * 0.8 / 12 - 5 * 18


def test_the_same_state_of_the_generator_gives_the_same_masks() -> None:
    masking = Masking(space(slcp, missing="random", min_size=2))
    x = torch.randn(20, 4, 2)
    masks = []
    for _ in range(2):
        torch.manual_seed(7)
        masks.append(masking.batch(x))
    torch.testing.assert_close(*masks, rtol=0, atol=0, equal_nan=True)


def test_what_all_elements_share_is_missing_from_all() -> None:
    x = space(group_and_global, ("x", "reading"), missing="random").tensor(
        {"x": torch.randn(500, 6), "reading": torch.randn(500)}
    )
    masked = Masking(space(group_and_global, ("x", "reading"), missing="random")).batch(x)
    shared = masked[..., 1].isnan()
    assert torch.equal(shared, shared[:, :1].expand(-1, 6))
    assert 0.2 < shared.float().mean() < 0.6


# Sets of any size


@pytest.fixture(scope="module")
def any_size() -> Posterior:
    return NeuralPosterior(conjugate, args=(30,), min_size=1, **SMALL).fit(
        num_simulations=10_000, num_steps=300, batch_size=256, augment=False, progress=False
    )


@pytest.mark.parametrize("number", [1, 3, 10, 30])
def test_one_training_serves_sets_of_any_size(any_size: Posterior, number: int) -> None:
    """The posterior of a mean given n points has mean n / (n + 1) x and variance 1 / (n + 1)."""
    torch.manual_seed(number)
    mean = torch.randn(20)
    x = mean.unsqueeze(-1) + torch.randn(20, number)
    draws = any_size.sample(2000, x=x, seed=0)["mean"]
    scale = (number + 1) ** -0.5
    error = (draws.mean(0) - x.sum(-1) / (number + 1)) / scale
    assert error.square().mean().sqrt() < 0.15
    assert (draws.std(0) / scale - 1).abs().mean() < 0.1


def test_sets_of_a_conjugate_model_are_solved_before_any_training() -> None:
    posterior = FlowMatching(conjugate, args=(100,), min_size=1).fit(
        num_simulations=20_000, num_steps=1, learning_rate=1e-8, progress=False
    )
    for number in (1, 10, 100):
        scale = (number + 1) ** -0.5
        points = torch.linspace(-2, 2, 50) * scale
        x = torch.full((number,), 0.5)
        centre = 0.5 * number / (number + 1)
        log_prob = posterior.log_prob({"mean": centre + points}, x=x)
        difference = log_prob - dist.Normal(centre, scale).log_prob(centre + points)
        assert difference.abs().max() < 0.25


def test_sizes_outside_of_training_raise_a_warning(any_size: Posterior) -> None:
    with pytest.warns(
        UserWarning, match="x holds 31 elements of the plate, trained was on 1 to 30"
    ):
        any_size.sample(1, x=torch.zeros(31))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        any_size.sample(1, x=torch.zeros(30))
    fixed = ObservationSpace.of_model(conjugate, ("x",)).of_training(None, None)
    with pytest.warns(UserWarning, match="x holds 2 elements of the plate, trained was on 3"):
        fixed.tensor(torch.zeros(2))


def test_training_sizes_are_log_uniform() -> None:
    masking = Masking(space(lambda: conjugate(8), min_size=1))
    x = torch.randn(8000, 8, 1)
    sizes = (~masking.frozen(x, 0).isnan()).sum((1, 2))
    expected = torch.arange(2, 10).log().sub(torch.arange(1, 9).log()) / np.log(9)
    shares = torch.bincount(sizes, minlength=9)[1:] / 8000
    assert (shares - expected).abs().max() < 5 * 0.5 / 8000**0.5
    assert {masking.batch(x).shape[1] for _ in range(200)} == {*range(1, 9)}


# Structure


def test_covariates_and_local_parameters_are_not_exchangeable() -> None:
    def regression() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 4):
            pyro.sample("x", dist.Normal(slope * torch.arange(4.0), 1.0))

    def hierarchy() -> None:
        with pyro.plate("groups", 4):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(mean, 1.0))

    def covariates_of_a_computed_site() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 4):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.deterministic("x", slope * torch.arange(4.0) + noise)

    def ring() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 6):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.deterministic("x", mean + noise + 0.5 * noise.roll(1))

    def nested() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
            pyro.sample("x", dist.Normal(mean, 1.0))

    assert exchangeable_sites(regression, ["x"]) == set()
    assert exchangeable_sites(hierarchy, ["x"], ["mean"]) == set()
    assert exchangeable_sites(hierarchy, ["x"]) == {"x"}  # the means are noise
    assert exchangeable_sites(covariates_of_a_computed_site, ["x"], ["slope"]) == set()
    assert exchangeable_sites(ring, ["x"], ["mean"]) == set()  # neighbours are alike
    assert exchangeable_sites(nested, ["x"], ["mean"]) == set()
    assert exchangeable_sites(two_moons, ["x"]) == set()
    assert exchangeable_sites(slcp, ["x"], ["theta"]) == {"x"}


def test_a_black_box_in_a_plate_is_believed() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 4):
            noise = np.random.normal(size=4)  # noqa: NPY002
            pyro.deterministic("x", mean + torch.as_tensor(noise, dtype=mean.dtype))

    assert exchangeable_sites(model, ["x"], ["mean"]) == {"x"}


def test_several_sites_in_one_plate_are_one_set() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("points", 4):
            pyro.sample("x", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(mean, 1.0).expand([2]).to_event(1))

    found = space(model, ("x", "y"))
    assert (found.is_set, found.size, found.common_size) == (True, 3, 0)
    x, y = torch.randn(5, 4), torch.randn(5, 4, 2)
    torch.testing.assert_close(
        found.tensor({"y": y, "x": x}), torch.cat([x.unsqueeze(-1), y], -1), rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="must have the same number of elements, got"):
        found.tensor({"x": torch.zeros(3), "y": torch.zeros(4, 2)})


def test_several_vectors_are_one_vector() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([2, 3]).to_event(2))

    found = space(model, ("x", "y"))
    assert (found.is_set, found.size) == (False, 7)
    assert found.tensor({"x": torch.zeros(5), "y": torch.zeros(5, 2, 3)}).shape == (5, 7)
    with pytest.raises(ValueError, match="must have the same batch shape, got x of"):
        found.tensor({"x": torch.zeros(4), "y": torch.zeros(5, 2, 3)})
    with pytest.raises(ValueError, match=r"x must be a dict with the sites \('x', 'y'\)"):
        found.tensor(torch.zeros(7))


def test_a_set_and_a_site_outside_its_plate() -> None:
    """Both count: precisions 1 of the prior, 4 of the reading and n of the points add up."""
    posterior = NeuralPosterior(group_and_global, ("x", "reading"), min_size=1, **SMALL).fit(
        num_simulations=10_000, num_steps=300, batch_size=256, augment=False, progress=False
    )
    for number in (1, 6):
        x = {"x": torch.full((number,), 0.4), "reading": torch.tensor(1.0)}
        draws = posterior.sample(4000, x=x, seed=0)["mean"]
        precision = 5 + number
        scale = precision**-0.5
        expected = (4 * 1.0 + number * 0.4) / precision
        assert abs(draws.mean() - expected) / scale < 0.2
        assert abs(draws.std() / scale - 1) < 0.1


def test_counts() -> None:
    posterior = FlowMatching(counts, min_size=1, width=32, num_blocks=1).fit(
        num_simulations=10_000, num_steps=500, batch_size=128, augment=False, progress=False
    )
    x = torch.tensor([2, 6, 3, 1, 5])
    for number in (1, 5):
        draws = posterior.sample(4000, x=x[:number], seed=0)["rate"]
        exact = dist.Gamma(3.0 + x[:number].sum(), 1.0 + number)
        assert abs(draws.mean() - exact.mean) / exact.stddev < 0.2
        assert abs(draws.std() / exact.stddev - 1) < 0.15


# Series


def test_an_embedding_of_a_long_series_does_not_spoil_the_regression() -> None:
    """500 times and 400 simulations: the level of white noise, known to a standard error of .1."""

    def series() -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        noise = dist.Normal(0.0, 5**0.5).expand([500, 1]).to_event(2)
        pyro.deterministic("x", level[..., None, None] + pyro.sample("noise", noise), event_dim=2)

    posterior = NeuralPosterior(
        series,
        parameters=["level"],
        embedding=SeriesEmbedding((500, 1), 4, width=4),
        missing="random",
        **SMALL,
    ).fit(num_simulations=400, num_steps=1, learning_rate=1e-8, progress=False)
    simulations = simulate(series, 50, parameters=["level"], seed=1, progress=False)
    x, level = simulations.observations["x"], simulations.parameters["level"]
    draws = posterior.sample(200, x=x, seed=0)["level"]
    z = (draws.mean(0) - level) / draws.std(0)
    assert draws.std() > 0.5
    assert (draws.mean(0) - level).square().mean().sqrt() < 0.5
    assert 0.5 < z.square().mean().sqrt() < 1.5


# Regression and scales


@pytest.mark.parametrize(("number", "size"), [(300, 2), (300, 100), (300, 1000), (40, 600)])
def test_whitened_parameters_of_new_rows_have_unit_scale(number: int, size: int) -> None:
    """Whatever the number of useless features; 2000 new rows add an error of .03 each."""
    torch.manual_seed(0)
    features, new = torch.randn(number, size), torch.randn(2000, size)
    z, new_z = (rows[:, :2] + 0.5 * torch.randn(len(rows), 2) for rows in (features, new))
    linear = LinearGaussian(2, size).fit(z, features)
    w = linear.whiten(new_z, new)
    assert ((w.square().mean(0)).sqrt() - 1).abs().max() < (0.15 if number > 100 else 0.4)
    assert new_z.std(0).max() * 1.1 > (new_z - linear.colour(0 * w, new)).std(0).max()


def test_the_regression_follows_a_scale_that_varies() -> None:
    torch.manual_seed(0)
    features = torch.randn(20_000, 2)
    scale = (0.3 + features[:, 1:]).exp()
    z = features[:, :1] + scale * torch.randn(20_000, 1)
    linear = LinearGaussian(1, 2, num_scaling=1).fit(z, features)
    grid = torch.tensor([[0.0, -2.0], [0.0, 0.0], [0.0, 2.0]])
    expected = 0.3 + grid[:, 1]
    torch.testing.assert_close(linear.log_abs_det_jacobian(grid), expected, rtol=0, atol=0.06)
    w = linear.whiten(z, features)
    torch.testing.assert_close(linear.colour(w, features), z, rtol=1e-4, atol=1e-4)


def test_scales_ignore_what_is_missing() -> None:
    x = torch.randn(1000, 3)
    hidden = x.clone()
    hidden[:500, 0] = torch.nan
    hidden[:, 2] = torch.nan
    standard = Standardizer(3).fit(hidden)
    alone = Standardizer(1).fit(x[500:, :1])
    torch.testing.assert_close(standard.loc[:1], alone.loc)
    torch.testing.assert_close(standard.scale[:1], alone.scale)
    assert torch.equal(standard(hidden).isnan(), hidden.isnan())
    assert standard(x).isfinite().all()


def test_scales_of_long_series_are_read() -> None:
    x = torch.rand(1, 20_000).expand(900, -1)  # more numbers than torch can sort
    assert Standardizer(20_000).fit(x).scale.isfinite().all()


# Errors


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(0), ValueError, "x must hold at least one element of the plate, got none"),
        (torch.tensor([1.0, torch.nan]), ValueError, "must be finite, got NaN or inf in x; where"),
        (torch.tensor([1.0, torch.inf]), ValueError, "must be finite, got NaN or inf in x"),
        (torch.tensor(1.0), ValueError, r"'x' has shape \(3,\), got x of shape \(\)"),
        ({"y": torch.zeros(3)}, ValueError, r"must hold the observed site 'x', got \['y'\]"),
        ("abc", TypeError, "'x' must be a tensor or array, got str"),
    ],
)
def test_wrong_observations_are_refused(x: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ObservationSpace.of_model(conjugate, ("x",)).tensor(x)


def test_infinity_is_never_missing() -> None:
    with pytest.raises(ValueError, match="'x' must be finite or NaN, got inf in x"):
        space(linear, missing="random").tensor(torch.tensor([1.0, torch.inf, torch.nan]))


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"missing must be one of .*, got 'yes'"):
        FlowMatching(linear, missing="yes")
    with pytest.raises(ValueError, match="min_size needs observed sites in a plate of exchangeab"):
        FlowMatching(linear, min_size=1)
    for size in (0, 4):
        message = f"at least 1 and at most the size of the plate, 3, got {size}"
        with pytest.raises(ValueError, match=message):
            FlowMatching(conjugate, min_size=size)


def test_nan_by_the_simulator_is_not_taken_for_chance() -> None:
    simulations = simulate(linear, 200, progress=False)
    simulations.observations["x"][3, 1] = torch.nan
    estimator = NeuralPosterior(linear, missing="random", **SMALL)
    with pytest.raises(ValueError, match="must be finite with missing='random', got NaN"):
        estimator.fit(simulations, num_steps=1, progress=False)
