"""Calibration of variational fits: exact guides pass, those that are wrong on purpose do not."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyroflows.diagnostics import symmetry_p_values
from pyroflows.svi.calibration import VariationalCalibration, calibration
from tests.models import conjugate, gaussian, mixture, realnvp

Y = torch.zeros(4)
EXACT = {"num_steps": 1, "num_draws": 1000, "progress": False}
FEW = {**EXACT, "num_replications": 12}


class Shifted(AutoDiagonalNormal):
    """Lie a deviation above what was fitted."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
        return dist.Normal(self.loc + self.scale, self.scale).to_event(1)


class Narrow(AutoDiagonalNormal):
    """Be a fifth as wide as what was fitted."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
        return dist.Normal(self.loc, self.scale / 5).to_event(1)


def calibrate(build: Callable, **options: Any) -> VariationalCalibration:
    return calibration(conjugate, build, (Y,), **{**EXACT, "num_replications": 30, **options})


# Right answers


def test_an_exact_guide_passes() -> None:
    """The normal start is the exact posterior; fails once in 100 runs with a fresh seed."""
    result = calibrate(AutoDiagonalNormal)
    assert result.is_unbiased(0.01)
    assert result.passes(0.01)
    assert result.resampled.passes(0.01)
    assert result.guide.ranks.shape == (30, 1)
    assert result.guide.names == ("mean",)
    assert result.khat.shape == (30,)
    assert result.failures == {}


def test_a_biased_guide_fails_and_importance_weights_mend_it() -> None:
    """Its weights are log-normal with unit variance of the logarithm: they have all moments.

    An unbiased guide would be taken for this one once in 10 000 runs; the resampled draws fail once
    in 100. Shares of draws below the truth have the mean of Phi(N(-1, 1)), 0.24.
    """
    result = calibrate(Shifted)
    assert not result.is_unbiased(1e-4)
    assert not result.passes(1e-4)
    assert result.resampled.passes(0.01)
    expected = dist.Normal(0.0, 1.0).cdf(torch.tensor(-1 / math.sqrt(2))).item()
    # The deviation of a share is below 0.25, and four standard errors of 30 are allowed.
    assert result.summary()["mean_pit"]["mean"] == pytest.approx(expected, abs=0.18)


def test_a_narrow_guide_is_unbiased_but_does_not_pass() -> None:
    """Ranks pile up at both ends; the test of symmetry fails once in 100 runs."""
    result = calibrate(Narrow)
    assert result.is_unbiased(0.01)
    assert not result.passes(0.01)
    assert result.summary()["sd_pit"]["mean"] > 0.289


@pytest.mark.slow
def test_all_entries_of_all_sites_are_ranked() -> None:
    """A line with unknown noise, nearly normal; fails once in 100 runs with a fresh seed."""

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.3))
        mean = slope[..., 0] * x[:, 0] + slope[..., 1] * x[:, 1]
        with pyro.plate("item", len(y)):
            pyro.sample("y", dist.Normal(mean, noise), obs=y)

    x = torch.randn(15, 2, generator=torch.Generator().manual_seed(1))
    result = calibration(
        model,
        AutoMultivariateNormal,
        (x, torch.zeros(15)),
        **{**EXACT, "num_replications": 40},
    )
    assert result.resampled.passes(0.01)
    assert list(result.summary().index) == ["slope[0]", "slope[1]", "noise"]


# The test of symmetry


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_p_values_of_symmetry_are_exact(size: int) -> None:
    """Over all ways to flip ranks, p-values are the shares of walks that get as far."""
    flips = torch.tensor(list(itertools.product([-1, 1], repeat=size)))
    distances = torch.arange(1, size + 1)
    ranks = (50 + flips * distances).T
    walks = flips.flip(1).cumsum(1).abs().amax(1)
    expected = (walks.unsqueeze(0) >= walks.unsqueeze(1)).double().mean(1)
    assert torch.allclose(symmetry_p_values(ranks, num_draws=100), expected, atol=1e-12)


def test_uniform_ranks_are_rejected_as_often_as_stated() -> None:
    """2000 columns: the standard error of the share is half a per cent, four are allowed."""
    ranks = torch.randint(0, 101, (80, 2000), generator=torch.Generator().manual_seed(0))
    rejected = (symmetry_p_values(ranks, num_draws=100) <= 0.05).double().mean().item()
    assert 0.02 < rejected <= 0.05 + 4 * 0.005


def test_ranks_in_the_middle_favour_no_side() -> None:
    assert symmetry_p_values(torch.full((20, 1), 50), num_draws=100).item() == 1.0


# Failures and interrupts


def fails_at(*numbers: int, error: type[BaseException] = ValueError) -> Callable:
    """Build exact guides, but raise at these calls; the first one, number 0, is the check's."""
    calls = itertools.count()

    def build(model: Callable) -> AutoDiagonalNormal:
        if (call := next(calls)) in numbers:
            raise error(f"call {call}")
        return AutoDiagonalNormal(model)

    return build


def test_failed_fits_are_reported_and_left_out() -> None:
    with pytest.warns(UserWarning, match=r"2 of 12 fits failed, the first in replication 2: .*3"):
        result = calibrate(fails_at(3, 5), num_replications=12)
    assert result.failures == {2: "ValueError: call 3", 4: "ValueError: call 5"}
    assert result.guide.ranks.shape == (10, 1)
    complete = calibrate(AutoDiagonalNormal, num_replications=12)
    assert torch.equal(result.guide.ranks[:2], complete.guide.ranks[:2])


def test_too_many_failed_fits_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"3 of 12 fits failed.*at least"):
        calibrate(fails_at(1, 2, 3), num_replications=12)


def test_mistakes_in_the_call_are_not_taken_for_failures() -> None:
    with pytest.raises(TypeError, match="num_step"):
        calibrate(AutoDiagonalNormal, num_step=3)
    with pytest.raises(ValueError, match="num_particles must be at least 1"):
        calibrate(AutoDiagonalNormal, num_particles=0, num_replications=10)


def test_an_interrupt_keeps_the_replications_so_far() -> None:
    with pytest.warns(UserWarning, match="interrupted after 11 of 30 replications"):
        result = calibrate(fails_at(12, error=KeyboardInterrupt))
    assert result.guide.ranks.shape == (11, 1)


def test_an_interrupt_within_a_fit_ends_the_run_and_drops_that_fit() -> None:
    """The optimiser catches interrupts to keep what it learned, which is no fit to rank."""
    fits = itertools.count()

    class Interrupted(AutoDiagonalNormal):
        def __init__(self, model: Callable) -> None:
            super().__init__(model)
            self.number = next(fits)

        def get_posterior(self, *args: Any, **kwargs: Any) -> dist.Distribution:
            if self.number == 12 and torch.is_grad_enabled():
                raise KeyboardInterrupt
            return super().get_posterior(*args, **kwargs)

    with pytest.warns(UserWarning, match="interrupted after 11 of 30 replications"):
        result = calibrate(Interrupted)
    assert result.guide.ranks.shape == (11, 1)


def test_an_early_interrupt_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(fails_at(5, error=KeyboardInterrupt))


# Conduct


def test_results_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (
        calibrate(realnvp, num_replications=10, warm_start=False, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.guide.ranks, again.guide.ranks)
    assert torch.equal(first.resampled.ranks, again.resampled.ranks)
    assert not torch.equal(first.guide.ranks, other.guide.ranks)


def test_the_values_of_the_data_do_not_count() -> None:
    options = {**FEW, "seed": 3}
    one, other = (
        calibration(conjugate, AutoDiagonalNormal, (y,), **options) for y in (Y, Y + 100.0)
    )
    assert torch.equal(one.guide.ranks, other.guide.ranks)


def test_discrete_sites_are_summed_out() -> None:
    result = calibration(mixture, realnvp, (Y,), warm_start=False, **FEW)
    assert result.guide.names == ("weight", "means[0]", "means[1]")


def test_progress_is_shown_unless_it_is_not_wanted(capfd: pytest.CaptureFixture) -> None:
    calibrate(AutoDiagonalNormal, num_replications=10)
    assert capfd.readouterr() == ("", "")
    calibrate(AutoDiagonalNormal, num_replications=10, progress=True)
    assert "10/10" in capfd.readouterr().err


def test_the_result_describes_itself() -> None:
    text = repr(calibrate(AutoDiagonalNormal, num_replications=10))
    assert text.startswith("VariationalCalibration(10 replications, 0 failed, median khat=")


# Bad input


def without_data() -> None:
    pyro.sample("x", dist.Normal(0.0, 1.0))


def improper(y: Tensor) -> None:
    x = pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(x, 1.0).expand([4]).to_event(1), obs=y)


def learned(y: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0))
    x = pyro.sample("x", dist.Normal(0.0, scale))
    with pyro.plate("item", len(y)):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def subsampled(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("item", 100, subsample_size=4):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


REFUSED: dict[str, tuple[Callable, tuple, str]] = {
    "factors": (gaussian, (), r"has factors: \['energy'\]"),
    "no data": (without_data, (), "must observe data"),
    "learned": (learned, (Y,), r"learns parameters: \['scale'\]"),
    "subsampled": (subsampled, (Y,), r"scales likelihoods or subsamples: \['y'\]"),
}


@pytest.mark.parametrize(("model", "args", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_simulated_are_refused(
    model: Callable, args: tuple, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(model, AutoDiagonalNormal, args, **FEW)


def test_improper_priors_are_refused() -> None:
    def build(model: Callable) -> AutoDiagonalNormal:
        start = pyro.infer.autoguide.init_to_value(values={"x": torch.tensor(0.0)})
        return AutoDiagonalNormal(model, init_loc_fn=start)

    with pytest.raises(ValueError, match="model must have proper priors"):
        calibration(improper, build, (Y,), **FEW)


@pytest.mark.parametrize("number", [0, 9])
def test_replications_must_be_enough(number: int) -> None:
    with pytest.raises(ValueError, match=f"num_replications must be at least 10, got {number}"):
        calibrate(AutoDiagonalNormal, num_replications=number)


def test_guides_need_a_latent_vector() -> None:
    with pytest.raises(TypeError, match="guide must be an AutoContinuous"):
        calibrate(AutoNormal)


def test_builders_and_models_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"build_guide must make a guide.*got str"):
        calibrate("AutoNormal")
    with pytest.raises(TypeError, match="model must be a callable, got int"):
        calibration(3, AutoDiagonalNormal)  # type: ignore[arg-type]


def test_masked_data_stay_masked() -> None:
    mask = torch.tensor([True, False, True, True])

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("item", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    assert calibration(model, AutoDiagonalNormal, (Y,), **FEW).guide.ranks.shape == (12, 1)
