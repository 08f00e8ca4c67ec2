"""Toy densities and energies: their draws, densities and constants are right."""

import math

import pytest
import torch

from case_studies.energy_functions import ENERGIES, log_normaliser_by_quadrature
from case_studies.toys import TOYS, divergence, entropy_by_quadrature

every_toy = pytest.mark.parametrize("name", TOYS)


def quick_by_default(*quick):
    """Run a test for all toys, by default only for those where it takes no time."""
    names = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in TOYS]
    return pytest.mark.parametrize("name", names)


def two_normals(x, centres, scale):
    squares = torch.stack([((x - c) / scale).square().sum(-1) for c in centres])
    return (-squares / 2).logsumexp(0) - math.log(len(centres) * 2 * math.pi * scale**2)


@quick_by_default("moons", "8gaussians", "pinwheel", "checkerboard")
def test_densities_integrate_to_one_and_have_the_stated_entropy(name):
    mass, entropy = entropy_by_quadrature(TOYS[name], cells=300)
    assert mass == pytest.approx(1.0, abs=1e-6)
    assert entropy == pytest.approx(TOYS[name].entropy, abs=1e-4)


@quick_by_default("moons", "8gaussians", "pinwheel", "checkerboard", "circles")
def test_draws_follow_the_density(name):
    # Cells of a histogram of 10 000 draws against their probabilities: chi-square, alpha 1e-4.
    toy, cells, num_draws = TOYS[name], 10, 10_000
    torch.set_default_dtype(torch.float64)
    draws = toy.sample(num_draws, seed=1)
    fine = 12  # midpoints per cell and axis
    centres = (torch.arange(cells * fine) + 0.5) / (cells * fine) * 8 - 4
    log_prob = toy.log_prob(torch.cartesian_prod(centres, centres))
    mass = log_prob.exp().reshape(cells, fine, cells, fine).sum((1, 3)) * (8 / cells / fine) ** 2
    index = ((draws + 4) / 8 * cells).floor().long()
    inside = ((index >= 0) & (index < cells)).all(-1)
    flat = index[inside] @ torch.tensor([cells, 1])
    counts = torch.bincount(flat, minlength=cells**2).double()
    expected = mass.flatten() * num_draws
    kept = expected >= 5
    statistic = ((counts - expected).square() / expected)[kept].sum().item()
    rest = num_draws - expected[kept].sum()
    statistic += ((num_draws - counts[kept].sum() - rest).square() / rest.clamp(min=1.0)).item()
    degrees = int(kept.sum())
    # Wilson and Hilferty's approximation of the quantile at 1 - 1e-4.
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3
    assert statistic < quantile


@every_toy
def test_draws_are_reproducible_and_leave_the_global_random_state_alone(name):
    state = torch.random.get_rng_state()
    first, again = TOYS[name].sample(100, seed=3), TOYS[name].sample(100, seed=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, TOYS[name].sample(100, seed=4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.shape == (100, 2)
    assert first.dtype == torch.float32


@every_toy
def test_log_densities_take_any_batch_and_keep_the_dtype(name):
    x = TOYS[name].sample(6).reshape(2, 3, 2)
    log_prob = TOYS[name].log_prob(x)
    assert log_prob.shape == (2, 3)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(
        log_prob.double(), TOYS[name].log_prob(x.double()), atol=1e-3, rtol=1e-4
    )


def test_eight_gaussians_by_hand():
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = 4 / 1.414 * torch.stack([angles.cos(), angles.sin()], -1)
    x = torch.randn(50, 2, dtype=torch.float64) * 2
    expected = two_normals(x, centres, 0.5 / 1.414)
    torch.testing.assert_close(TOYS["8gaussians"].log_prob(x), expected)


@pytest.mark.parametrize(
    ("name", "radii", "scale"),
    [("circles", (1.5, 3.0), 0.24), ("rings", (0.75, 1.5, 2.25, 3.0), 0.08)],
)
def test_noisy_circles_by_their_bessel_function(name, radii, scale):
    radius = torch.linspace(0, 3.5, 30, dtype=torch.float64)
    x = radius.unsqueeze(-1) * torch.tensor([0.6, -0.8], dtype=torch.float64)
    terms = [
        torch.special.i0e(radius * r / scale**2).log() - (radius - r).square() / (2 * scale**2)
        for r in radii
    ]
    normaliser = math.log(2 * math.pi * scale**2 * len(radii))
    expected = torch.stack(terms).logsumexp(0) - normaliser
    torch.testing.assert_close(TOYS[name].log_prob(x), expected)


def test_the_divergence_is_that_between_normals():
    # Of one normal from the eight: the expected log-density is known up to sampling error.
    toy = TOYS["8gaussians"]
    normal = torch.distributions.MultivariateNormal(torch.zeros(2), 4.5 * torch.eye(2))
    result = divergence(normal, toy, toy.sample(100_000, seed=1))
    mean_square = (4 / 1.414) ** 2 + 2 * (0.5 / 1.414) ** 2
    exact = math.log(2 * math.pi * 4.5) + mean_square / 9
    assert abs(result["NLL"] - exact) < 5 * result["standard error"]  # false alarms: 6e-7
    assert result["KL"] == pytest.approx(result["NLL"] - toy.entropy)


@pytest.mark.parametrize("name", ENERGIES)
def test_normalisers_of_energies_agree_with_quadrature(name):
    exact = log_normaliser_by_quadrature(ENERGIES[name])
    assert exact == pytest.approx(ENERGIES[name].log_normaliser, abs=1e-5)


def test_energies_by_hand():
    z = torch.tensor([1.0, 0.5])
    assert ENERGIES["U2"].potential(z).item() == pytest.approx(0.5 * (0.5 / 0.4) ** 2)
    ring = 0.5 * ((math.sqrt(1.25) - 2) / 0.4) ** 2
    sides = math.exp(-0.5 * (1 / 0.6) ** 2) + math.exp(-0.5 * (3 / 0.6) ** 2)
    assert ENERGIES["U1"].potential(z).item() == pytest.approx(ring - math.log(sides), rel=1e-5)
    first, second = math.exp(-0.5 * (0.5 / 0.35) ** 2), math.exp(-0.5 * (2.5 / 0.35) ** 2)
    assert ENERGIES["U3"].potential(z).item() == pytest.approx(-math.log(first + second), rel=1e-4)
    first, second = math.exp(-0.5 * (0.5 / 0.4) ** 2), math.exp(-0.5 * (1.0 / 0.35) ** 2)
    assert ENERGIES["U4"].potential(z).item() == pytest.approx(-math.log(first + second), rel=1e-4)
