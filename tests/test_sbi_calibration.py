"""Calibration of amortized posteriors: the checks in one call, and that the defaults pass them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pyroflows.sbi import FlowMatching, Simulations, calibration, simulate
from tests.simulators import conjugate, two_moons


class Exact:
    """Sample the posterior of the mean of three points, or one with an error."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def normal(self, x: Mapping[str, Tensor]) -> torch.distributions.Normal:
        return torch.distributions.Normal(x["x"].sum(-1) / 4, self.scale / 2)

    def sample(self, num_draws: int, *, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": self.normal(x).sample((num_draws,))}

    def log_prob(self, values: Mapping[str, Tensor], *, x: Mapping[str, Tensor]) -> Tensor:
        return self.normal(x).log_prob(values["mean"])


@pytest.fixture(scope="module")
def fresh() -> Simulations:
    return simulate(conjugate, 1000, seed=1, progress=False)


def test_an_exact_posterior_passes(fresh: Simulations) -> None:
    """Fails by chance once in 100 runs with a fresh seed."""
    result = calibration(Exact(), fresh, num_draws=200)
    assert result.passes(0.01)
    assert list(result.summary().index) == ["sbc mean", "tarp", "coverage"]


@pytest.mark.parametrize("scale", [0.7, 1.4])
def test_every_check_finds_a_posterior_of_the_wrong_width(scale: float, fresh: Simulations) -> None:
    result = calibration(Exact(scale), fresh, num_draws=200)
    assert not result.passes(0.01)
    assert (result.summary()["p_value"] < 0.01).all()
    assert result.coverage is not None
    assert (result.coverage.atc > 0) == (scale > 1)


def test_the_density_can_be_left_out(fresh: Simulations) -> None:
    result = calibration(Exact(), fresh, num_draws=50, num_densities=0)
    assert result.coverage is None
    assert list(result.summary().index) == ["sbc mean", "tarp"]


def test_the_seed_determines_all_but_not_the_batches(fresh: Simulations) -> None:
    state = torch.get_rng_state()
    one, other = (calibration(Exact(), fresh[:100], num_draws=20, seed=2) for _ in range(2))
    assert torch.equal(one.sbc.ranks, other.sbc.ranks)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrong", [{"num_draws": 0}, {"num_densities": -1}, {"batch_size": 0}], ids=str
)
def test_impossible_numbers_are_refused(wrong: dict[str, int], fresh: Simulations) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        calibration(Exact(), fresh, **wrong)


def test_no_simulations_are_refused(fresh: Simulations) -> None:
    with pytest.raises(ValueError, match="num_simulations must be at least 1, got 0"):
        calibration(Exact(), fresh[:0])


def test_simulations_of_another_model_are_refused(fresh: Simulations) -> None:
    other = Simulations({"theta": torch.randn(50)}, fresh[:50].observations)
    with pytest.raises(ValueError, match=r"must draw site 'theta', it draws \['mean'\]"):
        calibration(Exact(), other, num_densities=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options"), [(conjugate, {}), (two_moons, {"parameters": ["theta"]})]
)
def test_the_defaults_are_calibrated(model: Callable, options: dict[str, Any]) -> None:
    """Each of SBC, TARP and coverage at 1 %: an exact posterior fails once in 33 fresh seeds."""
    posterior = FlowMatching(model, **options).fit(num_simulations=10_000, seed=0, progress=False)
    fresh = simulate(model, 1000, seed=1, progress=False, **options)
    result = calibration(posterior, fresh, num_draws=1000)
    print(result.summary())
    assert result.sbc.passes(0.01)
    assert result.tarp.passes(0.01)
    assert result.coverage is not None
    assert result.coverage.passes(0.01)
