"""Exact bands and p-values for ranks, against enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pyroflows.diagnostics import rank_ecdf, uniformity_p_values
from pyroflows.diagnostics.ecdf import _Band


def uniform_ranks(*shape: int, num_draws: int, seed: int = 0) -> Tensor:
    return torch.randint(
        num_draws + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64
    )


@pytest.mark.parametrize("pointwise", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 4, 6])
def test_confidence_of_a_band_by_enumeration(size: int, pointwise: float) -> None:
    levels = np.array([0.1, 0.45, 0.5, 0.8])
    band = _Band(size, levels)
    total = 0.0
    for bins in itertools.product(range(len(levels) + 1), repeat=size):
        counts = np.bincount(bins, minlength=len(levels) + 1)[:-1].cumsum()
        probability = np.diff(levels, prepend=0, append=1)[list(bins)].prod()
        total += probability * (band.extremity(counts) > pointwise)
    assert band.confidence(pointwise) == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("size", "num_draws"), [(20, 1000), (100, 50), (500, 99), (50, 1)])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_bands_hold_curves_of_uniform_ranks(size: int, num_draws: int, confidence: float) -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations."""
    repeats = 4_000
    ranks = uniform_ranks(size, repeats, num_draws=num_draws)
    levels, difference, lower, upper = rank_ecdf(ranks, num_draws, confidence)
    inside = (difference >= lower.unsqueeze(-1)) & (difference <= upper.unsqueeze(-1))
    band = _Band(size, levels.numpy())
    exact = band.confidence(band.adjusted(1 - confidence))
    assert exact >= confidence
    share = inside.all(0).double().mean().item()
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / repeats)


@pytest.mark.parametrize("size", [100, 1_000])
def test_bands_are_hardly_wider_than_stated(size: int) -> None:
    band = _Band(size, np.arange(1, 100) / 100)
    assert band.confidence(band.adjusted(0.05)) < 0.951


def test_p_values_are_uniform_for_uniform_ranks() -> None:
    """Fails by chance once in 5 000 runs with a fresh seed: three times four deviations."""
    repeats = 2_000
    p_values = uniformity_p_values(uniform_ranks(100, repeats, num_draws=60), 60)
    for alpha in (0.01, 0.05, 0.5):
        share = (p_values <= alpha).double().mean().item()
        assert abs(share - alpha) < 4 * math.sqrt(alpha * (1 - alpha) / repeats)


def test_p_values_agree_with_the_bands() -> None:
    ranks = uniform_ranks(100, 300, num_draws=60)
    _, difference, lower, upper = rank_ecdf(ranks, 60, confidence=0.8)
    inside = (difference >= lower.unsqueeze(-1)) & (difference <= upper.unsqueeze(-1))
    rejected = uniformity_p_values(ranks, 60) < 0.2
    assert rejected.any()
    assert torch.equal(rejected, ~inside.all(0))


def test_one_draw_is_a_binomial_test() -> None:
    ranks = (torch.arange(10) < 2).long()  # eight of ten below the only draw
    levels, difference, _, _ = rank_ecdf(ranks, 1)
    assert levels.tolist() == [0.5]
    assert difference.tolist() == pytest.approx([0.3])
    assert uniformity_p_values(ranks, 1).item() == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert uniformity_p_values(torch.tensor([0, 1]), 1).item() == 1.0


def test_event_shapes() -> None:
    ranks = uniform_ranks(30, 2, 3, num_draws=9)
    result = rank_ecdf(ranks, 9)
    assert result.levels.shape == result.lower.shape == result.upper.shape == (9,)
    assert result.difference.shape == (9, 2, 3)
    p_values = uniformity_p_values(ranks, 9)
    assert p_values.shape == (2, 3)
    assert p_values[1, 2] == uniformity_p_values(ranks[:, 1, 2], 9)


def test_many_replicates() -> None:
    ranks = uniform_ranks(20_000, num_draws=1_000)
    assert 1e-4 < uniformity_p_values(ranks, 1_000).item() <= 1
    assert uniformity_p_values(ranks // 2, 1_000).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("function", [rank_ecdf, uniformity_p_values])
def test_rejects_bad_ranks(function) -> None:
    with pytest.raises(TypeError, match=r"ranks must be a torch.Tensor of integers"):
        function(torch.zeros(3), 5)
    with pytest.raises(ValueError, match="between 0 and num_draws = 5, got -1 to 6"):
        function(torch.tensor([-1, 6]), 5)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        function(torch.tensor([0]), 0)
    with pytest.raises(ValueError, match=r"shape \(N, ...\) with N >= 1, got \(0,\)"):
        function(torch.zeros(0, dtype=torch.int64), 5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_rejects_bad_confidence(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1"):
        rank_ecdf(torch.tensor([0, 1]), 1, confidence)
