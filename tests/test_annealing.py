"""Annealing: known posteriors and evidences, modes, bounds, errors."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Beta, Normal

from pyroflows.sbi.model.space import NormalCDF
from pyroflows.sbi.posteriors.annealing import Annealed, anneal


def draws_of_normal(num_draws: int, dim: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(num_draws, dim, generator=torch.Generator().manual_seed(seed))


def standard_normal(z: Tensor) -> Tensor:
    return Normal(0.0, 1.0).log_prob(z).sum(-1)


def annealed(
    log_likelihood: Callable, num_draws: int = 1000, dim: int = 1, seed: int = 0
) -> Annealed:
    return anneal(
        draws_of_normal(num_draws, dim, seed=seed), standard_normal, log_likelihood, seed=seed
    )


def test_a_normal_posterior_and_its_evidence() -> None:
    """Moments of 2000 draws err by 2 %, five errors are .11; the evidence by its own error."""
    x, noise = torch.linspace(-2, 2, 4), 0.05
    result = annealed(lambda z: Normal(z, noise).log_prob(x).sum(-1), 2000, 4)
    scale = noise / math.sqrt(1 + noise**2)
    assert ((result.draws.mean(0) - x / (1 + noise**2)) / scale).abs().max() < 0.11
    assert (result.draws.std(0) / scale - 1).abs().max() < 0.11
    exact = Normal(0.0, math.sqrt(1 + noise**2)).log_prob(x).sum().item()
    assert abs(result.log_evidence - exact) < 4 * result.log_evidence_error
    assert 0 < result.log_evidence_error < 0.2


def test_the_error_of_the_evidence_is_that_of_replicates() -> None:
    """The deviation of 30 replicates is known to 13 %: three errors are 40 %."""
    results = [annealed(lambda z: Normal(z[:, 0], 0.1).log_prob(z.new_tensor(1.0)), 200, seed=s)
               for s in range(30)]  # fmt: skip
    spread = torch.tensor([result.log_evidence for result in results]).std().item()
    stated = sum(result.log_evidence_error for result in results) / len(results)
    assert 0.6 < spread / stated < 1.4


def test_modes_far_apart_keep_their_weights() -> None:
    """Replicates of the weight deviate by .011 at 4000 draws: four errors are .045."""

    def log_likelihood(z: Tensor) -> Tensor:
        left = Normal(-2.0, 0.05).log_prob(z).sum(-1) + math.log(0.25)
        right = Normal(2.0, 0.1).log_prob(z).sum(-1) + math.log(0.75)
        return torch.logaddexp(left, right)

    def log_prior(z: Tensor) -> Tensor:
        return Normal(0.0, 2.0).log_prob(z).sum(-1)

    result = anneal(draws_of_normal(4000, 2, 2.0), log_prior, log_likelihood)
    is_left = result.draws[:, 0] < 0
    assert is_left.double().mean().item() == pytest.approx(0.25, abs=0.045)
    assert result.draws[is_left].std(0).mean().item() == pytest.approx(0.05, rel=0.1)
    assert result.draws[~is_left].std(0).mean().item() == pytest.approx(0.1, rel=0.1)


def test_four_mirror_images_share_the_posterior() -> None:
    """The scales of SLCP enter by their squares. Shares deviate by .016: four errors are .065.

    The evidence is the mean likelihood of 400 000 draws from the prior, known to .013.
    """
    x = torch.tensor([[-0.98, -3.03], [-1.35, 0.81], [1.53, -0.52], [-1.42, 0.6]])

    def parameters(z: Tensor) -> Tensor:
        return 6 * torch.special.ndtr(z) - 3

    def log_likelihood(z: Tensor) -> Tensor:
        loc, one, other, skew = parameters(z).tensor_split([2, 3, 4], -1)
        first, second = ((x - loc.unsqueeze(1)) / torch.stack([one, other], -1) ** 2).unbind(-1)
        correlation = skew.tanh()
        rest = 1 - correlation**2
        square = (first**2 - 2 * correlation * first * second + second**2) / rest
        log_scale = 2 * (one.abs().log() + other.abs().log()) + 0.5 * rest.log()
        return (-0.5 * square - log_scale - math.log(2 * math.pi)).sum(-1)

    result = annealed(log_likelihood, 2000, 5)
    signs = (parameters(result.draws)[:, 2:4] > 0).long() @ torch.tensor([1, 2])
    shares = signs.bincount(minlength=4) / 2000
    assert (shares - 0.25).abs().max() < 0.065
    generator = torch.Generator().manual_seed(1)
    weights = log_likelihood(torch.randn(400_000, 5, generator=generator)).double()
    exact = (weights.logsumexp(0) - math.log(400_000)).item()
    assert abs(result.log_evidence - exact) < 4 * result.log_evidence_error


def test_a_bounded_parameter_in_unconstrained_space() -> None:
    """A uniform prior and seven successes in nine make a Beta(8, 3) distribution."""
    bounded = NormalCDF()

    def log_likelihood(z: Tensor) -> Tensor:
        theta = bounded(z[:, 0])
        return 7 * theta.log() + 2 * torch.log1p(-theta)

    result = annealed(log_likelihood, 4000)
    theta, exact = bounded(result.draws[:, 0]), Beta(8.0, 3.0)
    error = exact.stddev.item() / math.sqrt(4000)
    assert theta.mean().item() == pytest.approx(exact.mean.item(), abs=5 * error)
    assert theta.std().item() == pytest.approx(exact.stddev.item(), rel=0.06)
    log_beta = math.lgamma(8) + math.lgamma(3) - math.lgamma(11)
    assert abs(result.log_evidence - log_beta) < 4 * result.log_evidence_error


@pytest.mark.parametrize("impossible", [-math.inf, math.nan])
def test_a_likelihood_that_is_zero_somewhere(impossible: float) -> None:
    """The evidence of a half-line is its probability, here .1587, known to 4 %."""
    result = annealed(lambda z: torch.where(z[:, 0] > 1, 0.0, impossible), 4000)
    assert (result.draws > 1).all()
    expected = Normal(0.0, 1.0).cdf(torch.tensor(-1.0)).log().item()
    assert result.log_evidence == pytest.approx(expected, abs=0.15)


def test_the_seed_determines_the_result_and_the_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, other, different = (
        annealed(lambda z: -z.square().sum(-1), 100, seed=seed).draws for seed in (1, 1, 2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, different)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_draws", [300, 3000])
def test_the_population_may_change_its_size(num_draws: int) -> None:
    """The posterior is N(1, 1/2); five errors of 300 draws are .2."""
    result = anneal(
        draws_of_normal(1000, 1),
        standard_normal,
        lambda z: Normal(z[:, 0], 1.0).log_prob(torch.tensor(2.0)),
        num_draws=num_draws,
    )
    assert result.draws.shape == (num_draws, 1)
    assert result.draws.mean().item() == pytest.approx(1.0, abs=0.2)
    assert result.draws.std().item() == pytest.approx(0.5**0.5, rel=0.2)
    exact = Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()
    assert abs(result.log_evidence - exact) < 4 * result.log_evidence_error


def test_initial_draws_are_left_alone() -> None:
    initial = draws_of_normal(100, 1)
    copy = initial.clone()
    anneal(initial, standard_normal, lambda z: -10 * (z[:, 0] - 1).square())
    assert torch.equal(initial, copy)


def test_progress_can_be_silenced(capsys: pytest.CaptureFixture) -> None:
    for progress in (False, True):
        anneal(
            draws_of_normal(100, 1), standard_normal, lambda z: -(z[:, 0] ** 2), progress=progress
        )
        assert ("anneal" in capsys.readouterr().err) == progress


def test_wrong_arguments_are_refused() -> None:
    for initial in (torch.zeros(7, 2), torch.zeros(100)):
        with pytest.raises(ValueError, match=r"initial must have shape \(N, D\) with N at least 8"):
            anneal(initial, standard_normal, standard_normal)
    with pytest.raises(ValueError, match="num_draws must be at least 8, got 7"):
        anneal(torch.zeros(8, 2), standard_normal, standard_normal, num_draws=7)
    with pytest.raises(ValueError, match="log_likelihood must be finite somewhere"):
        annealed(lambda z: torch.full_like(z[:, 0], -math.inf))
