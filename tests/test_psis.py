"""Pareto-smoothed importance sampling against ArviZ 0.23 and against known tails."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from pyroflows.diagnostics import psis
from pyroflows.diagnostics.psis import _fit_generalised_pareto

SIZES = (21, 100, 225, 1_000, 10_000, 100_000)

DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "almost constant": lambda rng, size: 1e-3 * rng.normal(size=size),
    "normal": lambda rng, size: rng.normal(size=size),
    "wide normal": lambda rng, size: 5 * rng.normal(size=size),
    "underflowing": lambda rng, size: 300 * rng.normal(size=size),
    "Student": lambda rng, size: rng.standard_t(3, size=size),
    "Pareto 0.3": lambda rng, size: -0.3 * np.log(rng.random(size)),
    "Pareto 1": lambda rng, size: -np.log(rng.random(size)),
    "Pareto 5": lambda rng, size: -5 * np.log(rng.random(size)),
    "bounded": lambda rng, size: -0.5 * rng.chisquare(10, size=size),
    "shifted up": lambda rng, size: rng.normal(size=size) + 1e4,
    "shifted down": lambda rng, size: rng.normal(size=size) - 1e4,
    "half zero": lambda rng, size: np.where(np.arange(size) % 2, rng.normal(size=size), -np.inf),
    "nearly all zero": lambda rng, size: np.where(
        np.arange(size) < 0.07 * size, rng.normal(size=size), -np.inf
    ),
}

QUANTILES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "narrow": lambda levels: 0.01 * ndtri(levels),
    "bounded": np.log,
    "normal": ndtri,
    "Pareto 1.2": lambda levels: -1.2 * np.log(levels),
    "wide": lambda levels: 5 * ndtri(levels),
}

# What arviz 0.23.4 answers on the midpoint quantiles: name, size, k-hat, largest log weight.
ARVIZ_ANSWERS = (
    ("narrow", 100, 0.0754290662892353, -4.579568903532556),
    ("narrow", 2_000, -0.07590067606162486, -7.566154099616058),
    ("bounded", 100, -0.40462148035522866, -3.9205978130058194),
    ("bounded", 2_000, -0.8639110770714289, -6.908142834035292),
    ("normal", 100, 0.3681400557995296, -2.522186820305747),
    ("normal", 2_000, 0.27623331559729425, -4.620745768996472),
    ("Pareto 1.2", 100, 0.8923632152333727, -1.2136064280343106),
    ("Pareto 1.2", 2_000, 1.1305491440927482, -1.124836332713107),
    ("wide", 100, 1.586566491510354, -0.34963757563963394),
    ("wide", 2_000, 1.794298087397159, -0.48619367993148344),
)


def quiet_arviz(test: Callable[..., None]) -> Callable[..., None]:
    """Let through the notice that arviz 0.23 gives once a day and the overflows in its fit."""
    notice = r"ignore:\s*ArviZ is undergoing a major refactor:FutureWarning"
    overflow = "ignore:overflow encountered in exp:RuntimeWarning"
    return pytest.mark.filterwarnings(notice)(pytest.mark.filterwarnings(overflow)(test))


@pytest.fixture
def arviz_023() -> ModuleType:
    import arviz

    if int(arviz.__version__.split(".")[0]) >= 1:
        pytest.skip("arviz 1 takes log likelihoods; its answers of 0.23.4 are tested as constants")
    return arviz


@quiet_arviz
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", DRAWS)
def test_agrees_with_arviz(arviz_023: ModuleType, name: str, size: int) -> None:
    log_weights = DRAWS[name](np.random.default_rng(0), size)
    expected, expected_khat = arviz_023.psislw(log_weights)
    smoothed, khat = psis(torch.from_numpy(log_weights))
    # Inside the package double precision is used throughout: far closer than the 1e-3 that matter.
    assert khat == pytest.approx(float(expected_khat), abs=1e-6)
    np.testing.assert_allclose(smoothed.numpy(), expected, atol=1e-9, rtol=0)


@quiet_arviz
@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_arviz_up_to_the_order_of_ties(arviz_023: ModuleType, size: int) -> None:
    log_weights = np.random.default_rng(0).normal(size=size).round(1)
    expected, expected_khat = arviz_023.psislw(log_weights)
    smoothed, khat = psis(torch.from_numpy(log_weights))
    assert khat == pytest.approx(float(expected_khat), abs=1e-6)
    np.testing.assert_allclose(np.sort(smoothed.numpy()), np.sort(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("name", "size", "expected_khat", "expected_maximum"), ARVIZ_ANSWERS)
def test_recorded_arviz_answers(
    name: str, size: int, expected_khat: float, expected_maximum: float
) -> None:
    levels = (np.arange(size) + 0.5) / size
    smoothed, khat = psis(torch.from_numpy(QUANTILES[name](levels)))
    assert khat == pytest.approx(expected_khat, abs=1e-6)
    assert smoothed.max().item() == pytest.approx(expected_maximum, abs=1e-6)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.7, 1.0, 2.0])
def test_recovers_the_shape_of_a_pareto_tail(shape: float) -> None:
    """Fails by chance once in 16 000 runs with a fresh seed: four standard deviations."""
    size, tail_size = 100_000, 949
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, khat = psis(-shape * uniform.log())
    expected = (tail_size * shape + 5) / (tail_size + 10)
    assert abs(khat - expected) < 4 * (1 + shape) / math.sqrt(tail_size)


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.5, 1.5])
def test_recovers_shape_and_scale_of_a_generalised_pareto(shape: float) -> None:
    levels = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    exponential = -(-levels).log1p()
    excesses = 3 * (exponential if shape == 0 else (shape * exponential).expm1() / shape)
    fitted_shape, fitted_scale = _fit_generalised_pareto(excesses)
    assert fitted_shape == pytest.approx(shape, abs=0.01)
    assert fitted_scale == pytest.approx(3, rel=0.01)


def test_fit_passes_through_the_exponential_distribution() -> None:
    """A grid point falls on slope zero when the maximum is three times the lower quartile."""
    excesses = torch.linspace(0.2, 3.0, 20, dtype=torch.float64)
    excesses[4] = 1.0
    shape, scale = _fit_generalised_pareto(excesses)
    assert math.isfinite(shape)
    assert scale > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [21, 100, 10_000])
@pytest.mark.parametrize("constant", [0.0, -1234.5])
def test_equal_weights_have_no_tail(size: int, constant: float, dtype: torch.dtype) -> None:
    smoothed, khat = psis(torch.full((size,), constant, dtype=dtype))
    assert khat == 0.0
    torch.testing.assert_close(smoothed, torch.full((size,), -math.log(size), dtype=dtype))


@pytest.mark.parametrize("size", [21, 100, 10_000])
@pytest.mark.parametrize("scale", [1e-16, 1e-12, 1e-10])
def test_rounding_noise_has_no_tail(scale: float, size: int) -> None:
    noise = scale * torch.randn(
        size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    assert psis(noise)[1] == 0.0
    noise[::20] *= 20
    assert psis(noise)[1] == 0.0


def test_single_precision_rounding_noise_has_no_tail() -> None:
    log_joint = 100 * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    log_weights = (log_joint + 0.1) - log_joint
    assert log_weights.unique().numel() > 1
    assert psis(log_weights)[1] == 0.0


def test_weights_tied_at_their_maximum_have_no_tail() -> None:
    log_weights = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).clamp(max=0.5)
    assert psis(log_weights)[1] == 0.0


@pytest.mark.parametrize("size", [1, 4, 5, 20])
def test_too_few_draws_tell_nothing(size: int) -> None:
    log_weights = torch.randn(size, generator=torch.Generator().manual_seed(0))
    smoothed, khat = psis(log_weights)
    assert khat == math.inf
    torch.testing.assert_close(smoothed, log_weights.log_softmax(0))


@pytest.mark.parametrize("background", [0.0, -math.inf])
def test_too_few_large_weights_tell_nothing(background: float) -> None:
    log_weights = torch.full((1_000,), background)
    log_weights[[3, 500, 700]] = torch.tensor([1.0, 2.0, 3.0])
    smoothed, khat = psis(log_weights)
    assert khat == math.inf
    torch.testing.assert_close(smoothed, log_weights.log_softmax(0))


def test_smooths_the_tail_only_and_keeps_the_order_of_draws() -> None:
    log_weights = 2 * torch.randn(
        1_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    smoothed, _ = psis(log_weights)
    order = log_weights.argsort()
    tail_size = math.ceil(3 * math.sqrt(1_000))
    assert (smoothed[order].diff() >= 0).all()
    offsets = (smoothed - log_weights)[order]
    torch.testing.assert_close(offsets[:-tail_size], offsets[0].expand(1_000 - tail_size))
    assert not torch.isclose(offsets[-tail_size:-1], offsets[0]).any()
    assert offsets[-1] <= offsets[0] + 1e-12


def test_follows_permutations_and_ignores_constants() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(1_000, generator=generator, dtype=torch.float64)
    permutation = torch.randperm(1_000, generator=generator)
    smoothed, khat = psis(log_weights)
    moved, moved_khat = psis(log_weights[permutation] - 777.0)
    torch.testing.assert_close(moved, smoothed[permutation])
    assert moved_khat == pytest.approx(khat, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_dtype_and_leaves_the_input_alone(dtype: torch.dtype) -> None:
    log_weights = torch.randn(1_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    log_weights.requires_grad_()
    before = log_weights.detach().clone()
    smoothed, khat = psis(log_weights)
    assert smoothed.dtype == dtype
    assert not smoothed.requires_grad
    assert isinstance(khat, float)
    assert torch.equal(log_weights, before)
    assert abs(smoothed.double().logsumexp(0)) < 5 * torch.finfo(dtype).eps


def test_zero_weights_stay_zero() -> None:
    log_weights = torch.randn(1_000, generator=torch.Generator().manual_seed(0))
    log_weights[::3] = -torch.inf
    smoothed, khat = psis(log_weights)
    assert math.isfinite(khat)
    assert torch.equal(smoothed.isinf(), log_weights.isinf())


@pytest.mark.parametrize(
    ("log_weights", "message"),
    [
        (torch.zeros(30, 2), r"shape \(S,\) with S >= 1, got shape \(30, 2\)"),
        (torch.tensor(0.0), r"shape \(S,\) with S >= 1, got shape \(\)"),
        (torch.zeros(0), r"shape \(S,\) with S >= 1, got shape \(0,\)"),
        (torch.tensor([0.0, math.nan, math.inf]), "NaN or plus infinity in 2 of 3 entries"),
        (torch.full((30,), -math.inf), "every weight is zero"),
    ],
)
def test_rejects_what_is_not_a_vector_of_log_weights(
    log_weights: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        psis(log_weights)


@pytest.mark.parametrize("log_weights", [[0.0, 1.0], np.zeros(30), torch.zeros(30, dtype=int)])
def test_rejects_other_types(log_weights: object) -> None:
    with pytest.raises(TypeError, match="log_weights must be"):
        psis(log_weights)
