"""Densities of discrete levels, and arrays of images."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import pyroflows as pf
from pyroflows.distributions import Dequantized, Flow, FlowMixture, image_levels
from pyroflows.transforms import ActNorm, FlowTransform, Logit, Permutation

SHAPE = (1, 2, 2)


def uniform(num_levels: int, shape: tuple[int, ...] = SHAPE) -> Dequantized:
    """Give every level the same probability: a logistic number is the logit of a uniform one."""
    flow = Flow(dist.Logistic(torch.zeros(shape), 1.0), ActNorm(shape, initialized=True))
    return Dequantized(flow, num_levels, margin=0.0)


def gaussian(num_levels: int, loc: float, scale: float) -> tuple[Dequantized, Tensor]:
    """Return a density of one entry, normal in logits, and the probabilities of its levels."""
    flow = ActNorm(1, initialized=True)
    with torch.no_grad():
        flow.shift.fill_(loc / scale)
        flow.log_scale.fill_(math.log(scale))
    edges = torch.linspace(0, 1, num_levels + 1).double().logit()
    probabilities = dist.Normal(loc, scale).cdf(edges).diff()
    return Dequantized(Flow(None, flow), num_levels, margin=0.0), probabilities


def blobs(count: int, seed: int = 0) -> Tensor:
    """Draw images whose pixels are all 0 or all 7, in equal shares."""
    generator = torch.Generator().manual_seed(seed)
    return (7 * torch.randint(2, (count, 1, 1, 1), generator=generator)).expand(count, *SHAPE)


# What it gives


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_uniform_levels_take_the_logarithm_of_their_number(num_levels: int) -> None:
    density, levels = uniform(num_levels), torch.randint(num_levels, (50, *SHAPE))
    log_prob = density.log_prob(levels)
    assert log_prob.shape == (50,)
    # Rounding of logits in single precision.
    expected = torch.tensor(-4 * math.log(num_levels)).expand(50)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-4)
    bits = density.bits_per_dim(levels)
    torch.testing.assert_close(
        bits, torch.tensor(math.log2(num_levels)).expand(50), rtol=0, atol=1e-4
    )


@torch.no_grad()
def test_the_bound_lies_above_the_code_length_and_closes_with_draws() -> None:
    torch.manual_seed(0)
    density, probabilities = gaussian(4, 0.3, 0.8)
    levels = torch.arange(4).unsqueeze(-1)
    exact = -probabilities.log2().float()
    one = density.bits_per_dim(levels.expand(100_000, 4, 1))
    # Five standard errors either way: false alarms are rarer than one in a million.
    error = 5 * one.std(0) / 100_000**0.5
    assert (one.mean(0) > exact - error).all()
    assert (one.mean(0) > exact + error).any()
    many = density.bits_per_dim(levels.expand(2000, 4, 1), num_draws=50)
    error = 5 * many.std(0) / 2000**0.5 + 0.01  # what is left of the gap after 50 draws
    assert ((many.mean(0) - exact).abs() < error).all()


def test_draws_are_levels_with_their_probabilities() -> None:
    torch.manual_seed(0)
    density, probabilities = gaussian(5, -0.5, 1.5)
    draws = density.sample((20_000,))
    assert density.support.check(draws).all()
    shares = torch.bincount(draws.flatten().long(), minlength=5).double() / 20_000
    # Five standard errors of a share of one half: false alarms are rarer than one in a million.
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=5 * 0.5 / 20_000**0.5)


def test_noise_is_fresh_at_each_use() -> None:
    density, _ = gaussian(4, 0.3, 0.8)
    levels = torch.arange(4).unsqueeze(-1)
    assert not torch.equal(density.log_prob(levels), density.log_prob(levels))


def test_a_context_and_a_temperature_are_those_of_the_flow() -> None:
    flow = Flow(None, pf.flow("realnvp", SHAPE, 3, num_layers=2))
    density = Dequantized(flow, 8).condition(torch.eye(3))
    assert density.batch_shape == (3,)
    assert density.event_shape == SHAPE
    assert density.sample((5,)).shape == (5, 3, *SHAPE)
    assert density.log_prob(blobs(5).unsqueeze(1)).shape == (5, 3)
    cold = density.temper(0.0).sample((5,))
    assert (cold == cold[0]).all()
    assert density.expand((2, 3)).sample().shape == (2, 3, *SHAPE)


# What it learns


def test_learns_a_distribution_of_levels() -> None:
    """Two images in equal shares: one bit each, a quarter of a bit a pixel."""
    torch.manual_seed(0)
    flow = Flow(None, pf.flow("spline_coupling", SHAPE, num_layers=4))
    density = Dequantized(flow, 8)
    fit = density.fit(blobs(500), num_steps=300, batch_size=100, learning_rate=1e-2, progress=False)
    assert fit.losses[-1] < fit.losses[0]
    # Flows cannot tear their base apart, so that some probability lies in between.
    assert 0.25 < density.bits_per_dim(blobs(100, seed=1), num_draws=10).mean() < 0.7
    draws = density.sample((200,))
    assert ((draws == 0) | (draws == 7)).float().mean() > 0.8


def test_pixels_that_never_change_can_be_learned() -> None:
    levels = torch.cat([blobs(100), torch.zeros(100, 1, 2, 2, dtype=torch.long)], -1)
    torch.manual_seed(0)
    density = Dequantized(Flow(None, pf.flow("realnvp", (1, 2, 4), num_layers=2)), 8)
    fit = density.fit(levels, num_steps=20, progress=False)
    assert fit.losses.isfinite().all()


def test_rows_stay_small() -> None:
    like = torch.zeros(0)
    for num_levels, dtype in ((8, torch.uint8), (256, torch.uint8), (257, torch.int32)):
        density = uniform(num_levels)
        for levels in (blobs(10), blobs(10).float(), blobs(10).numpy()):
            rows = density.rows(levels, None, like)
            assert rows.data.dtype == dtype
            assert torch.equal(rows.data.long(), blobs(10))


def test_a_fit_is_reproducible() -> None:
    def losses() -> Tensor:
        torch.manual_seed(0)
        density = Dequantized(Flow(None, pf.flow("realnvp", SHAPE, num_layers=2)), 8)
        return density.fit(blobs(100), num_steps=5, progress=False, seed=3).losses

    assert torch.equal(losses(), losses())


def test_the_state_fits_a_fresh_density() -> None:
    def fresh() -> Dequantized:
        return Dequantized(Flow(None, pf.flow("realnvp", SHAPE, num_layers=2)), 8)

    density, other = fresh(), fresh()
    density.fit(blobs(100), num_steps=5, progress=False)
    other.load_state_dict(density.state_dict())
    y = torch.randn(5, *SHAPE)
    assert torch.equal(density.flow.log_prob(y), other.flow.log_prob(y))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.full((10, *SHAPE), 8), "integers from 0 to 7, got 8"),
        (torch.full((10, *SHAPE), -1), "integers from 0 to 7, got -1"),
        (torch.full((10, *SHAPE), 0.5), "integers from 0 to 7, got 0.5"),
        (torch.full((10, *SHAPE), math.nan), "nan"),
        (torch.zeros(10, 2, 2), r"shape \(N, 1, 2, 2\), got \(10, 2, 2\)"),
    ],
)
def test_data_that_are_no_levels_are_refused(data: Tensor, message: str) -> None:
    density = Dequantized(Flow(None, pf.flow("realnvp", SHAPE, num_layers=2)), 8)
    with pytest.raises(ValueError, match=message):
        density.fit(data, progress=False)


def test_impossible_densities_are_refused() -> None:
    flow = Flow(None, Permutation([1, 0]))
    with pytest.raises(ValueError, match="num_levels must be at least 2, got 1"):
        Dequantized(flow, 1)
    with pytest.raises(ValueError, match=r"margin must lie in \[0, 0.5\), got 0.7"):
        Dequantized(flow, 2, margin=0.7)
    with pytest.raises(TypeError, match="flow must be a Flow, got FlowMixture"):
        Dequantized(FlowMixture([Flow(None, pf.flow("realnvp", 2))]), 2)
    flow = Flow(None, pf.flow("realnvp", SHAPE))
    with pytest.raises(TypeError, match="noise must be a FlowTransform or None, got Flow"):
        Dequantized(flow, 2, noise=flow)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"event shape of the flow, \(1, 2, 2\), got \(4,\)"):
        Dequantized(flow, 2, noise=pf.flow("realnvp", 4, 4))
    with pytest.raises(ValueError, match="as many entries as the levels, 4, got context_dim=3"):
        Dequantized(flow, 2, noise=pf.flow("realnvp", SHAPE, 3))
    with pytest.raises(ValueError, match="num_levels must be 8 or None, got 4"):
        uniform(8).bits_per_dim(blobs(5), 4)
    with pytest.raises(ValueError, match="integers from 0 to 3, got 7"):
        uniform(4).bits_per_dim(torch.full((5, *SHAPE), 7))


# Learned noise


def scattered(shape: tuple[int, ...], seed: int = 0) -> FlowTransform:
    """Return a flow for noise that is far from even, and differs between levels."""
    torch.manual_seed(seed)
    noise = pf.flow("realnvp", shape, math.prod(shape), num_layers=2)
    with torch.no_grad():
        for parameter in noise.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return noise


def correlated(
    num_levels: int, noise: FlowTransform | None = None
) -> tuple[Dequantized, Tensor, Tensor]:
    """Return a normal density of the logits of two pixels, all their levels, and their log P."""
    loc, covariance = torch.tensor([0.2, -0.5]), torch.tensor([[1.0, 0.5], [0.5, 1.5]])
    flow = Flow(dist.MultivariateNormal(loc, covariance), ActNorm(2, initialized=True))
    density = Dequantized(flow, num_levels, noise=noise)
    edges = torch.linspace(0, 1, num_levels + 1).unsqueeze(-1).double()
    points = Logit(1)(edges).squeeze(-1)
    corners = torch.cartesian_prod(points, points).numpy()
    below = scipy.stats.multivariate_normal(loc, covariance, abseps=1e-9, releps=1e-9).cdf(corners)
    cells = torch.as_tensor(below).view(num_levels + 1, -1).diff(dim=0).diff(dim=1)
    levels = torch.cartesian_prod(*2 * [torch.arange(num_levels)])
    return density, levels, cells.flatten().log()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_scores_average_to_the_probabilities_of_levels(dtype: torch.dtype, learned: bool) -> None:
    """Whatever the noise: the mean of p(y) / r(y | v) is the integral of p over the cell."""
    density, levels, exact = correlated(3, scattered((2,)) if learned else None)
    density.to(dtype)
    torch.manual_seed(0)
    draws = density.score(levels.expand(40_000, 9, 2))
    assert draws.dtype == dtype
    ratios = (draws - exact).exp()
    # Five standard errors of nine averages: false alarms are rarer than one in 100 000, but for
    # the skewness of the ratios.
    error = 5 * ratios.std(0) / 40_000**0.5
    assert error.max() < 0.1
    assert ((ratios.mean(0) - 1).abs() < error).all()
    # Their logarithms bound the log-probabilities from below.
    assert (draws.mean(0) < exact).all()


def test_noise_starts_even() -> None:
    identity = pf.flow("realnvp", SHAPE, 4, num_layers=2)
    with torch.no_grad():
        for parameter in identity.parameters():
            parameter.zero_()
    flow = Flow(None, ActNorm(SHAPE, initialized=True))
    levels = torch.randint(8, (50, *SHAPE))
    scores = []
    for noise in (None, identity):
        torch.manual_seed(0)
        scores.append(Dequantized(flow, 8, noise=noise).score(levels))
    torch.testing.assert_close(*scores)


def test_learned_noise_closes_the_gap_of_a_density_that_is_not_flat_in_its_cells() -> None:
    torch.manual_seed(0)
    noise = pf.flow("spline_coupling", (2,), 2, num_layers=2)
    density, levels, exact = correlated(2, noise)
    for parameter in density.flow.parameters():
        parameter.requires_grad_(False)

    @torch.no_grad()
    def gap(density: Dequantized) -> float:
        """Return the gap of the bound in nats, averaged over all levels."""
        return (exact - density.score(levels.expand(2000, 4, 2))).mean().item()

    even = gap(correlated(2)[0])
    assert even > 0.1
    assert gap(density) == pytest.approx(even, rel=0.2)  # the noise starts nearly even
    rows = levels.repeat(200, 1)
    density.fit(rows, num_steps=200, learning_rate=1e-2, standardize=False, progress=False)
    assert -0.01 < gap(density) < 0.1 * even


def test_more_draws_tighten_the_bound_of_learned_noise() -> None:
    torch.manual_seed(0)
    density, levels, exact = correlated(3, scattered((2,)))
    with torch.no_grad():
        bits = [density.bits_per_dim(levels.expand(2000, 9, 2), num_draws=k).mean() for k in (1, 8)]
    assert bits[0] > bits[1] > -exact.mean() / (2 * math.log(2))


def test_learned_noise_stays_with_what_is_derived_from_a_density() -> None:
    noise = scattered(SHAPE)
    flow = Flow(None, pf.flow("realnvp", SHAPE, 3, num_layers=2))
    density = Dequantized(flow, 8, noise=noise)
    assert density.condition(torch.eye(3)).temper(0.5).expand((2, 3)).noise is noise
    assert density.condition(torch.eye(3)).log_prob(blobs(5).unsqueeze(1)).shape == (5, 3)


def test_the_state_holds_the_noise() -> None:
    def fresh(seed: int) -> Dequantized:
        flow = Flow(None, pf.flow("realnvp", SHAPE, num_layers=2))
        return Dequantized(flow, 8, noise=scattered(SHAPE, seed))

    def score(density: Dequantized) -> Tensor:
        torch.manual_seed(0)
        return density.score(blobs(20))

    density, other = fresh(0), fresh(1)
    density.fit(blobs(100), num_steps=5, progress=False)
    other.load_state_dict(density.state_dict())
    assert torch.equal(score(density), score(other))


def test_learned_noise_is_where_the_parameters_are() -> None:
    flow = Flow(None, pf.flow("realnvp", SHAPE, num_layers=2))
    density = Dequantized(flow, 8, noise=scattered(SHAPE)).to("meta")
    assert density.score(torch.zeros(5, *SHAPE, device="meta")).is_meta


def test_gradients_reach_the_noise_and_the_flow() -> None:
    noise = scattered(SHAPE)
    density = Dequantized(Flow(None, pf.flow("realnvp", SHAPE, num_layers=2)), 8, noise=noise)
    density.log_prob(torch.randint(8, (50, *SHAPE))).mean().backward()
    for name, parameter in density.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for part in (noise, density.flow.transform):
        assert all(p.grad.abs().max() > 0 for p in part.parameters())


# Arrays of images


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 28, 28), (10, 1, 28, 28)),
        ((10, 1, 28, 28), (10, 1, 28, 28)),
        ((10, 32, 32, 3), (10, 3, 32, 32)),
        ((10, 3, 32, 32), (10, 3, 32, 32)),
        ((10, 64, 48, 4), (10, 4, 64, 48)),
    ],
)
def test_images_of_any_size_are_brought_into_one_layout(shape: tuple, expected: tuple) -> None:
    array = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
    levels = image_levels(array)
    assert levels.shape == expected
    assert levels.dtype == torch.uint8
    assert levels.is_contiguous()
    channels_last = np.moveaxis(levels.numpy(), 1, -1).reshape(-1)
    same = np.array_equal(channels_last, array.reshape(-1))
    assert same or np.array_equal(levels.numpy().reshape(-1), array.reshape(-1))


def test_a_channel_stays_a_channel() -> None:
    array = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    array[..., 1] = 7
    assert (image_levels(array)[:, 1] == 7).all()
    assert image_levels(array).sum() == 7 * 2 * 64


def test_digits_are_levels() -> None:
    levels = image_levels(load_digits().images, num_levels=17)
    assert levels.shape == (1797, 1, 8, 8)
    assert levels.max() == 16


def test_many_levels_need_more_than_a_byte() -> None:
    levels = image_levels(torch.full((2, 8, 8), 1000), num_levels=1024)
    assert levels.dtype == torch.int32
    assert (levels == 1000).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((28, 28)), r"\(N, H, W\), .*got \(28, 28\)"),
        (np.zeros((2, 3, 8, 8, 1)), r"got \(2, 3, 8, 8, 1\)"),
        (np.zeros((2, 0, 8)), r"got \(2, 0, 8\)"),
        (np.zeros((2, 3, 8, 3)), r"\(2, 3, 8, 3\) may have their channels first or last"),
        (np.zeros((2, 8, 8, 5)), r"\(2, 8, 8, 5\) may have their channels first or last"),
        (np.full((2, 8, 8), 0.5), "integers from 0 to 255, got 0.5"),
        (np.full((2, 8, 8), np.nan), "integers from 0 to 255, got nan"),
        (np.full((2, 8, 8), 256), "integers from 0 to 255, got 256"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_levels(images)


def test_ambiguous_channels_can_be_named() -> None:
    images = np.zeros((2, 3, 8, 3))
    assert image_levels(images, channels="first").shape == (2, 3, 8, 3)
    assert image_levels(images, channels="last").shape == (2, 3, 3, 8)


def test_a_list_is_no_array() -> None:
    with pytest.raises(TypeError, match="images must be a tensor or an array, got list"):
        image_levels([[1]])
