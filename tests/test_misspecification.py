"""Outliers among observations: exact false-alarm rates, power, storage."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching
from pyroflows.sbi.densities.outliers import ObservationCheck, OutlierCheck
from pyroflows.sbi.model.observations import ObservationSpace
from tests.simulators import conjugate


def moons(num_rows: int, generator: torch.Generator) -> Tensor:
    """Return points on a thin crescent: far from normal."""
    angle = 3.0 * torch.rand(num_rows, generator=generator)
    radius = 1 + 0.05 * torch.randn(num_rows, generator=generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def curves(num_rows: int, generator: torch.Generator) -> Tensor:
    """Return smooth curves of 200 points: all but three directions are empty."""
    times = torch.linspace(0, 1, 200)
    weights = torch.randn(num_rows, 3, 1, generator=generator)
    basis = torch.stack([torch.ones(200), times.mul(3).sin(), times.square()])
    return (weights * basis).sum(1)


def constant(num_rows: int, generator: torch.Generator) -> Tensor:
    """Return normal features next to a constant one."""
    rows = torch.randn(num_rows, 3, generator=generator)
    rows[:, 1] = 0.7
    return rows


KINDS = {"moons": moons, "curves": curves, "constant": constant}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_simulations", [60, 500, 4000])
def test_p_values_of_the_models_observations_are_uniform(kind: str, num_simulations: int) -> None:
    """Over 20 fits with 50 observations each: a false alarm in 700 runs with a fresh seed.

    The mean share of p-values below .1 is compared with its own standard error.
    """
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(20):
        check = OutlierCheck(KINDS[kind](2, generator).shape[1])
        check.fit(KINDS[kind](num_simulations, generator))
        p_values = check.p_value(KINDS[kind](50, generator))
        shares.append((p_values <= 0.1).float().mean())
    shares = torch.stack(shares)
    assert shares.mean().item() <= 0.1 + 3.4 * shares.std().item() / 20**0.5
    assert shares.mean().item() > 0.06


@pytest.mark.parametrize(
    ("kind", "outside"),
    [
        ("moons", torch.tensor([0.0, 0.3])),  # inside of the curve: no entry is unusual
        ("moons", torch.tensor([3.0, 0.0])),
        ("curves", torch.linspace(0, 1, 200).mul(20).sin()),
        ("curves", torch.randn(200, generator=torch.Generator().manual_seed(1))),
        ("constant", torch.tensor([0.0, 0.9, 0.0])),
    ],
)
def test_what_the_model_cannot_produce_is_found(kind: str, outside: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    check = OutlierCheck(len(outside)).fit(KINDS[kind](5000, generator))
    assert check.p_value(outside) <= 1e-3
    with pytest.warns(UserWarning, match="the observation lies outside of what was simulated"):
        check.warn(outside)


@pytest.mark.parametrize("num_observations", [1, 20, 1000])
def test_false_warnings_are_rare_in_batches_of_any_size(num_observations: int) -> None:
    """One call in 1000 warns, in 300 calls 3 or more with a chance of .4 %."""
    generator = torch.Generator().manual_seed(0)
    num_warnings = 0
    for _ in range(30):
        check = OutlierCheck(2).fit(moons(3000, generator))
        for _ in range(10):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check.warn(moons(num_observations, generator))
            num_warnings += len(caught)
    assert num_warnings <= 2


def test_a_few_outliers_in_a_batch_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    check = OutlierCheck(2).fit(moons(3000, generator))
    features = moons(100, generator)
    features[:5] += 2
    with pytest.warns(UserWarning, match=r"\d of 100 lie outside"):
        check.warn(features)


def test_few_simulations_still_tell_what_is_far_out() -> None:
    generator = torch.Generator().manual_seed(0)
    check = OutlierCheck(2).fit(moons(100, generator))
    with pytest.warns(UserWarning, match="lies outside"):
        check.warn(torch.tensor([30.0, 0.0]))


def test_shapes_of_batches() -> None:
    check = OutlierCheck(2).fit(torch.randn(50, 2))
    for batch in ((), (3,), (2, 3)):
        assert check.p_value(torch.zeros(*batch, 2)).shape == batch


def test_says_nothing_before_a_fit() -> None:
    check = OutlierCheck(2)
    assert torch.equal(check.p_value(torch.full((3, 2), 9.0)), torch.ones(3))
    check.warn(torch.full((2,), 9.0))


@pytest.mark.parametrize("num_simulations", [1, 2, 3])
def test_works_with_hardly_any_simulation(num_simulations: int) -> None:
    check = OutlierCheck(2).fit(torch.randn(num_simulations, 2))
    assert check.p_value(torch.zeros(2)).isfinite()


def test_survives_storage() -> None:
    check = OutlierCheck(2).fit(torch.randn(500, 2))
    features = torch.randn(20, 2)
    other = OutlierCheck(2)
    other.load_state_dict(check.state_dict())
    assert torch.equal(other.p_value(features), check.p_value(features))


# Observations


def sets(num_rows: int, size: int, generator: torch.Generator) -> Tensor:
    """Return sets of normal points around a mean, absent elements NaN."""
    mean = torch.randn(num_rows, 1, 1, generator=generator)
    x = mean + torch.randn(num_rows, 20, 2, generator=generator)
    x[:, size:] = torch.nan
    return x


@pytest.fixture
def of_sets() -> ObservationCheck:
    """Return a check of sets of 2, 5 or 20 elements."""
    generator = torch.Generator().manual_seed(0)
    space = ObservationSpace({"x": torch.Size([20, 2])}, is_set=True, sizes=(2, 20))
    x = torch.cat([sets(2000, size, generator) for size in (2, 5, 20)])
    return ObservationCheck(space).fit(x)


def test_sets_of_several_sizes(of_sets: ObservationCheck) -> None:
    """Of 1200 sets, 60 have p-values below .05 on average, 98 with a chance of 10^-6.

    The share of the 5000 scores behind them adds a standard deviation of 4 sets.
    """
    generator = torch.Generator().manual_seed(1)
    few, some, many = (sets(400, size, generator)[:, :size] for size in (2, 5, 20))
    num_alarms = sum((of_sets.p_value(x) < 0.05).sum() for x in (few, some, many))
    assert num_alarms < 110
    for x in (few, some, many):
        assert (of_sets.p_value(x + 15) <= 1e-3).all()
    assert (of_sets.p_value(4 * many) <= 1e-3).float().mean() > 0.9  # a spread unheard of


def test_the_order_of_a_set_and_absent_elements_do_not_matter(of_sets: ObservationCheck) -> None:
    x = sets(1, 5, torch.Generator().manual_seed(1))[0]
    assert torch.equal(of_sets.p_value(x), of_sets.p_value(x[:5].flip(0)))


def test_missing_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 1, generator=generator) + 0.1 * torch.randn(5000, 3, generator=generator)
    x[torch.rand(5000, 3, generator=generator) < 0.3] = torch.nan
    check = ObservationCheck(ObservationSpace({"x": torch.Size([3])}, missing="random")).fit(x)
    assert check.p_value(torch.tensor([0.5, torch.nan, 0.5])) > 0.05
    assert check.p_value(torch.tensor([0.5, torch.nan, -1.5])) <= 1e-2
    assert check.p_value(torch.tensor([9.0, torch.nan, torch.nan])) <= 1e-3


def test_a_posterior_warns_far_from_its_simulations(tmp_path: Path) -> None:
    estimator = FlowMatching(conjugate, width=16, num_blocks=1)
    posterior = estimator.fit(num_simulations=3000, num_steps=20, progress=False)
    posterior.save(tmp_path / "posterior.safetensors")
    usual, unusual = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([-20.0, 0.0, 20.0])
    for sampled in (posterior, estimator.load(tmp_path / "posterior.safetensors")):
        assert sampled.misspecification(x=usual) > 0.01
        assert sampled.misspecification(x=torch.stack([usual, unusual])).shape == (2,)
        sampled.sample(10, x=usual)
        with pytest.warns(UserWarning, match="the observation lies outside") as caught:
            sampled.sample(10, x=unusual)
        assert caught[0].filename == __file__
