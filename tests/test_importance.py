"""Effective sample size and log evidence against a Gaussian with a known normaliser."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from pyroflows.diagnostics import effective_sample_size, log_evidence

TARGET_SCALE = 1.0
PROPOSAL_SCALE = 1.5
LOG_NORMALISER = math.log(TARGET_SCALE * math.sqrt(2 * math.pi))
# E[w]^2 / E[w^2] for w = N(0, s^2) / N(0, t^2) with draws from the latter: s sqrt(2 t^2 - s^2)/t^2.
EFFICIENCY = TARGET_SCALE * math.sqrt(2 * PROPOSAL_SCALE**2 - TARGET_SCALE**2) / PROPOSAL_SCALE**2


def gaussian_log_weights(*shape: int, seed: int = 0) -> Tensor:
    """Weight draws of a wide Gaussian for an unnormalised narrow one."""
    standard = torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    draws = PROPOSAL_SCALE * standard
    log_target = -0.5 * (draws / TARGET_SCALE).square()
    return log_target - Normal(0.0, PROPOSAL_SCALE).log_prob(draws)


def test_log_evidence_of_a_gaussian() -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard errors."""
    size = 100_000
    value, standard_error = log_evidence(gaussian_log_weights(size))
    assert abs(value - LOG_NORMALISER) < 4 * standard_error
    assert standard_error == pytest.approx(math.sqrt((1 / EFFICIENCY - 1) / size), rel=0.02)


def test_standard_errors_cover_the_truth() -> None:
    """Fails by chance once in 10 000 runs with a fresh seed: a normal interval on the coverage."""
    repeats = 1_000
    answers = torch.tensor([log_evidence(row) for row in gaussian_log_weights(repeats, 1_000)])
    scores = (answers[:, 0] - LOG_NORMALISER) / answers[:, 1]
    coverage = (scores.abs() < 1.96).double().mean().item()
    assert abs(coverage - 0.95) < 3.9 * math.sqrt(0.95 * 0.05 / repeats)


def test_effective_sample_size_of_a_gaussian() -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations."""
    size = 100_000
    # The share of useful draws scatters by 0.0007 between seeds.
    share = effective_sample_size(gaussian_log_weights(size)) / size
    assert abs(share - EFFICIENCY) < 4 * 0.0007


def test_equal_weights() -> None:
    log_weights = torch.full((1_000,), -1234.5)
    assert effective_sample_size(log_weights) == pytest.approx(1_000)
    value, standard_error = log_evidence(log_weights)
    assert value == pytest.approx(-1234.5)
    assert standard_error < 1e-9


def test_one_dominant_weight() -> None:
    log_weights = torch.tensor([0.0, -1000.0, -2000.0])
    assert effective_sample_size(log_weights) == pytest.approx(1.0)
    value, standard_error = log_evidence(log_weights)
    assert value == pytest.approx(-math.log(3))
    assert standard_error == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [-1e4, 1e4])
def test_constants_move_the_evidence_alone(constant: float) -> None:
    log_weights = gaussian_log_weights(500)
    value, standard_error = log_evidence(log_weights)
    moved, moved_standard_error = log_evidence(log_weights + constant)
    assert moved - constant == pytest.approx(value, abs=1e-9)
    assert moved_standard_error == pytest.approx(standard_error)
    assert effective_sample_size(log_weights + constant) == pytest.approx(
        effective_sample_size(log_weights)
    )


def test_zero_weights_count_as_draws() -> None:
    log_weights = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    assert effective_sample_size(log_weights) == pytest.approx(2.0)
    value, standard_error = log_evidence(log_weights)
    assert value == pytest.approx(-math.log(2))
    assert standard_error == pytest.approx(math.sqrt(1 / 3))


def test_single_draw() -> None:
    assert effective_sample_size(torch.tensor([3.0])) == 1.0
    with pytest.raises(ValueError, match="at least 2 draws"):
        log_evidence(torch.tensor([3.0]))


@pytest.mark.parametrize("function", [effective_sample_size, log_evidence])
@pytest.mark.parametrize(
    "log_weights",
    [torch.zeros(3, 2), torch.zeros(0), torch.tensor([0.0, math.nan]), torch.tensor([math.inf])],
)
def test_rejects_bad_log_weights(function, log_weights: Tensor) -> None:
    with pytest.raises(ValueError, match="log_weights must"):
        function(log_weights)
