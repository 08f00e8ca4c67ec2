"""Expected coverage and TARP on posteriors that are right, narrow, wide, biased or blind."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyroflows.diagnostics import SBC, Coverage, coverage, tarp
from pyroflows.diagnostics.tarp import _derangement

NUM_REPLICATES, NUM_DRAWS, DIM = 1_000, 200, 2
DEVIATION = math.sqrt(0.5)


def conjugate(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters with a standard normal prior, data of unit variance, and noise."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(NUM_REPLICATES, DIM, generator=generator)
    x = truth + torch.randn(NUM_REPLICATES, DIM, generator=generator)
    return truth, x, torch.randn(NUM_DRAWS, NUM_REPLICATES, DIM, generator=generator)


def density_coverage(scale: float = 1.0, shift: float = 0.0) -> Coverage:
    truth, x, noise = conjugate()
    posterior = Normal(x / 2 + shift * DEVIATION, scale * DEVIATION)
    draws = posterior.mean + posterior.stddev * noise
    return coverage(posterior.log_prob(draws).sum(-1), posterior.log_prob(truth).sum(-1))


def ball_coverage(scale: float = 1.0, shift: float = 0.0) -> Coverage:
    truth, x, noise = conjugate()
    return tarp(x / 2 + DEVIATION * (shift + scale * noise), truth)


@pytest.mark.parametrize("result", [density_coverage, ball_coverage])
def test_exact_posterior_passes(result) -> None:
    """Fails by chance once in 100 runs with a fresh seed."""
    assert result().passes(alpha=0.01)


@pytest.mark.parametrize("result", [density_coverage, ball_coverage])
@pytest.mark.parametrize(("scale", "sign"), [(0.7, -1), (1.4, 1)])
def test_wrong_width_fails_and_shows_its_sign(result, scale: float, sign: int) -> None:
    wrong = result(scale=scale)
    assert wrong.p_value < 1e-3
    assert not wrong.passes()
    assert wrong.atc * sign > 0.01
    assert wrong.area > 0.02


@pytest.mark.parametrize(("result", "shift"), [(density_coverage, 0.6), (ball_coverage, 1.0)])
def test_biased_posterior_fails(result, shift: float) -> None:
    assert result(shift=shift).p_value < 1e-3


def test_credibility_of_a_narrow_normal() -> None:
    r"""A normal narrower by s covers :math:`1 - (1 - a)^{s^2}` in two dimensions.

    Fails by chance once in 1 000 runs with a fresh seed: a 99.9 % band of all levels.
    """
    scale = 0.7
    result = density_coverage(scale=scale)
    expected = 1 - (1 - result.levels) ** (scale**2)
    # Dvoretzky, Kiefer, Wolfowitz, and the error of a level known from 200 draws
    tolerance = math.sqrt(math.log(2 / 1e-3) / (2 * NUM_REPLICATES))
    assert (result.curve - expected).abs().max() < tolerance


def test_posterior_equal_to_the_prior() -> None:
    """Tests without the data are blind to it, references that use the data are not.

    The first two fail by chance once in 100 runs with a fresh seed.
    """
    truth, x, noise = conjugate()
    prior = Normal(0.0, 1.0)
    assert coverage(prior.log_prob(noise).sum(-1), prior.log_prob(truth).sum(-1)).passes()
    assert tarp(noise, truth).passes()
    assert tarp(noise, truth, references=x).p_value < 1e-3


def test_tarp_sees_wrong_correlations_that_single_parameters_hide() -> None:
    """The first fails by chance once in 100 runs with a fresh seed."""
    truth, _, noise = conjugate()
    truth = truth @ torch.tensor([[1.0, 0.9], [0.0, math.sqrt(1 - 0.9**2)]])
    assert SBC.from_draws(noise, truth).passes()
    assert tarp(noise, truth).p_value < 1e-3


def test_areas_of_known_curves() -> None:
    uniform = Coverage(torch.arange(101), 100)
    assert uniform.area == pytest.approx(0, abs=0.01)
    assert uniform.atc == pytest.approx(0, abs=1e-4)
    inner = Coverage(torch.zeros(50, dtype=torch.int64), 100)
    assert inner.curve.tolist() == pytest.approx([1.0] * len(inner.levels))
    assert inner.area == pytest.approx(0.5, abs=0.01)
    assert inner.atc == pytest.approx(1 / 8)
    outer = Coverage(torch.full((50,), 100), 100)
    assert outer.curve.tolist() == pytest.approx([0.0] * len(outer.levels))
    assert outer.atc == pytest.approx(-3 / 8, abs=0.01)


def test_areas_follow_their_definition() -> None:
    result = density_coverage(scale=1.4)
    upper = result.levels > 0.5
    distance = result.curve - result.levels
    assert result.area == pytest.approx(distance.abs().mean().item(), abs=0.005)
    assert result.atc == pytest.approx(distance[upper].mean().item() / 2, abs=0.005)


def test_repr_tells_the_verdict() -> None:
    result = Coverage(torch.arange(100), 99)
    assert repr(result) == "Coverage(100 replicates x 99 draws, p-value 1, area to curve +0.000)"


def test_excluded_truth_needs_all_draws() -> None:
    draws = torch.zeros(20, 3).log()
    draws[:10] = 0.0
    result = coverage(draws, torch.tensor([-math.inf, 1.0, -1.0]))
    assert 10 <= result.ranks[0] <= 20
    assert result.ranks[1:].tolist() == [0, 10]


def test_units_do_not_matter_to_tarp() -> None:
    truth, x, noise = conjugate()
    units = torch.tensor([2.0**20, 2.0**-20])
    expected = tarp(x + noise, truth).ranks
    assert torch.equal(tarp((x + noise) * units, truth * units).ranks, expected)


def test_tarp_counts_draws_nearer_than_the_truth() -> None:
    draws = torch.arange(1.0, 7.0).reshape(6, 1, 1).expand(6, 2, 1)
    truth = torch.tensor([[2.5], [-4.5]])
    assert tarp(draws, truth, references=torch.zeros(2, 1)).ranks.tolist() == [2, 4]


def test_tarp_is_reproducible() -> None:
    truth, x, noise = conjugate()
    state = torch.get_rng_state()
    first = tarp(x + noise, truth).ranks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tarp(x + noise, truth).ranks, first)
    assert not torch.equal(tarp(x + noise, truth, seed=1).ranks, first)


@pytest.mark.parametrize("size", [2, 3, 100])
def test_references_come_from_other_data_sets(size: int) -> None:
    successors = _derangement(size, seed=0)
    assert torch.equal(successors.sort().values, torch.arange(size))
    assert (successors != torch.arange(size)).all()


def test_tarp_keeps_the_rate_of_false_alarms() -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations."""
    repeats, alpha = 1_000, 0.05
    generator = torch.Generator().manual_seed(0)
    alarms = 0
    for seed in range(repeats):
        truth = torch.randn(50, 2, generator=generator)
        x = truth + torch.randn(50, 2, generator=generator)
        draws = x / 2 + DEVIATION * torch.randn(40, 50, 2, generator=generator)
        alarms += tarp(draws, truth, seed=seed).p_value < alpha
    assert abs(alarms / repeats - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"draw_log_probs must have shape \(L, 3"):
        coverage(torch.zeros(5, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="truth_log_probs must not hold NaN"):
        coverage(torch.zeros(5, 1), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"ranks must have shape \(N,\), got \(3, 2\)"):
        Coverage(torch.zeros(3, 2, dtype=torch.int64), 5)
    draws, truth = torch.randn(5, 3, 2), torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"draws must have shape \(L, 3, 2"):
        tarp(draws[..., :1], truth)
    with pytest.raises(ValueError, match="draws must be finite"):
        tarp(draws / 0, truth)
    with pytest.raises(ValueError, match="truth must hold at least 2 data sets, got 1"):
        tarp(draws[:, :1], truth[:1])
    with pytest.raises(ValueError, match=r"truth must vary in every column.*\[0\]"):
        tarp(draws, truth * torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"references must have shape \(3, 2"):
        tarp(draws, truth, references=truth[:2])
    with pytest.raises(TypeError, match="truth must be of a floating-point dtype"):
        tarp(draws, truth.long())
